"""One benchmark: variants of the same work, first checked to agree, then taken in turn, beside a calibration arm.

    compare(benchmark, session, ours=..., peers={...}, check=..., ...)

1. `check` makes sure that the variants compute the same; where they don't, `Disagreement` ends the benchmark.
2. Each variant is warmed up for a stretch of time, and its operations, memory and launches are counted once.
3. Rounds: each peer, the calibration arm (a matrix product and a copy), then ours. Times are paired by round.
4. What comes out: medians, the 20th and 80th percentile, and for each peer the ratio of the medians with a 95 %
   bootstrap interval of the pairs (see `compare.py`), in pytest-benchmark's extra_info, and from there in its JSON.

Times are taken by the harness: the wall clock around work and synchronisation, or by the variant where it says so
(device events, or what a process of its own has measured). pytest-benchmark reads them from `clock`, which stands still
while set-up, peers and calibration run.

Where the session takes turns with another revision (see `turns.py`), ours and the calibration arm alone run, when told.
"""

from __future__ import annotations

import gc
import time
import traceback
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
        seconds: times a round by itself and returns it, in place of the wall clock around `run`: device events, or the
            seconds for as much work that another process has told.
        countable: whether `run` is torch code of this process, whose operations, launches and memory can be counted.
        compiled: whether parts of it went through torch.compile: its operations can't be counted then.
    """

    run: Callable[[], Any] = nothing
    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing
    seconds: Callable[[], float] | None = None
    countable: bool = False
    compiled: bool = False


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
        if device not in self.calibrations:
            self.calibrations[device] = Calibration(device)
        return self.calibrations[device]


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
    warm_up_seconds: float | None = WARM_UP_SECONDS,
    per: float = 1.0,
    afterwards: Callable[[], None] = nothing,
    extra: Callable[[], Mapping[str, Any]] = dict,
    flops_an_item: Callable[[], float] | None = None,
) -> None:
    """Run a benchmark and write what it measured to `benchmark.extra_info`.

    Args:
        ours, peers: the variants; a peer's name is what it is, such as "DataLoader".
        check: raises where the variants disagree.
        items: of work a round, such as images; rates are items a second. Where it is one, the time is what matters, and
            the summary speaks of seconds.
        unit: what an item is, in the plural.
        device: "cpu" or "cuda": where the calibration arm runs, and whether a round ends with a synchronisation.
        rounds: pairs; one where the session is quick.
        warm_up_seconds: each variant runs for at least so long first, and at least once; None for no warm-up, where
            each round is a process that starts anew.
        per: what rates are divided by, such as the number of cores; `unit` then says so.
        afterwards: as `check`, of what can be told after the rounds only.
        extra: more for extra_info, asked for after the last round.
        flops_an_item: floating-point operations that an item takes (see `counts.flops_of`), asked for after the last
            round: the rate is then told as a share of the calibration arm's matrix product, too.
    """
    _let_go(device)
    _agree(check, session.name)
    peers = dict(peers or {})
    variants = {"ours": ours} if session.turns else {"ours": ours, **peers}
    if session.quick and warm_up_seconds is not None:
        warm_up_seconds = 0.0
    counts = {name: _prepare(variant, device, warm_up_seconds) for name, variant in variants.items()}
    if session.turns:
        _take_turns(session, ours, device, counts["ours"])
        return
    arm = session.calibration(device)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    calibration: list[dict[str, float]] = []

    def others() -> None:
        for name, peer in peers.items():
            seconds[name].append(measure(peer, device))
        calibration.append(arm.round())
        ours.before()

    def timed() -> None:
        global _elapsed
        try:
            _elapsed += _seconds(ours, device)
        except BaseException:
            ours.after()  # pytest-benchmark's teardown does not come where a round fails
            raise

    benchmark.pedantic(timed, setup=others, teardown=ours.after, rounds=1 if session.quick else rounds)
    if benchmark.stats is None:  # --benchmark-disable: it was run, nothing was measured
        return
    try:
        _agree(afterwards, session.name)
    except BaseException:
        benchmark.has_error = True  # pytest-benchmark leaves it out of what it writes
        raise
    seconds["ours"] = list(benchmark.stats.stats.data)
    counted = {name: each.as_dict() for name, each in counts.items() if each is not None}
    benchmark.extra_info.update(
        report(seconds, items, unit, per, counted),
        title=session.title,
        device=device,
        items_a_round=items,
        calibration=spread(calibration),
        counts=counted,
    )
    if flops_an_item is not None:
        flops, product = flops_an_item(), [each["matmul"] for each in calibration]
        share = share_of_product(flops * items, seconds["ours"], arm.flops, product)
        benchmark.extra_info["share_of_limit"] = {"share": share, "of": "the matrix product's rate"}
        benchmark.extra_info["flops_an_item"] = flops
        benchmark.extra_info["summary"] += f"; {100 * share:.1f} % of the matrix product's rate"
    benchmark.extra_info.update(extra())


def measure(variant: Variant, device: str) -> float:
    """Seconds of one round."""
    variant.before()
    try:
        return _seconds(variant, device)
    finally:
        variant.after()


def report(
    seconds: Mapping[str, Sequence[float]],
    items: float,
    unit: str,
    per: float = 1.0,
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """Rates, percentiles and ratios, with a line of text that says it all.

    Args:
        seconds: each round's, of "ours" and of each peer.
        items, unit, per: see `compare`.
        counts: of those variants that were counted; the text names their peaks of GPU memory.
    """
    rates, spans, ratios = {}, {}, {}
    for name, times in seconds.items():
        fast, median, slow = (float(np.percentile(times, q)) for q in (20, 50, 80))
        spans[name] = {"median": median, "p20": fast, "p80": slow}
        rates[name] = {"median": items / per / median, "p20": items / per / slow, "p80": items / per / fast}
    said = {n: _seconds_in_words(spans[n]["median"]) if items == 1 else _number(rates[n]["median"]) for n in seconds}
    words = [said["ours"] if items == 1 else f"{said['ours']} {unit}/s"]
    for name, times in seconds.items():
        if name != "ours":
            ratios[name] = ratio_of_medians(seconds["ours"], times)
            words.append(f"{in_words(ratios[name])} as {name} ({said[name]})")
    peaks = {name: each["peak_bytes"] for name, each in (counts or {}).items() if "peak_bytes" in each}
    if peaks:
        words.append("peak memory " + ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in peaks.items()))
    return {
        "summary": "; ".join(words),
        "rates": rates,
        "seconds_a_round": spans,
        "unit": unit,
        "times_the_peer": ratios,
        "peer_seconds": {name: list(times) for name, times in seconds.items() if name != "ours"},
    }


def spread(calibration: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median and interquartile range, as a share of the median, of each calibration."""
    found = {}
    for name in calibration[0] if calibration else ():
        low, median, high = np.percentile([each[name] for each in calibration], [25, 50, 75])
        found[name] = {"seconds": float(median), "spread": float((high - low) / median)}
    return found


