"""Each rank's own speed: what it would reach if it never waited for the others, and which rank keeps them waiting.

Ranks work in step, so all show the same images a second, that of the slowest. Where a rank waits for others:

- on the host, before each step, in the agreement to go on: there arrive late those that wait for data. Measured.
- on the device, where gradients and sharded weights are exchanged: there arrive late those that compute slowly. That
  waiting has no clock of its own, so it is inferred: each rank times the stages of a step in which nothing is
  exchanged, by events on a GPU; the rank that needs longest for them waits for nobody, and the others' steps are taken
  to be as much shorter as those stages are.

Nothing is read from a device before a metric line is due, and the ranks exchange five numbers then.

Shape legend: R ranks, F figures (`FIGURES`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mvp_fast.train.distributed import Ranks
from mvp_fast.train.sinks import Metrics
from mvp_fast.train.stages import Stage, StageRecorder

STRAGGLER = 0.1
"""How much slower than the median a rank must be to be named."""
FIGURES = ("seconds", "data", "agreement", "alone", "step")
_ALONE: dict[bool, frozenset[Stage]] = {  # the stages without an exchange, by whether the student is sharded
    False: frozenset(("copy", "patchify", "teacher", "student forward", "loss")),
    True: frozenset(("copy", "patchify", "teacher")),
}


@dataclass
class _Stopwatch:
    """Seconds inside its spans: of the host's clock, or on a GPU of the current stream's."""

    device: torch.device
    seconds: float = 0.0
    pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def span(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.pending.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def take(self) -> float:
        """The seconds so far, and begin anew; waits for the device."""
        for begin, end in self.pending:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        taken, self.seconds = self.seconds, 0.0
        self.pending.clear()
        return taken


class Pace:
    """This rank's clocks between two metric lines; costs nothing where there is one rank.

    Args:
        sharded: the student's weights are exchanged, too, so that its forward pass waits for others.
    """

    def __init__(self, ranks: Ranks, *, sharded: bool) -> None:
        self.ranks, self.alone = ranks, _ALONE[sharded]
        self.active = ranks.world > 1
        self._alone, self._step = _Stopwatch(ranks.device), _Stopwatch(ranks.device)
        self.restart(0.0)

    def restart(self, wait_seconds: float) -> None:
        """Begin to measure now; `wait_seconds` is the time this rank's host has waited for data so far."""
        self._start, self._wait_start, self._agreement = time.perf_counter(), wait_seconds, 0.0
        self._left_out, self._paused = 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a training step."""
        if not self.active:
            yield
            return
        with self._step.span():
            yield

    def recorder(self, inner: StageRecorder) -> StageRecorder:
        """What a step tells its stages to: this, and `inner`."""

        @contextmanager
        def timed(stage: Stage) -> Iterator[None]:
            with self._alone.span(), inner(stage):
                yield

        return (lambda stage: timed(stage) if stage in self.alone else inner(stage)) if self.active else inner

    def agree(self, value: int) -> int:
        """`Ranks.agree`, with the time it takes on the clock."""
        start = time.perf_counter()
        agreed = self.ranks.agree(value)
        end = time.perf_counter()
        if self._paused:  # the wait for one rank's writing is nobody's pace
            self._left_out += end - self._paused
            self._paused = 0.0
        else:
            self._agreement += end - start
        return agreed

    def pause(self) -> None:
        """Leave out what follows till the ranks next agree: saving a checkpoint is mostly one rank's work."""
        self._paused = time.perf_counter()

    def read(self, images: int, wait_seconds: float) -> Metrics:
        """What the ranks did since the last call, and begin anew. Every rank must call this, after the device is done.

        Args:
            images: of one rank in that time.
            wait_seconds: as for `restart`.

        Returns:
            rank_images_per_second: each rank's own, in their order.
            slowest_rank: the rank with the least of them.
            straggler: what that rank waits for, `data` or `compute`, if it is slower than the median rank by more than
                STRAGGLER; else None.
            Nothing where there is one rank.
        """
        if not self.active:
            return {}
        seconds = time.perf_counter() - self._start - self._left_out
        data = wait_seconds - self._wait_start
        figures_F = (seconds, data, self._agreement, self._alone.take(), self._step.take())
        all_RF = torch.zeros(self.ranks.world, len(FIGURES), dtype=torch.float64)
        all_RF[self.ranks.rank] = torch.tensor(figures_F, dtype=torch.float64)
        self.restart(wait_seconds)
        return compare(self.ranks.sum(all_RF).numpy(), images)


def compare(figures_RF: NDArray[np.float64], images: int) -> Metrics:
    """The metrics of `Pace.read`.

    Args:
        figures_RF: each rank's seconds in all, waiting for data, agreeing, in stages without an exchange, in steps.
        images: of one rank in that time.
    """
    seconds_R, data_R, agreement_R, alone_R, step_R = figures_RF.T
    last = int(alone_R.argmax())
    compute_R = step_R[last] * alone_R / max(alone_R[last], 1e-9)
    waited_R = agreement_R - agreement_R.min() + compute_R[last] - compute_R
    # On a GPU waiting for data and computing overlap: what was waited on the host may not shorten the computing.
    own_R = np.maximum(seconds_R - waited_R, compute_R).clip(min=1e-9)
    speed_R = images / own_R
    slowest = int(speed_R.argmin())
    straggler: Literal["data", "compute"] | None = None
    if speed_R[slowest] < (1 - STRAGGLER) * np.median(speed_R):
        late_for_data, late = (each_R[slowest] - np.median(each_R) for each_R in (data_R, compute_R))
        straggler = "data" if late_for_data > late else "compute"
    return {
        "rank_images_per_second": [round(float(speed), 2) for speed in speed_R],
        "slowest_rank": slowest,
        "straggler": straggler,
    }


def in_words(metrics: Metrics) -> str:
    """The straggler of a metric line in words; empty where there is none."""
    if not metrics.get("straggler"):
        return ""
    speeds, slowest = metrics["rank_images_per_second"], metrics["slowest_rank"]
    share = 1 - speeds[slowest] / max(float(np.median(speeds)), 1e-9)
    reason = {"data": "it waits for data", "compute": "it computes slowly"}[metrics["straggler"]]
    return f"rank {slowest} is {100 * share:.0f} % slower than the median rank: {reason}"
