"""What every run does at each step: the ranks agree, a batch is taken, the learning rate set, the update made.

Used by the training loop and by `--profile`, so that what is measured is what runs.
"""

from __future__ import annotations

from enum import IntEnum

from mvp_fast.errors import DataError, EnvironmentProblem
from mvp_fast.loaders.base import Batch, Loader
from mvp_fast.loaders.prefetch import Prefetcher
from mvp_fast.train.guards import StopRequest
from mvp_fast.train.optim import learning_rate, set_learning_rate
from mvp_fast.train.pace import Pace
from mvp_fast.train.run import Run


class Event(IntEnum):
    """What the ranks agree on before each step; the greatest of their answers holds for all."""

    GO_ON = 0
    STOP = 1
    DATA_FAILED = 2


class Stepping:
    """Takes steps of a run with batches of a loader, from where the run stands.

    Args:
        run: its step's `stage` is told of each stage here, too.
        loader: closed by the caller, after `close`.
        stop: a request to stop, which all ranks shall hear of.
        pace: this rank's clocks.

    Attributes:
        rate: the learning rate of the last step.
        prefetcher: has the time waited for data.
    """

    def __init__(self, run: Run, loader: Loader, stop: StopRequest, pace: Pace) -> None:
        self.run, self.stop, self.pace, self.rate = run, stop, pace, 0.0
        config = run.config
        self.prefetcher = Prefetcher(
            loader, run.plan, run.steps_done, run.ranks.device, config.data.prefetch, stage=run.step.stage
        )
        self.close = self.prefetcher.close

    def next_batch(self) -> tuple[Event, Batch | None, Exception | None]:
        """What all ranks have agreed on; the batch, which is there where they go on; this rank's own failure."""
        event, failure, batch = Event.GO_ON, None, None
        try:
            with self.run.step.stage("data wait"):
                batch = next(self.prefetcher)
        except (DataError, EnvironmentProblem, OSError) as error:  # also what the machine refuses, such as a file
            event, failure = Event.DATA_FAILED, error
        if self.stop.requested:
            event = max(event, Event.STOP)
        return Event(self.pace.agree(event)), batch, failure

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        run = self.run
        self.rate = learning_rate(run.steps_done, run.total_steps, run.config.optim, run.config.train.batch_size)
        set_learning_rate(run.optimizer, self.rate)
        more = run.step.ahead and run.steps_done + 1 < run.total_steps
        following = self.prefetcher.peek() if more else None
        with self.pace.step():
            run.interval.add(run.step(batch, following))
        run.steps_done += 1
        run.replaced += int((batch.rows.attempt_B > 0).sum())
        if run.ema is not None:
            with run.step.stage("optimizer"):
                run.ema.update(run.model, step=run.steps_done)
