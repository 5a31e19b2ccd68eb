"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).

A draw is a pure function of (seed, stream, epoch, position, block): nothing is kept between draws, so any sample's
randomness can be had in any order, on any rank, and again after a resume. The 128-bit counter is

    word 0    position, low 32 bits
    word 1    position, high 32 bits
    word 2    epoch
    word 3    stream << 16 | block

and the 64-bit key is the seed (word 0 its low half). Two different draws never share a counter.

Shape legend: B samples, 4 words of a block.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]

# The constants of Philox 4x32: two multipliers, and the Weyl increments of the key.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

BLOCKS = 1 << 16
"""Blocks in a stream for one (epoch, position)."""

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """What a draw is for. The numbers are part of the plan's identity: never reuse or renumber one."""

    ORDER = 1
    """Round functions of the epoch's permutation (position: a half of the element; block: the round)."""
    CROP = 2
    """Crop boxes (block: the attempt)."""
    FLIP = 3
    """Horizontal flips."""
    MASK = 4
    """Rectangles of the block-wise masks (block: the attempt)."""
    MASK_FILL = 5
    """Single patches that complete a mask (block: a quarter of the patch's number in the filling order)."""
    STAND_IN = 6
    """Replacements of samples that can't be decoded (block: the attempt)."""
    DROP_PATH = 7
    """Stochastic depth, two numbers a layer (block: a quarter of the number)."""
    SCENES = 8
    """The synthetic data set (epoch: the profile; position: the image; block: the purpose)."""
    SHARDS = 9
    """The permutation of an epoch's shards, as ORDER; the block after its rounds says where the epoch begins."""
    WINDOW = 10
    """The permutation within a window (position: a half of the element, and above its 32 bits the window's number)."""
    SUBSET = 11
    """Which samples of a class are among the labelled ones of an evaluation (position: the row)."""
    HELD_OUT = 12
    """Which training samples an evaluation holds out to choose by (position: the row)."""
    CAPTION = 16
    """Which of an image's captions it is matched with."""
    SEGMENT_COLOUR = 20
    """Colours of an image in segmentation, two numbers a change (block: a quarter of the number)."""
    SEGMENT_DROPOUT = 21
    """Dropped channels of the segmentation heads, one number a channel (block: a quarter of the number)."""
    RAND_AUGMENT = 30
    """Seeds of an image's RandAugment."""
    ERASING = 31
    """Seeds of an image's random erasing."""
    MIXUP = 32
    """Seeds of mixup and CutMix (epoch: 0; position: the step)."""


def philox4x32(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: tuple[npt.ArrayLike, npt.ArrayLike]
) -> tuple[UInt32Array, UInt32Array, UInt32Array, UInt32Array]:
    """Philox 4x32-10, vectorised.

    Args:
        counter: four arrays (or numbers) of uint32 that broadcast together.
        key: two uint32.

    Returns:
        four uint32 arrays of the broadcast shape; each word is uniform over [0, 2**32).
    """
    # uint64 throughout: a product of two words fits, and the halves come off by shift and mask.
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) for word in np.broadcast_arrays(*counter))
    k0, k1 = (np.asarray(word).astype(np.uint64) for word in key)
    m0, m1 = (np.uint64(m) for m in MULTIPLIERS)
    w0, w1 = (np.uint64(w) for w in INCREMENTS)
    low, shift = np.uint64(_WORD), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + w0) & low, (k1 + w1) & low
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def key_words(seed: int) -> tuple[int, int]:
    """The two key words of a seed, low half first.

    Raises:
        ValueError: the seed is not in [0, 2**64).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not in [0, 2**64)")
    return seed & _WORD, seed >> 32


def draws(seed: int, stream: Stream, epoch_B: npt.ArrayLike, position_B: npt.ArrayLike, block: int) -> UInt32Array:
    """One Philox block a sample.

    Args:
        seed: in [0, 2**64).
        stream: what the draw is for.
        epoch_B: epochs in [0, 2**32); broadcasts against `position_B`.
        position_B: positions within the epoch, in [0, 2**63).
        block: number of the block within the stream, in [0, 2**16).

    Returns:
        uint32 (B, 4), each word uniform over [0, 2**32).

    Raises:
        ValueError: seed, epoch, position or block out of range.
    """
    if not 0 <= block < BLOCKS:
        raise ValueError(f"block {block} is not in [0, {BLOCKS})")
    epoch, position = np.broadcast_arrays(np.atleast_1d(epoch_B), np.atleast_1d(position_B))
    if epoch.size and (epoch.min() < 0 or epoch.max() > _WORD):
        raise ValueError("an epoch is not in [0, 2**32)")
    if position.size and position.min() < 0:
        raise ValueError("a position is negative")
    position = position.astype(np.uint64)
    low, high = position & np.uint64(_WORD), position >> np.uint64(32)
    words = philox4x32((low, high, epoch, np.uint32(int(stream) << 16 | block)), key_words(seed))
    return np.stack(words, axis=-1)


def uniforms(
    seed: int, stream: Stream, epoch_B: npt.ArrayLike, position_B: npt.ArrayLike, count: int
) -> npt.NDArray[np.float64]:
    """`count` numbers a sample, uniform in [0, 1) in steps of 2**-32: the words of blocks 0, 1, ... in order.

    Arguments and errors as in `draws`; `count` is at least 1.

    Returns:
        float64 (B, count).
    """
    if count < 1:
        raise ValueError(f"{count} numbers a sample: at least 1 is needed")
    blocks = [draws(seed, stream, epoch_B, position_B, block) for block in range(-(-count // 4))]
    return np.concatenate(blocks, axis=-1)[:, :count].astype(np.float64) * 2.0**-32


def below(words_B: UInt32Array, bound_B: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integers in [0, bound), from one word each: floor(word * bound / 2**32).

    No value's probability is off by more than 2**-32, which no crop or mask can show.

    Args:
        words_B: uint32 words.
        bound_B: bounds in [1, 2**31].

    Returns:
        int64 of the broadcast shape.
    """
    bound = np.asarray(bound_B).astype(np.uint64)
    return ((words_B.astype(np.uint64) * bound) >> np.uint64(32)).astype(np.int64)
