"""A passage whose images are finished one by one by a pool of threads: what `torchvision` and `cpu` share.

Each image goes through one thread: read, decode, crop, resize, into its place in the batch. There are more threads than
may work at once: those beyond wait for the disk or the network, so that the processor never does. What a thread needs
to work (its decoder) is handed around, and there are as many of them as threads may work at once.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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

READERS = 4
"""Threads beyond those that may work at once."""
MOST_ROWS_A_TASK = 16
"""Rows that a thread takes at a time, at most: one by one, handing them over costs a share of a fast decoder's time."""


class Cost(NamedTuple):
    """What one crop took, seconds: wall time for the reading, processor time of the thread for the rest."""

    read: float
    decode: float
    transform: float


Worker = Callable[[Index, PlanRows, str, encoded.Encoded, NDArray[np.uint8]], Cost]
"""Carries out the first row: index, rows, filter, encoded image, and where the crop goes, uint8 (H, W, 3). The reading
is not its own. Raises BadSampleError where the sample cannot be used. Called by one thread at a time."""


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
        # At least two tasks for each worker among the batches in flight, so that none idles at a batch's end.
        share = IN_FLIGHT * plan.local_batch_size // (2 * len(workers))
        self._rows_a_task = max(1, min(MOST_ROWS_A_TASK, share))
        self._workers: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            self._workers.put(worker)
        self._pool = ThreadPoolExecutor(len(workers) + READERS, thread_name_prefix="mvp-crops")

    def _carry_out(self, row: PlanRows, out_HWC: NDArray[np.uint8]) -> Cost:
        start = time.perf_counter()
        data = encoded.read(self._plan.index, int(row.sample_B[0]))
        read = time.perf_counter() - start
        worker = self._workers.get()
        try:
            return worker(self._plan.index, row, self._interpolation, data, out_HWC)._replace(read=read)
        finally:
            self._workers.put(worker)

    def _submit(self) -> _Step:
        plan, step = self._plan, self._next_step
        self._next_step += 1
        rows = plan.step(step)
        images_BHWC = torch.empty((len(rows), plan.image_size, plan.image_size, 3), dtype=torch.uint8)
        out_BHWC = images_BHWC.numpy()

        def work(first: int) -> list[Settled[Cost]]:
            done = []
            for i in range(first, min(first + self._rows_a_task, len(rows))):
                done.append(settle(plan, step, rows, i, lambda row, i=i: self._carry_out(row, out_BHWC[i])))
                if done[-1].value is None:
                    break
            return done

        futures = [self._pool.submit(work, first) for first in range(0, len(rows), self._rows_a_task)]
        return _Step(step, rows, images_BHWC, futures)

    def next(self) -> Batch:
        """The next batch; waits for it."""
        while len(self._steps) < IN_FLIGHT:
            self._steps.append(self._submit())
        step = self._steps.popleft()
        rows = step.rows
        for i, settled in enumerate(settled for future in step.futures for settled in future.result()):
            self._failures.account(settled)
            for stage, seconds in (settled.value or Cost(0, 0, 0))._asdict().items():
                self._stats.add(stage, seconds, settled.value is not None)
            if settled.failures:
                rows = rows.replace_row(i, settled.rows, 0)
        return Batch(step.step, step.images_BHWC, torch.from_numpy(rows.masked_BM()), rows)

    def close(self) -> None:
        """Stop the work in flight and give back threads and memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()
        while not self._workers.empty():
            self._workers.get()
