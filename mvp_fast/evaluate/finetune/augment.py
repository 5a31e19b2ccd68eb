"""RandAugment as a loader around another: its batches go through processes that augment them in shared memory.

While one batch is waited for, the next is loaded and augmented. What comes out is a function of (seed, epoch, position)
alone: the same with any number of processes and ranks, and after a resume.

Shape legend: B images, H and W pixels, C colours.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.evaluate.finetune import augment_worker
from mvp_fast.loaders.base import Batch, Loader, StageStats
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.samples.random import Stream, draws

SLOTS = 2
"""Batches in shared memory: the one that is waited for, and the next."""
TASKS = 4
"""Parts of a batch for each process: one that is slower than the others holds up a quarter of its share."""


@dataclass(frozen=True)
class _Pending:
    batch: Batch
    slot: int
    futures: list[Future[float]]


class RandAugmentLoader:
    """The batches of `loader`, each image through RandAugment.

    Args:
        loader: its images are on the CPU.
        policy: RandAugment in timm's notation.
        mean: colour that fills what an image leaves bare, of values in [0, 1].
        interpolation: bicubic, bilinear or area.
        seed: of the run.
        workers: processes; they are started at the first batch.
    """

    def __init__(
        self, loader: Loader, policy: str, *, mean: tuple[float, ...], interpolation: str, seed: int, workers: int
    ) -> None:
        self._loader, self._policy, self._mean = loader, policy, mean
        self._interpolation, self._seed, self._workers = interpolation, seed, workers

    @property
    def bad_samples(self) -> int:
        """As of the loader inside."""
        return self._loader.bad_samples

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        """Yield the batches from `start_step` on.

        Raises:
            EnvironmentProblem: a process died.
            DataError: what the loader inside raises.
        """
        side = plan.image_size
        shape = (SLOTS, plan.local_batch_size, side, side, 3)
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
        memory = context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
        arguments = (self._policy, side, self._mean, self._interpolation)
        pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=augment_worker.start, initargs=(memory, shape, arguments)
        )
        inner = self._loader.batches(plan, start_step)
        slots = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
        pending: deque[_Pending] = deque()
        try:
            number, more = 0, True
            while True:
                while more and len(pending) < SLOTS:
                    batch = next(inner, None)
                    if batch is None:
                        more = False
                        break
                    pending.append(self._submit(pool, slots, number % SLOTS, batch))
                    number += 1
                if not pending:
                    return
                yield self._finish(slots, pending.popleft())
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "A process that augments images died; most often the machine has run out of memory",
                where=f"augmentation.workers {self._workers}",
                fix="Take fewer with --augmentation.workers N, and go on with --resume auto",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
            if isinstance(inner, Generator):
                inner.close()

    def stats(self) -> StageStats:
        """As of the loader inside; the augmentation's processor time is booked under `transform`."""
        return self._loader.stats()

    def close(self) -> None:
        """Close the loader inside; the processes end with the passage."""
        self._loader.close()

    def _submit(self, pool: ProcessPoolExecutor, slots: torch.Tensor, slot: int, batch: Batch) -> _Pending:
        rows = batch.rows
        slots[slot, : len(rows)] = batch.images_BHWC
        seeds_B4 = draws(self._seed, Stream.RAND_AUGMENT, rows.epoch_B, rows.position_B, 0)
        size = max(1, -(-len(rows) // (TASKS * self._workers)))
        with _signals_held():  # a pool starts its processes as tasks come in
            tasks = [
                pool.submit(augment_worker.work, slot, start, seeds_B4[start : start + size])
                for start in range(0, len(rows), size)
            ]
        return _Pending(batch, slot, tasks)

    def _finish(self, slots: torch.Tensor, pending: _Pending) -> Batch:
        seconds = sum(future.result() for future in pending.futures)
        self._loader.stats().add("transform", seconds, 0)  # the images are counted by the loader inside
        return replace(pending.batch, images_BHWC=slots[pending.slot, : len(pending.batch.rows)].clone())


def workers_of(workers: int, threads: int, local_ranks: int) -> int:
    """Processes a rank: as asked, else as many as there are loading threads."""
    return workers or threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside never see SIGTERM and SIGINT, which a scheduler may send to all processes of a job.

    The run's own process finishes its step and saves a checkpoint then; these end with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
