"""Gives two benchmark processes their turns: a pair of rounds at a time, and only when both are ready (`turns.py`).

The two set up at the same time, which is not timed; afterwards one runs its round while the other waits. Who is first
changes from pair to pair, so that what the first one leaves behind, such as warm caches, favours neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from side_process import Side, Unable

# So many pairs are taken at least; where that lasts PATIENCE times as long as it should, only the fewest that still
# give an interval: that of five pairs, which spans them all, holds the truth in 15 of 16 cases.
LEAST_PAIRS, MOST_PAIRS, FEWEST_PAIRS, PATIENCE, MORE_TIMES = 11, 101, 5, 3.0, 2


@dataclass
class Measured:
    """What came out of one benchmark.

    Attributes:
        name, nodeid: of the benchmark.
        device: where it runs; empty where it was not measured.
        rounds: pairs, each with `first`, `base` and `current`.
        counts: of each side.
        reason: why there are no rounds, or what failed after them; empty where all went well.
        whose: the side that the reason is of.
        failed: whether the reason is a failure.
    """

    name: str
    nodeid: str
    device: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int] | None] = field(default_factory=dict)
    reason: str = ""
    whose: str = ""
    failed: bool = False


def take_turns(
    base: Side,
    current: Side,
    seconds: float,
    unsure: Callable[[Measured], bool] = lambda measured: False,
    longest: float = math.inf,
) -> Iterator[Measured]:
    """Run the current side's benchmarks on both sides; yields each when it is over.

    Args:
        base, current: the sides; not started yet.
        seconds: of rounds for each benchmark, as far as the number of pairs allows.
        unsure: whether what was measured leaves open what matters. It is asked when the seconds are over; each yes, up
            to MORE_TIMES, gives as many seconds again. (Asking after every pair would stop at the first lucky one.)
        longest: seconds; a benchmark whose fewest pairs take longer is left out.

    Raises:
        Died: a side has ended.
        EnvironmentProblem: a side measures the wrong packages.
    """
    for side in (base, current):
        side.start()
    yield from (Measured(file, file, "", [], {}, why, "current", True) for file, why in current.refused.items())
    names = list(current.benchmarks)
    for number, name in enumerate(names):
        measured, ready = Measured(name, current.benchmarks[name]), []
        try:
            for side in (current, base):  # where it fails on both, the working tree's failure is what is told
                facts = side.until_ready(name, names[number + 1 :])
                ready.append(side)
                measured.device, measured.counts[side.label] = facts["device"], facts["counts"]
            for _ in range(1 + MORE_TIMES):
                _rounds(base, current, measured, seconds, longest)
                if not unsure(measured):
                    break
        except Unable as unable:
            _note(measured, unable)
            ready = [side for side in ready if side.label != unable.label]
        for side in ready:
            side.stop()
        for side in ready:
            try:
                side.finish(name)
            except Unable as unable:
                _note(measured, unable)
        yield measured


def _rounds(base: Side, current: Side, measured: Measured, seconds: float, longest: float) -> None:
    """Add rounds to what was measured."""
    rounds, start, spent = measured.rounds, time.monotonic(), 0.0
    while len(rounds) < FEWEST_PAIRS or (
        len(rounds) < MOST_PAIRS and spent < (seconds if len(rounds) >= LEAST_PAIRS else PATIENCE * seconds)
    ):
        order = (base, current) if len(rounds) % 2 == 0 else (current, base)
        rounds.append({"first": order[0].label, **{side.label: side.turn(measured.name) for side in order}})
        spent = time.monotonic() - start
        if len(rounds) == 1 and FEWEST_PAIRS * spent > longest:
            measured.rounds = []
            reason = f"its rounds are too long for the short form: {spent:.1f} seconds a pair"
            raise Unable("", reason, failed=False)


def _note(measured: Measured, unable: Unable) -> None:
    if not measured.reason or (unable.label == "current" and unable.failed):
        measured.reason, measured.whose, measured.failed = unable.reason, unable.label, unable.failed
