"""NVIDIA DALI carries out the plan: threads read the encoded bytes, `dali_pipeline` turns them into crops.

Pixels agree with the reference (`loaders.torchvision`) up to rounding: Pillow rounds to 8 bits between the two passes
of a resize, DALI does not. The conformance tests state the distance.

Two kinds of sample take another way, with the reference's very pixels: whatever is not a plain JPEG (Pillow decodes it
in the reading thread), and JPEGs that DALI refuses though Pillow takes them. Their rows are filled in after DALI,
which gets a blank in their place.

Where DALI fails, it fails for a whole batch, and its pipeline with it. The bad samples of that batch are then found
one by one and replaced by the policy that all backends share, the pipeline is built anew, and the batches in flight
are fed again: no other sample is touched. DALI reads a JPEG down to the box's last row only; damage below it goes
unnoticed, where the reference, which decodes everything, may call the sample bad. All of this is the same on the GPU,
where the row of a sample that Pillow crops is copied into the batch.

With data.repeat, everything above the pipeline goes by groups: one encoded image, settled and decoded once, and as many
rows as it has crops.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from mvp_fast.config.schema import DataConfig
from mvp_fast.loaders import encoded
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.dali_batch import BLANK_SIDE, Prepared, PreparedBatch, blank
from mvp_fast.loaders.dali_pipeline import CropPipeline
from mvp_fast.loaders.encoded import BadSampleError, Encoded
from mvp_fast.loaders.failures import BadSamples, Settled, settle
from mvp_fast.loaders.runs import IN_FLIGHT, Run, ThreadedLoader
from mvp_fast.loaders.torchvision import Crop, carry_out
from mvp_fast.samples.plan import PlanRows, SamplePlan

READ_AHEAD = 2
"""Batches being read while DALI works on IN_FLIGHT others."""
LEAST_READERS = 4
"""Reading threads even where there are fewer cores: they wait for the disk or the network."""
ROWS_A_TASK = 16
"""Rows that a reading thread takes at a time: one by one, handing them over costs more than reading them."""


class _DaliRun:
    """One passage through a plan. Batches move from `reading` to `fed` to the consumer."""

    def __init__(self, loader: DaliLoader, plan: SamplePlan, start_step: int) -> None:
        self._plan, self._next_step = plan, start_step
        self._interpolation, self._threads, self._gpu = loader.config.interpolation, loader.threads, loader.gpu
        self._stats, self._failures = loader.stats(), loader.failures
        self._reading: deque[tuple[int, PlanRows, list[Future[list[Settled[Prepared]]]]]] = deque()
        self._fed: deque[PreparedBatch] = deque()
        self._pool = ThreadPoolExecutor(max(LEAST_READERS, loader.threads), thread_name_prefix="mvp-dali-read")
        self._pipeline = self._new_pipeline()
        self._booked = 0.0

    def next(self) -> Batch:
        """The next batch; a batch that DALI refuses is mended and fed again, until it is whole or given up."""
        while True:
            self._fill()
            head = self._fed[0]
            if head.given_up():
                self._raise(head)
            try:
                images_BHWC = self._pipeline.take()
            except Exception as error:
                self._mend(head, error)
            else:
                return self._finish(self._fed.popleft(), images_BHWC)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipeline.close()
        self._reading.clear()
        self._fed.clear()

    def _new_pipeline(self) -> CropPipeline:
        return self._pipeline_of(self._plan.local_batch_size // self._plan.repeat, self._threads, IN_FLIGHT)

    def _pipeline_of(self, batch_size: int, threads: int, depth: int) -> CropPipeline:
        size, repeat = self._plan.image_size, self._plan.repeat
        return CropPipeline(batch_size, size, self._interpolation, threads, depth, repeat=repeat, gpu=self._gpu)

    def _fill(self) -> None:
        """Keep READ_AHEAD batches in the reading threads and IN_FLIGHT in DALI."""
        while len(self._fed) < IN_FLIGHT:
            while len(self._reading) <= READ_AHEAD:
                self._submit()
            step = self._collect()
            self._feed(step)
            self._fed.append(step)

    def _submit(self) -> None:
        step, rows = self._next_step, self._plan.step(self._next_step)
        self._next_step += 1

        repeat = self._plan.repeat
        rows_a_task = max(1, ROWS_A_TASK // repeat) * repeat

        def work(first: int) -> list[Settled[Prepared]]:
            done = []
            for i in range(first, min(first + rows_a_task, len(rows)), repeat):
                done.append(settle(self._plan, step, rows, i, self._prepare, count=repeat))
                if done[-1].value is None:
                    break
            return done

        futures = [self._pool.submit(work, first) for first in range(0, len(rows), rows_a_task)]
        self._reading.append((step, rows, futures))

    def _collect(self) -> PreparedBatch:
        """Wait for the oldest batch being read. Errors are kept until it is that batch's turn."""
        number, rows, futures = self._reading.popleft()
        step = PreparedBatch(number, rows, len(rows) // self._plan.repeat, [])
        for future in futures:
            try:
                step.settled += future.result()
            except Exception as error:
                step.error = error
            if step.error is not None or step.settled[-1].value is None:
                for other in futures:
                    other.cancel()
                break
        for group, settled in enumerate(step.settled):
            if settled.failures:
                step.replace(group, settled)
        return step

    def _prepare(self, rows: PlanRows) -> Prepared:
        """Read one group's sample; one that is no plain JPEG is also decoded and cropped, by Pillow."""
        start = time.perf_counter()
        data = encoded.read(self._plan.index, int(rows.sample_B[0]))
        read = time.perf_counter() - start
        return Prepared(data, read, None if data.plain_jpeg else self._crop(rows, data))

    def _prepare_tested(self, rows: PlanRows) -> Prepared:
        """As `_prepare`, but Pillow has decoded the whole image."""
        prepared = self._prepare(rows)
        if prepared.crop is None:
            encoded.decode(self._plan.index, int(rows.sample_B[0]), prepared.data)
        return prepared

    def _crop(self, rows: PlanRows, data: Encoded) -> Crop:
        return carry_out(self._plan.index, rows, self._plan.image_size, self._interpolation, data)

    def _feed(self, step: PreparedBatch) -> None:
        rows, jpegs = step.rows, step.for_dali()
        boxes_B4 = np.stack([rows.x_B, rows.y_B, rows.width_B, rows.height_B], axis=1)
        data, repeat = [], self._plan.repeat
        for group in range(step.groups):
            if group in jpegs:
                data.append(jpegs[group].data)
            else:
                data.append(blank())
                boxes_B4[group * repeat : (group + 1) * repeat] = (0, 0, BLANK_SIDE, BLANK_SIDE)
        self._pipeline.feed(data, boxes_B4, rows.flip_B)

    def _finish(self, step: PreparedBatch, images_BHWC: torch.Tensor) -> Batch:
        repeat = self._plan.repeat
        for group, settled in enumerate(step.settled):
            self._failures.account(settled)
            if settled.value is None:
                continue
            self._stats.add("read", settled.value.read, 1)
            done = settled.value.crop
            if done is not None:
                images_BHWC[group * repeat : (group + 1) * repeat] = torch.from_numpy(done.images_RHWC.copy())
                self._stats.add("decode", done.decode, 0)
                self._stats.add("transform", done.transform, 0)
        self._book_dali(step.groups)
        return Batch(step.step, images_BHWC, torch.from_numpy(step.rows.masked_BM()), step.rows)

    def _book_dali(self, items: int) -> None:
        """Book what DALI's threads used since the last time: it does not tell decoding from resizing."""
        seconds = self._pipeline.cpu_seconds()
        self._stats.add("decode", seconds - self._booked, items)
        self._booked = seconds

    def _raise(self, step: PreparedBatch) -> None:
        """Book what is known of a batch that was given up, which raises, or raise its error."""
        for settled in step.settled:
            self._failures.account(settled)
        if step.error is not None:
            raise step.error

    def _mend(self, step: PreparedBatch, error: Exception) -> None:
        """Replace the bad samples of the batch that DALI failed on, and feed all batches in flight to a new pipeline.

        Pillow has the last word: what it refuses is bad. Where it takes every sample, DALI gets them one at a time,
        and Pillow crops those that DALI refuses.
        """
        self._book_dali(0)
        self._pipeline.close()
        found = self._replace_bad(step) or self._crop_refused(step)
        if not found:
            raise error  # no sample's fault: DALI failed on a batch of images that it takes one by one
        self._pipeline, self._booked = self._new_pipeline(), 0.0
        for waiting in self._fed:
            self._feed(waiting)

    def _replace_bad(self, step: PreparedBatch) -> bool:
        """Replace the samples that Pillow refuses; whether there were any."""
        jpegs = step.for_dali()
        samples = (int(step.rows_of(group).sample_B[0]) for group in jpegs)
        verdicts = list(self._pool.map(self._verdict, samples, jpegs.values()))
        for group, verdict in zip(jpegs, verdicts, strict=True):
            if verdict is not None:
                rows = step.rows_of(group)
                mended = settle(
                    self._plan, step.step, rows, 0, self._prepare_tested, first=verdict, count=self._plan.repeat
                )
                step.settled[group] = replace(mended, failures=step.settled[group].failures + mended.failures)
                step.replace(group, mended)
        return any(verdict is not None for verdict in verdicts)

    def _verdict(self, sample: int, data: Encoded) -> BadSampleError | None:
        try:
            encoded.decode(self._plan.index, sample, data)
        except BadSampleError as bad:
            return bad
        return None

    def _crop_refused(self, step: PreparedBatch) -> bool:
        """Let Pillow crop the samples that DALI refuses one at a time; whether there were any."""
        refused = False
        for group, data in step.for_dali().items():
            rows, settled = step.rows_of(group), step.settled[group]
            if settled.value is not None and not self._dali_takes(rows, data):
                step.settled[group] = replace(settled, value=replace(settled.value, crop=self._crop(rows, data)))
                refused = True
        return refused

    def _dali_takes(self, rows: PlanRows, data: Encoded) -> bool:
        boxes_R4 = np.stack([rows.x_B, rows.y_B, rows.width_B, rows.height_B], axis=1)
        pipeline = self._pipeline_of(1, threads=1, depth=1)
        try:
            pipeline.feed([data.data], boxes_R4, rows.flip_B)
            pipeline.take()
        except Exception:  # whatever it raises: Pillow took this sample
            return False
        finally:
            pipeline.close()
        return True


class DaliLoader(ThreadedLoader):
    """DALI with `threads` worker threads, and reading threads of its own.

    Args:
        config, local_ranks, failures: see `ThreadedLoader`.
        gpu: where DALI decodes, and where the batches are then; None for the CPU.
    """

    def __init__(
        self, config: DataConfig, *, local_ranks: int, failures: BadSamples, gpu: torch.device | str | None = None
    ) -> None:
        super().__init__(config, local_ranks=local_ranks, failures=failures)
        self.gpu = None if gpu is None else (torch.device(gpu), config.hw_decoder_load)

    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        return _DaliRun(self, plan, start_step)