def share_of_product(
    flops: float, seconds: Sequence[float], product_flops: float, product_seconds: Sequence[float]
) -> float:
    """The rate of work in operations a second, as a share of a matrix product's; both by their medians."""
    return float(flops / np.median(seconds) / (product_flops / np.median(product_seconds)))


def _let_go(device: str) -> None:
    """Give back what earlier benchmarks left: it would count against this one's memory, and another process's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _agree(check: Callable[[], None], name: str) -> None:
    try:
        check()
    except AssertionError as error:
        said = " ".join(str(error).split())
        if not said:  # an assertion without words of its own, in a file that pytest does not rewrite
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{at.filename}:{at.lineno}: {at.line}"
        raise Disagreement(
            f"{name}: the variants do not compute the same, so their speed is not compared. Mend the variant that is"
            f" wrong, or the check. {said}"
        ) from error


def _prepare(variant: Variant, device: str, warm_up_seconds: float | None) -> Counts | None:
    """Warm up, and count once."""
    if warm_up_seconds is not None:
        end = time.perf_counter() + warm_up_seconds
        measure(variant, device)
        while time.perf_counter() < end:
            measure(variant, device)
    if not variant.countable:
        return None
    variant.before()
    try:
        return count(variant.run, device, compiled=variant.compiled)
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


def _seconds_in_words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
