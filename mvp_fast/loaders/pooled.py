"""A passage whose images are finished one by one by a pool of threads: what `torchvision` and `cpu` share.

Each image goes through one thread: read, decode, crop, resize, into its place in the batch, so that it stays in that
core's cache. Where reading is slow, threads of their own ask the system for the files of later batches, so that no core
waits for the disk or the network.

With data.repeat, an image goes through with all its crops: read and decoded once.

Shape legend: B crops, R of one image, H and W pixels, C channels.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mvp_fast.loaders import encoded
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.failures import Settled, settle
from mvp_fast.loaders.runs import IN_FLIGHT, ThreadedLoader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan

READ_AHEAD = 2
"""Batches whose files are asked for, beyond those in flight."""
READERS = 4
"""Threads that ask: opening a file on a network file system waits for its server."""
SLOW = 1e-3
"""Seconds a read, wall time, from which files are asked for: asking for what is in memory costs more than it saves."""
MOST_ROWS_A_TASK = 16
"""Rows that a thread takes at a time, at most: one by one, handing them over costs a share of a fast decoder's time."""


class Cost(NamedTuple):
    """Seconds that an image with its crops took: wall time for reading, the thread's processor time for the rest."""

    read: float
    decode: float
    transform: float


Worker = Callable[[Index, PlanRows, str, encoded.Encoded, NDArray[np.uint8]], Cost]
"""Carries out rows of one sample: index, rows, filter, encoded image, and where the crops go, uint8 (R, H, W, 3). The
reading is not its own. Raises BadSampleError where the sample cannot be used. Called by one thread at a time."""


@dataclass(frozen=True)
class _Step:
    """A batch in flight: futures of some rows each, which write their crops into `images_BHWC`."""

    step: int
    rows: PlanRows
    images_BHWC: torch.Tensor
    futures: list[Future[list[Settled[Cost]]]]


class PooledRun:
    """One passage through a plan: a pool of threads, and at most IN_FLIGHT batches in it.

    Args:
        loader: whose passage it is: configuration, ledger and stats.
        plan, start_step: as for `Loader.batches`.
        workers: one for each thread that may work at once.
    """

    def __init__(self, loader: ThreadedLoader, plan: SamplePlan, start_step: int, workers: Sequence[Worker]) -> None:
        self._plan, self._next_step = plan, start_step
        self._interpolation = loader.config.interpolation
        self._stats, self._failures = loader.stats(), loader.failures
        self._steps: deque[_Step] = deque()
        self._planned: deque[PlanRows] = deque()
        self._read_seconds = math.inf  # of the latest batch
        # At least two tasks for each worker among the batches in flight, so that none idles at a batch's end.
        share = IN_FLIGHT * plan.local_batch_size // (2 * len(workers))
        self._rows_a_task = max(1, min(MOST_ROWS_A_TASK, share) // plan.repeat) * plan.repeat
        self._workers: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._workers.put(worker)
        self._pool = ThreadPoolExecutor(len(workers), thread_name_prefix="mvp-crops")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="mvp-read-ahead")

    def _carry_out(self, rows: PlanRows, out_RHWC: NDArray[np.uint8]) -> Cost:
        start = time.perf_counter()
        data = encoded.read(self._plan.index, int(rows.sample_B[0]))
        read = time.perf_counter() - start
        worker = self._workers.get()
        try:
            return worker(self._plan.index, rows, self._interpolation, data, out_RHWC)._replace(read=read)
        finally:
            self._workers.put(worker)

    def _plan_ahead(self) -> PlanRows:
        """The rows of the next step; where reading is slow, the files of those READ_AHEAD later are asked for."""
        while len(self._planned) <= READ_AHEAD:
            rows = self._plan.step(self._next_step + len(self._planned))
            self._planned.append(rows)
            samples = rows.sample_B[:: self._plan.repeat].tolist()
            if self._read_seconds <= SLOW * len(samples):
                continue
            for first in range(0, len(samples), MOST_ROWS_A_TASK):
                self._readers.submit(self._expect, samples[first : first + MOST_ROWS_A_TASK])
        return self._planned.popleft()

    def _expect(self, samples: list[int]) -> None:
        for sample in samples:
            encoded.expect(self._plan.index, sample)

    def _submit(self) -> _Step:
        plan, step, rows = self._plan, self._next_step, self._plan_ahead()
        self._next_step += 1
        # numpy asks the system for huge pages where torch does not: a batch takes few page faults.
        out_BHWC = np.empty((len(rows), plan.image_size, plan.image_size, 3), np.uint8)

        def work(first: int) -> list[Settled[Cost]]:
            done = []
            for i in range(first, min(first + self._rows_a_task, len(rows)), plan.repeat):
                carry_out = partial(self._carry_out, out_RHWC=out_BHWC[i : i + plan.repeat])
                done.append(settle(plan, step, rows, i, carry_out, count=plan.repeat))
                if done[-1].value is None:
                    break
            return done

        futures = [self._pool.submit(work, first) for first in range(0, len(rows), self._rows_a_task)]
        return _Step(step, rows, torch.from_numpy(out_BHWC), futures)

    def next(self) -> Batch:
        """The next batch; waits for it."""
        while len(self._steps) < IN_FLIGHT:
            self._steps.append(self._submit())
        step = self._steps.popleft()
        rows, self._read_seconds = step.rows, 0.0
        for group, settled in enumerate(settled for future in step.futures for settled in future.result()):
            self._failures.account(settled)
            if settled.value is not None:
                self._read_seconds += settled.value.read
                self._stats.add("read", settled.value.read, 1)
                self._stats.add("decode", settled.value.decode, 1)
                self._stats.add("transform", settled.value.transform, settled.count)
            if settled.failures:
                rows = rows.replace_rows(group * self._plan.repeat, settled.rows)
        return Batch(step.step, step.images_BHWC, torch.from_numpy(rows.masked_BM()), rows)

    def close(self) -> None:
        """Stop the work in flight and give back threads and memory."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()
        while not self._workers.empty():
            self._workers.get()
