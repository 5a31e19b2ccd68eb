"""What the rounds of two revisions, taken in pairs, say: faster, slower, no difference that can be told, or void.

The figure is the median of the pairs' ratios, base seconds / current seconds: above 1 the current revision is faster.
Within a pair the two ran one after the other, so that a slow spell of the machine hits both; a round that something
else disturbed moves a median little. A 95 % bootstrap interval says how far the figure can be trusted.

A difference counts where the whole interval lies beyond the threshold. That needs a threshold of its own, beside the
interval: two processes that run the same code may differ by a few per cent for as long as they live (where their memory
lies, for one), and no number of rounds averages that out.

The calibration arm runs in both processes and touches no code of the project. Where its own interval lies wholly beyond
half the threshold, either way, what differs is the machine, and the comparison is void.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FASTER, SLOWER, SAME, VOID = "faster", "slower", "no difference that can be told", "void"
THRESHOLDS = {"cpu": 0.10, "cuda": 0.05}
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """How many times as fast the current side is, with its 95 % interval.

    Attributes:
        ratio: the median of the pairs' ratios.
        low, high: of the interval.
        pairs: how many there were.
    """

    ratio: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Judgement:
    """What a benchmark's rounds say.

    Attributes:
        verdict: FASTER, SLOWER, SAME or VOID.
        times: how many times as fast the current side is.
        calibration: the same of each calibration.
        drifted: the calibrations that void the comparison.
    """

    verdict: str
    times: Interval
    calibration: Mapping[str, Interval]
    drifted: tuple[str, ...]


def paired(base: Sequence[float], current: Sequence[float], seed: int = 0) -> Interval:
    """The median ratio of pairs with its interval.

    Args:
        base, current: seconds for the same work; the i-th of both ran one after the other. At least one pair.
        seed: of the resampling.
    """
    log_P = np.log(np.asarray(base, float)) - np.log(np.asarray(current, float))
    pairs = len(log_P)
    picks_RP = np.random.default_rng(seed).integers(0, pairs, (RESAMPLES, pairs))
    low, high = np.percentile(np.median(log_P[picks_RP], axis=1), [2.5, 97.5])
    return Interval(*(float(np.exp(x)) for x in (np.median(log_P), low, high)), pairs)


def side_of(times: Interval, threshold: float) -> str:
    """FASTER or SLOWER where the whole interval lies beyond the threshold, otherwise SAME."""
    if times.high < 1 / (1 + threshold):
        return SLOWER
    return FASTER if times.low > 1 + threshold else SAME


def judge(rounds: Sequence[Mapping[str, Any]], threshold: float) -> Judgement:
    """Judge a benchmark.

    Args:
        rounds: each has `base` and `current`, and these have `seconds` and `calibration` (seconds by name).
        threshold: the share by which the slower side must take longer for the difference to count.
    """
    times = paired(*([each[side]["seconds"] for each in rounds] for side in ("base", "current")))
    calibration = {
        name: paired(*([each[side]["calibration"][name] for each in rounds] for side in ("base", "current")))
        for name in rounds[0]["base"]["calibration"]
    }
    drifted = tuple(name for name, arm in calibration.items() if side_of(arm, threshold / 2) != SAME)
    return Judgement(VOID if drifted else side_of(times, threshold), times, calibration, drifted)


def counts_that_differ(
    base: Mapping[str, int] | None, current: Mapping[str, int] | None
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Of what both sides have counted: that of which the current side has more, and fewer."""
    both = {name: (base[name], current[name]) for name in base if name in current} if base and current else {}
    more = {name: pair for name, pair in both.items() if pair[1] > pair[0]}
    return more, {name: pair for name, pair in both.items() if pair[1] < pair[0]}
