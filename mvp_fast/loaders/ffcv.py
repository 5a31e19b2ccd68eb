"""FFCV carries out the plan: samples of a .beton, decoded and resized by FFCV's C functions, in threads of our own.

Order, boxes and flips are the plan's. A sample stored raw is read row by row of its box alone; a JPEG is decoded whole.
Both go through OpenCV's area filter, FFCV's only one, straight into the batch's memory. Where a box is smaller than the
crop in width or height, that filter interpolates linearly (OpenCV's INTER_AREA).

No pixel is ever left from before: a crop is written whole, or its row gets a stand-in. A JPEG passes the checks that
all backends make (`encoded.read`), libjpeg-turbo's status is looked at, and what it refuses or warns of goes to Pillow,
which has the last word. Pixels stored raw have nothing to be checked by: damaged bytes are damaged pixels.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mvp_fast.loaders import encoded
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.beton import Beton
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.loaders.failures import Settled, settle
from mvp_fast.loaders.ffcv_library import Cropper
from mvp_fast.loaders.runs import IN_FLIGHT, Run, ThreadedLoader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan

ROWS_A_TASK = 16
"""Rows that a thread takes at a time: one by one, handing them over costs a raw sample a share of its time."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one crop cost, seconds: wall time for the reading, processor time of the thread for the rest.

    Attributes:
        decoder: who decoded: "ffcv", "pillow", or "" for a sample stored raw.
    """

    read: float
    decode: float
    transform: float
    decoder: str


def carry_out(
    index: Index,
    beton: Beton,
    cropper: Cropper,
    sample: int,
    box: tuple[int, int, int, int],
    flip: bool,
    out_HWC: NDArray[np.uint8],
) -> Cost:
    """Read, decode and crop one sample into `out_HWC`, uint8 (H, W, 3).

    Raises:
        BadSampleError: the sample cannot be used; what `out_HWC` holds then is undefined.
    """
    beton.check(sample)
    width, height = int(index.width[sample]), int(index.height[sample])
    start = time.perf_counter()
    if beton.raw_n[sample]:
        x, y, columns, rows = box
        image_HWC = cropper.memory(3 * width * rows)
        beton.read(int(index.offset[sample]) + 3 * width * y, image_HWC)
        read, begun = time.perf_counter() - start, time.thread_time()
        cropper.crop(image_HWC.reshape(rows, width, 3), (x, 0, columns, rows), flip, out_HWC)
        return Cost(read, 0.0, time.thread_time() - begun, "")
    data = encoded.read(index, sample)
    read, begun = time.perf_counter() - start, time.thread_time()
    decoded_HWC, decoder = cropper.decode(data.data, width, height) if data.plain_jpeg else None, "ffcv"
    if decoded_HWC is None:
        decoded_HWC, decoder = np.array(encoded.decode(index, sample, data)), "pillow"
    decoded = time.thread_time()
    cropper.crop(decoded_HWC, box, flip, out_HWC)
    return Cost(read, decoded - begun, time.thread_time() - decoded, decoder)


@dataclass(frozen=True)
class _Step:
    """A batch in flight: one future for ROWS_A_TASK rows, which are written into `images_BHWC`.

    A row whose sample is good gives its cost alone: a slice of the plan for it takes a share of a raw sample's time.
    """

    step: int
    rows: PlanRows
    images_BHWC: torch.Tensor
    futures: list[Future[list[Cost | Settled[Cost]]]]


class _FfcvRun:
    """One passage through a plan: an open beton, a pool of threads with a `Cropper` each, IN_FLIGHT batches in it."""

    def __init__(self, loader: FfcvLoader, plan: SamplePlan, start_step: int) -> None:
        self._plan, self._next_step = plan, start_step
        self._stats, self._failures = loader.stats(), loader.failures
        self._steps: deque[_Step] = deque()
        self._beton: Beton | None = Beton.open(plan.index)
        self._local, self._croppers = threading.local(), list[Cropper]()
        self._pool = ThreadPoolExecutor(loader.threads, thread_name_prefix="mvp-ffcv", initializer=self._equip)

    def _equip(self) -> None:
        """Give a thread of the pool its cropper."""
        self._local.cropper = Cropper()
        self._croppers.append(self._local.cropper)

    def _submit(self) -> _Step:
        plan, step, beton = self._plan, self._next_step, self._beton
        if beton is None:
            raise RuntimeError("the passage is closed")
        self._next_step += 1
        rows = plan.step(step)
        images_BHWC = torch.empty((len(rows), plan.image_size, plan.image_size, 3), dtype=torch.uint8)
        out_BHWC = images_BHWC.numpy()

        columns = (rows.sample_B, rows.x_B, rows.y_B, rows.width_B, rows.height_B, rows.flip_B)
        planned = list(zip(*(column.tolist() for column in columns), strict=True))

        def attempt(i: int, sample: int, x: int, y: int, width: int, height: int, flip: bool) -> Cost:
            cropper: Cropper = self._local.cropper
            return carry_out(plan.index, beton, cropper, sample, (x, y, width, height), flip, out_BHWC[i])

        def attempt_stand_in(i: int, row: PlanRows) -> Cost:
            sample, x, y, width, height = (
                int(column[0]) for column in (row.sample_B, row.x_B, row.y_B, row.width_B, row.height_B)
            )
            return attempt(i, sample, x, y, width, height, bool(row.flip_B[0]))

        def work(first: int) -> list[Cost | Settled[Cost]]:
            done: list[Cost | Settled[Cost]] = []
            for i in range(first, min(first + ROWS_A_TASK, len(rows))):
                try:
                    done.append(attempt(i, *planned[i]))
                except BadSampleError as bad:
                    settled = settle(plan, step, rows, i, partial(attempt_stand_in, i), first=bad)
                    done.append(settled)
                    if settled.value is None:
                        break
            return done

        futures = [self._pool.submit(work, first) for first in range(0, len(rows), ROWS_A_TASK)]
        return _Step(step, rows, images_BHWC, futures)

    def next(self) -> Batch:
        while len(self._steps) < IN_FLIGHT:
            self._steps.append(self._submit())
        step = self._steps.popleft()
        rows, costs, i = step.rows, list[Cost](), 0
        for future in step.futures:
            for done in future.result():
                settled = Settled(rows, done) if isinstance(done, Cost) else done
                self._failures.account(settled)  # which raises where no stand-in was found
                if settled.value is not None:
                    costs.append(settled.value)
                if settled.failures:
                    rows = rows.replace_row(i, settled.rows, 0)
                i += 1
        self._book(costs)
        return Batch(step.step, step.images_BHWC, torch.from_numpy(rows.masked_BM()), rows)

    def _book(self, costs: list[Cost]) -> None:
        self._stats.add("read", sum(cost.read for cost in costs), len(costs))
        decoded = sum(bool(cost.decoder) for cost in costs)  # nothing is decoded of a sample stored raw
        self._stats.add("decode", sum(cost.decode for cost in costs), decoded)
        self._stats.add("transform", sum(cost.transform for cost in costs), len(costs))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()
        for cropper in self._croppers:
            cropper.close()
        self._croppers.clear()
        if self._beton is not None:
            self._beton.close()
            self._beton = None


class FfcvLoader(ThreadedLoader):
    """FFCV's C functions over a beton, `threads` threads."""

    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        return _FfcvRun(self, plan, start_step)
