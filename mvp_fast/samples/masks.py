"""Block-wise masks: BEiT's rectangles (2106.08254, appendix; min. 16 patches, aspect ratio 0.3 to 1/0.3), completed to
an exact count as in BEiT v2 (2208.06366).

Until `count` patches are masked: draw a rectangle, its area uniform between `min_block` and what remains to be masked,
its aspect ratio log-uniform; one that is smaller than the grid on both sides goes to a uniform position and is taken if
it masks between 1 and all of the remaining patches anew. After 10 rectangles in a row that were not taken, the rest is
masked one patch at a time, at random.

Words of Philox block a of Stream.MASK: area, aspect ratio, top, left of rectangle a. Word i % 4 of block i // 4 of
Stream.MASK_FILL: the i-th single patch.

Shape legend: B samples, N patches (row-major over the grid).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mvp_fast.config.schema import MaskConfig
from mvp_fast.samples.compiled import compiled, philox4x32_scalar
from mvp_fast.samples.random import BLOCKS, Stream, key_words

ATTEMPTS = 10

_ATTEMPTS = ATTEMPTS
_BLOCKS = BLOCKS
_MASK = np.uint64(int(Stream.MASK) << 16)
_FILL = np.uint64(int(Stream.MASK_FILL) << 16)
_UNIT = 2.0**-32
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@compiled
def _below(word, bound):  # type: ignore[no-untyped-def]
    return np.int64((word * np.uint64(bound)) >> _SHIFT)


@compiled
def _rectangles(mask_N, k0, k1, epoch, position, grid_h, grid_w, count, min_block, log_aspect):  # type: ignore[no-untyped-def]
    """Mask rectangles until `count` is reached or ATTEMPTS in a row were not taken. Returns the patches masked."""
    low, high = position & _LOW, position >> _SHIFT
    masked, failed, block = 0, 0, 0
    # The blocks last for ATTEMPTS rectangles a patch on every grid of up to 80 x 80 patches.
    while masked < count and failed < _ATTEMPTS and block < _BLOCKS:
        r0, r1, r2, r3 = philox4x32_scalar(low, high, epoch, _MASK | np.uint64(block), k0, k1)
        block += 1
        failed += 1
        area = min_block + r0 * _UNIT * (count - masked - min_block)
        aspect = math.exp(-log_aspect + r1 * _UNIT * (2 * log_aspect))
        # np.rint rounds halves to even, as Python's round does.
        h = np.int64(np.rint(math.sqrt(area * aspect)))
        w = np.int64(np.rint(math.sqrt(area / aspect)))
        if h >= grid_h or w >= grid_w:
            continue
        top, left = _below(r2, grid_h - h + 1), _below(r3, grid_w - w + 1)
        new = 0
        for y in range(top, top + h):
            for x in range(left, left + w):
                new += not mask_N[y * grid_w + x]
        if new == 0 or new > count - masked:
            continue
        for y in range(top, top + h):
            for x in range(left, left + w):
                mask_N[y * grid_w + x] = True
        masked += new
        failed = 0
    return masked


@compiled
def _masks(k0, k1, epoch_B, position_B, grid_h, grid_w, count, min_block, log_aspect, mask_BN):  # type: ignore[no-untyped-def]
    patches = grid_h * grid_w
    free = np.empty(patches, np.int64)
    for b in range(position_B.size):
        mask_N, epoch, position = mask_BN[b], epoch_B[b], position_B[b]
        masked = _rectangles(mask_N, k0, k1, epoch, position, grid_h, grid_w, count, min_block, log_aspect)
        if masked == count:
            continue
        n_free = 0
        for patch in range(patches):
            if not mask_N[patch]:
                free[n_free] = patch
                n_free += 1
        low, high = position & _LOW, position >> _SHIFT
        for i in range(count - masked):  # the first steps of a Fisher-Yates shuffle of the free patches
            words = philox4x32_scalar(low, high, epoch, _FILL | np.uint64(i // 4), k0, k1)
            j = i + _below(words[i % 4], n_free - i)
            free[i], free[j] = free[j], free[i]
            mask_N[free[i]] = True


def block_masks(
    seed: int, epoch_B: npt.ArrayLike, position_B: npt.ArrayLike, grid: tuple[int, int], config: MaskConfig
) -> npt.NDArray[np.bool_]:
    """One block-wise mask a sample, with exactly `config.patches` patches masked.

    Args:
        seed: in [0, 2**64).
        epoch_B: epochs in [0, 2**32); broadcasts against `position_B`.
        position_B: positions in [0, 2**63).
        grid: rows and columns of patches.
        config: how many patches, the least area of a rectangle, and its aspect ratios.

    Returns:
        bool (B, N), N = rows * columns, true where masked.

    Raises:
        ValueError: an argument is out of range.
    """
    rows, columns = grid
    patches = rows * columns
    if rows < 1 or columns < 1 or patches > 4 * BLOCKS or not 0 <= config.patches <= patches:
        raise ValueError(f"{config.patches} masked patches do not fit a grid of {rows} x {columns}")
    if config.min_block < 1 or not 0 < config.min_aspect <= 1:
        raise ValueError(f"a rectangle of {config.min_block} patches, aspect ratio {config.min_aspect}: out of range")
    epoch, position = np.broadcast_arrays(np.atleast_1d(epoch_B), np.atleast_1d(position_B))
    if epoch.size and (epoch.min() < 0 or epoch.max() >= 1 << 32 or position.min() < 0):
        raise ValueError("an epoch is not in [0, 2**32) or a position is negative")
    k0, k1 = key_words(seed)
    mask_BN = np.zeros((len(position), patches), dtype=np.bool_)
    _masks(
        np.uint64(k0), np.uint64(k1), epoch.astype(np.uint64), position.astype(np.uint64),
        rows, columns, config.patches, config.min_block, -math.log(config.min_aspect), mask_BN,
    )  # fmt: skip
    return mask_BN
