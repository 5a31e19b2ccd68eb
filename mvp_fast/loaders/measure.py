"""How fast backends load one data set on this machine: all of them under way at once, measured in turn.

A passage that nobody takes from fills its queues and stands still. In each round every candidate gets one turn: first
it gives what lay ready, untimed, then batches are timed until its share of the round is over. So a machine that becomes
slower slows all of them, and medians over the rounds can be compared. After its turn a candidate is given the time to
fill its queues again, so that it does not work during another's. Each candidate goes through samples of its own,
so that none finds in memory what another has just read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from mvp_fast.errors import UserError
from mvp_fast.loaders.base import StageStats

ROUNDS = 5
STAGES = ("read", "decode", "transform", "copy")


@dataclass
class Passage:
    """A passage under way.

    Attributes:
        batches: what is iterated over.
        ahead: batches that may lie ready, at most.
        close: ends it, and gives back all it has.
        stats: where the time goes; None where it is not told.
        synchronize: waits for the device, where the batches are made there.
    """

    batches: Iterator[Any]
    ahead: int
    close: Callable[[], None]
    stats: StageStats | None = None
    synchronize: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Candidate:
    """A backend, or what a user would run instead (`peer`), and how to begin a passage; raises UserError where not."""

    name: str
    start: Callable[[], Passage]
    peer: bool = False


@dataclass
class Measured:
    """What was measured of one candidate.

    Attributes:
        first_batch: seconds from its construction to its first batch.
        rates: images a second, all cores together, one a round.
        batch_seconds: of every timed batch.
        stages: images a second by stage: of waiting for reading and copying, of one core's time for decoding and
            transforming; where a backend does not tell these apart, both are under decode.
    """

    name: str
    peer: bool
    first_batch: float
    rates: list[float] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Images a second: the median round."""
        return median(self.rates)

    def percentile(self, q: float) -> float:
        """Seconds a batch."""
        return float(np.percentile(self.batch_seconds, q))


def measure(
    candidates: Sequence[Candidate],
    batch_size: int,
    seconds: float,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Measured], dict[str, UserError]]:
    """Measure candidates in turn.

    Args:
        candidates: in the order in which they take their turns.
        batch_size: images a batch.
        seconds: of timed batches for each of them, over ROUNDS rounds; at least two batches a round are timed.
        tell: gets a word on what is being done.

    Returns:
        What was measured, and by name the errors of those that could not be.
    """
    failed: dict[str, UserError] = {}
    running: list[tuple[Measured, Passage]] = []
    try:
        for candidate in candidates:
            tell(f"starting {candidate.name}")
            begin = time.perf_counter()
            try:
                passage = candidate.start()
            except UserError as error:
                failed[candidate.name] = error
                continue
            running.append((Measured(candidate.name, candidate.peer, 0.0), passage))
            if _guarded(running, failed, lambda passage: next(passage.batches), running[-1]):
                passage.synchronize()
                running[-1][0].first_batch = time.perf_counter() - begin
        for number in range(ROUNDS):
            for each in tuple(running):  # some may leave
                tell(f"round {number + 1} of {ROUNDS}: {each[0].name}")
                turn = partial(_turn, each[0], batch_size=batch_size, seconds=seconds / ROUNDS)
                _guarded(running, failed, turn, each)
        for found, passage in running:
            _stages(found, passage)
    finally:
        for _, passage in running:
            passage.close()
    return [found for found, _ in running], failed


def _guarded(
    running: list[tuple[Measured, Passage]],
    failed: dict[str, UserError],
    act: Callable[[Passage], Any],
    each: tuple[Measured, Passage],
) -> bool:
    """Whether `act` went well; else the candidate leaves, with the reason."""
    try:
        act(each[1])
    except UserError as error:
        failed[each[0].name] = error
        running.remove(each)
        each[1].close()
        return False
    return True


def _turn(found: Measured, passage: Passage, batch_size: int, seconds: float) -> None:
    """One turn: what lay ready, and then timed batches."""
    for _ in range(passage.ahead):
        next(passage.batches)
    passage.synchronize()
    start = last = time.perf_counter()
    count = 0
    while count < 2 or last - start < seconds:
        next(passage.batches)
        passage.synchronize()
        now = time.perf_counter()
        found.batch_seconds.append(now - last)
        last, count = now, count + 1
    found.rates.append(count * batch_size / (last - start))
    time.sleep(min(passage.ahead * median(found.batch_seconds), max(seconds, 0.1)))


def _stages(found: Measured, passage: Passage) -> None:
    if passage.stats is not None:
        seconds, items = passage.stats.seconds, passage.stats.items
        found.stages = {stage: items[stage] / seconds[stage] for stage in STAGES if items[stage] and seconds[stage]}
