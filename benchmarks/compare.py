"""Comparing two ways to do the same work on a noisy machine: taken in turn, judged by their medians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 4000


def ratio_of_medians(ours: Sequence[float], peer: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """How many times as fast ours is: median(peer) / median(ours), with a 95 % bootstrap interval.

    Args:
        ours, peer: seconds for the same work, taken in pairs: the i-th of both ran one after the other. Pairs are
            resampled together, so that a slow spell of the machine, which hits both, does not widen the interval.
        seed: of the resampling.

    Returns:
        ratio, low, high, pairs; with a single pair there is no interval (low and high are None).
    """
    times_2P = np.array([ours, peer], dtype=float)
    pairs = times_2P.shape[1]
    ratio = float(np.median(times_2P[1]) / np.median(times_2P[0]))
    if pairs < 2:
        return {"ratio": ratio, "low": None, "high": None, "pairs": pairs}
    picks_RP = np.random.default_rng(seed).integers(0, pairs, (RESAMPLES, pairs))
    medians_2R = np.median(times_2P[:, picks_RP], axis=2)
    low, high = np.percentile(medians_2R[1] / medians_2R[0], [2.5, 97.5])
    return {"ratio": ratio, "low": float(low), "high": float(high), "pairs": pairs}


def in_words(times: dict[str, Any]) -> str:
    """What `ratio_of_medians` found, for a line of text."""
    if times["low"] is None:
        return f"{times['ratio']:.2f} times as fast (one round: no interval)"
    return f"{times['ratio']:.2f} times as fast ({times['low']:.2f} to {times['high']:.2f}, {times['pairs']} pairs)"
