"""Compositions that a training set never shows: (colour, shape) pairs that are held out, evenly over words.

A model that has learnt "red" and "square" apart should know a red square that it never saw; held-out pairs measure it.
"""

from __future__ import annotations

import math

import numpy as np

from mvp_fast.errors import ConfigError
from mvp_fast.samples.random import Stream, draws
from mvp_fast.samples.scenes.vocabulary import COLOURS, SHAPES, Pair, all_pairs

# Not the number of any profile, so that no scene's draw is used here.
_COMPOSITIONS = 1 << 16


def held_out_pairs(share: float = 0.2, seed: int = 0) -> frozenset[Pair]:
    """The pairs that are held out: the same number of every colour and of every shape.

    Colours and shapes are put in random order around two circles; colour number i does not meet the k shapes from
    number i on, k being the share of all shapes, rounded.

    Args:
        share: of all pairs; rounded to whole pairs a shape, at least one, and at least one is left.
        seed: decides which, in [0, 2**64).

    Raises:
        ConfigError: the share is not in (0, 1), or the seed out of range.
    """
    if not (math.isfinite(share) and 0 < share < 1):
        raise ConfigError(
            f"a share of {share} of the pairs can't be held out", where="--holdout-share", fix="take 0 to 1"
        )
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"the seed {seed} is not in [0, 2**64)", where="--holdout-seed", fix="take another")
    words = draws(seed, Stream.SCENES, _COMPOSITIONS, 0, 0)[0]
    rng = np.random.Generator(np.random.Philox(key=sum(int(word) << 32 * place for place, word in enumerate(words))))
    colours, shapes = (list(rng.permutation(sorted(names))) for names in (COLOURS, SHAPES))
    held = min(max(round(share * len(shapes)), 1), len(shapes) - 1)
    return frozenset(
        (str(colour), str(shapes[(number + step) % len(shapes)]))
        for number, colour in enumerate(colours)
        for step in range(held)
    )


def chosen_pairs(which: str, share: float = 0.2, seed: int = 0) -> frozenset[Pair] | None:
    """The pairs that a set's objects may have.

    Args:
        which: all, seen (all but the held-out ones) or held-out (those alone).
        share, seed: see `held_out_pairs`.

    Returns:
        None for all.
    """
    if which == "all":
        return None
    held = held_out_pairs(share, seed)
    return held if which == "held-out" else all_pairs() - held
