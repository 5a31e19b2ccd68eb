"""One benchmark: variants of the same work, first checked to agree, then taken in turn, beside a calibration arm.

    compare(benchmark, session, ours=..., peers={...}, check=..., ...)

1. `check` makes sure that the variants compute the same; where they don't, `Disagreement` ends the benchmark.
2. Each variant is warmed up for a stretch of time, and its memory and launches are counted once.
3. Rounds: each peer, the calibration arm (a matrix product and a copy), then ours. Times are paired by round.
4. What comes out: medians, the 20th and 80th percentile, and for each peer the ratio of the medians with a 95 %
   bootstrap interval of the pairs (see `compare.py`), in pytest-benchmark's extra_info, and from there in its JSON.

Times are taken by the harness: the wall clock around work and synchronisation, or device events where a variant says
so. pytest-benchmark reads them from `clock`, which stands still while set-up, peers and calibration run.

Where the session takes turns with another revision (see `turns.py`), ours and the calibration arm alone run, when told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from calibration import Calibration
from compare import in_words, ratio_of_medians
from counts import Counts, count
from turns import Turns

ROUNDS, WARM_UP_SECONDS = 15, 0.5
_elapsed = 0.0


class Disagreement(AssertionError):
    """The variants of a benchmark do not compute the same; comparing their speed would mean nothing."""


def clock() -> float:
    """Seconds of measured work since the start of the process; pytest-benchmark's timer."""
    return _elapsed


def nothing() -> None:
    """Before or after a round, where there is nothing to do."""


@dataclass(frozen=True)
class Variant:
    """One way to do a round's work.

    Attributes:
        run: the work that is timed.
        before, after: what is done around it, untimed, such as starting workers.
        seconds: times a round by itself and returns it, in place of the wall clock around `run`; for device events.
        countable: whether `run` is torch code of this process, whose launches and memory can be counted.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing
    seconds: Callable[[], float] | None = None
    countable: bool = False


@dataclass
class Session:
    """What the command line says of all benchmarks.

    Attributes:
        quick: one short round of each.
        turns: the line to the process that gives turns, where two revisions are compared.
        name, title: of the benchmark that runs now: its file and test, and what it measures in words.
    """

    quick: bool = False
    turns: Turns | None = None
    name: str = ""
    title: str = ""
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def calibration(self, device: str) -> Calibration:
        """The calibration arm on a device, made once."""
        return self.calibrations.setdefault(device, Calibration(device))


def compare(
    benchmark: Any,
    session: Session,
    *,
    ours: Variant,
    check: Callable[[], None],
    items: float,
    unit: str,
    peers: Mapping[str, Variant] | None = None,
    device: str = "cpu",
    rounds: int = ROUNDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
    per: float = 1.0,
    extra: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Run a benchmark and write what it measured to `benchmark.extra_info`.

    Args:
        ours, peers: the variants; a peer's name is what it is, such as "DataLoader".
        check: raises where the variants disagree.
        items: of work a round, such as images; rates are items a second.
        unit: what an item is, in the plural.
        device: "cpu" or "cuda": where the calibration arm runs, and whether a round ends with a synchronisation.
        rounds: pairs; one where the session is quick.
        warm_up_seconds: each variant runs for at least so long first, and at least once.
        per: what rates are divided by, such as the number of cores; `unit` then says so.
        extra: more for extra_info, asked for after the last round.
    """
    _check(check, session.name)
    peers = dict(peers or {})
    variants = {"ours": ours, **peers}
    if session.turns:
        variants = {"ours": ours}
    counts = {name: _prepare(v, device, 0.0 if session.quick else warm_up_seconds) for name, v in variants.items()}
    if session.turns:
        _take_turns(session, ours, device, counts["ours"])
        return
    arm, seconds = session.calibration(device), {name: [] for name in peers}
    calibration: list[dict[str, float]] = []

    def others() -> None:
        for name, peer in peers.items():
            seconds[name].append(measure(peer, device))
        calibration.append(arm.round())
        ours.before()

    def timed() -> None:
        global _elapsed
        _elapsed += _seconds(ours, device)

    benchmark.pedantic(timed, setup=others, teardown=ours.after, rounds=1 if session.quick else rounds)
    seconds["ours"] = list(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        report(seconds, items / per, unit),
        title=session.title,
        device=device,
        items_a_round=items,
        calibration=spread(calibration),
    )
    benchmark.extra_info.update(counts={name: c.as_dict() for name, c in counts.items() if c is not None}, **extra())


def measure(variant: Variant, device: str) -> float:
    """Seconds of one round."""
    variant.before()
    try:
        return _seconds(variant, device)
    finally:
        variant.after()


def report(seconds: Mapping[str, Sequence[float]], items: float, unit: str) -> dict[str, Any]:
    """Rates, percentiles and ratios, with a line of text that says it all."""
    rates, ratios = {}, {}
    for name, times in seconds.items():
        slow, median, fast = (items / float(np.percentile(times, q)) for q in (80, 50, 20))
        rates[name] = {"median": median, "p20": slow, "p80": fast}
    words = [f"{_number(rates['ours']['median'])} {unit}/s"]
    for name, times in seconds.items():
        if name != "ours":
            ratios[name] = ratio_of_medians(seconds["ours"], times)
            words.append(f"{in_words(ratios[name])} as {name} ({_number(rates[name]['median'])})")
    peers = {name: list(times) for name, times in seconds.items() if name != "ours"}
    return {"summary": "; ".join(words), "rates": rates, "unit": unit, "times_the_peer": ratios, "peer_seconds": peers}


def spread(calibration: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median and interquartile range, as a share of the median, of each calibration."""
    found = {}
    for name in calibration[0] if calibration else ():
        low, median, high = np.percentile([each[name] for each in calibration], [25, 50, 75])
        found[name] = {"seconds": float(median), "spread": float((high - low) / median)}
    return found


def _check(check: Callable[[], None], name: str) -> None:
    try:
        check()
    except AssertionError as error:
        raise Disagreement(
            f"{name}: the variants do not compute the same, so their speed is not compared. Mend the variant that is"
            f" wrong, or the check. {error}"
        ) from error


def _prepare(variant: Variant, device: str, warm_up_seconds: float) -> Counts | None:
    """Warm up, and count once."""
    end = time.perf_counter() + warm_up_seconds
    measure(variant, device)
    while time.perf_counter() < end:
        measure(variant, device)
    if not variant.countable:
        return None
    variant.before()
    try:
        return count(variant.run, device)
    finally:
        variant.after()


def _seconds(variant: Variant, device: str) -> float:
    if variant.seconds is not None:
        return variant.seconds()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    variant.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _take_turns(session: Session, ours: Variant, device: str, counts: Counts | None) -> None:
    assert session.turns is not None
    arm = session.calibration(device)
    facts = {"device": device, "counts": None if counts is None else counts.as_dict()}
    for turn in session.turns.of(session.name, facts):
        calibration = arm.round()
        turn.done(measure(ours, device), calibration)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
