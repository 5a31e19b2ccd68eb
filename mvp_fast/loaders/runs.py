"""What the backends with threads share: how many threads, bookkeeping of runs, and giving everything back.

A run is one passage through a plan: `Loader.batches` starts one, and closing its generator, an error, or
`Loader.close` ends it. A run owns its threads, so that nothing outlives it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from mvp_fast.config.schema import DataConfig
from mvp_fast.loaders.base import Batch, StageStats
from mvp_fast.loaders.failures import BadSamples
from mvp_fast.samples.plan import SamplePlan

IN_FLIGHT = 2
"""Batches that a backend works on at once: the one that is waited for, and the next, so that threads do not idle
while the last images of a batch are finished. Batches that wait for the step are the prefetcher's."""


class Run(Protocol):
    """One passage through a plan."""

    def next(self) -> Batch:
        """The next batch; waits for it."""
        ...

    def close(self) -> None:
        """Stop the work in flight and give back threads and memory; may be called twice."""
        ...


class ThreadedLoader(ABC):
    """A loader whose passages are `Run`s; backends say how to start one.

    Args:
        config: interpolation, threads and the budget for bad samples.
        local_ranks: ranks on this machine, which share its cores.
        failures: the ledger to book bad samples in.
    """

    def __init__(self, config: DataConfig, *, local_ranks: int, failures: BadSamples) -> None:
        self.config = config
        self.threads = config.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
        self.failures = failures
        self._stats = StageStats()
        self._runs: list[Run] = []

    @abstractmethod
    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        """Begin a passage at `start_step`."""

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step, start_step + 1, ... without end (see `Loader`)."""
        run = self._start(plan, start_step)
        self._runs.append(run)
        try:
            while True:
                yield run.next()
        finally:
            run.close()
            if run in self._runs:
                self._runs.remove(run)

    @property
    def bad_samples(self) -> int:
        """How many samples were bad so far; each was replaced."""
        return self.failures.bad

    def stats(self) -> StageStats:
        """Where the time went so far; the object stays the same and goes on counting."""
        return self._stats

    def close(self) -> None:
        """End all passages; call it from the thread that iterates, or when none does."""
        while self._runs:
            self._runs.pop().close()
