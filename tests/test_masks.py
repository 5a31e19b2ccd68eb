"""Block-wise masks: the slow reference's with the same draws, and what they look like."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage, stats

from mvp_fast.config.schema import MaskConfig
from mvp_fast.samples.masks import ATTEMPTS, block_masks
from mvp_fast.samples.random import Stream, draws

BEIT = MaskConfig()
Words = Callable[[Stream, int], list[int]]


def slow_mask(words: Words, grid: tuple[int, int], config: MaskConfig) -> tuple[np.ndarray, int]:
    """One mask in plain Python from a source of blocks of four words, and how many patches were filled in singly."""
    rows, columns = grid
    masked: set[tuple[int, int]] = set()
    failed = block = 0
    while len(masked) < config.patches and failed < ATTEMPTS:
        area_word, aspect_word, top_word, left_word = words(Stream.MASK, block)
        block, failed = block + 1, failed + 1
        remaining = config.patches - len(masked)
        area = config.min_block + area_word / 2**32 * (remaining - config.min_block)
        bound = -math.log(config.min_aspect)
        aspect = math.exp(-bound + aspect_word / 2**32 * (2 * bound))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < rows and w < columns:
            top, left = top_word * (rows - h + 1) // 2**32, left_word * (columns - w + 1) // 2**32
            new = set(itertools.product(range(top, top + h), range(left, left + w))) - masked
            if 0 < len(new) <= remaining:
                masked |= new
                failed = 0
    free = [patch for patch in range(rows * columns) if divmod(patch, columns) not in masked]
    filled = config.patches - len(masked)
    for i in range(filled):
        j = i + words(Stream.MASK_FILL, i // 4)[i % 4] * (len(free) - i) // 2**32
        free[i], free[j] = free[j], free[i]
    mask = np.zeros(rows * columns, bool)
    mask[[y * columns + x for y, x in masked] + free[:filled]] = True
    return mask, filled


def philox_words(seed: int, epoch: int, position: int) -> Words:
    return lambda stream, block: [int(word) for word in draws(seed, stream, epoch, position, block)[0]]


def test_agrees_with_the_reference() -> None:
    rng = random.Random()
    cases = [((14, 14), BEIT)] * 20 + [((16, 16), MaskConfig(patches=120)), ((14, 14), MaskConfig(patches=196))]
    for _ in range(40):
        grid = rng.randint(1, 32), rng.randint(1, 32)
        patches = rng.randint(0, grid[0] * grid[1])
        cases.append((grid, MaskConfig(patches, rng.choice([1, 4, 16, 50]), rng.choice([0.05, 0.3, 1.0]))))
    in_rectangles = in_fill = 0
    for grid, config in cases:
        seed, epoch, position = rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(62)
        wanted, filled = slow_mask(philox_words(seed, epoch, position), grid, config)
        found = block_masks(seed, epoch, position, grid, config)
        assert np.array_equal(found, wanted[None]), (seed, epoch, position, grid, config)
        in_fill += filled
        in_rectangles += config.patches - filled
    assert in_rectangles
    assert in_fill


def test_every_row_has_its_own_coordinates() -> None:
    epoch_B, position_B = np.array([0, 0, 2**32 - 1, 3]), np.array([0, 2**40, 0, 5])
    together = block_masks(8, epoch_B, position_B, (14, 14), BEIT)
    for b in range(4):
        assert np.array_equal(together[b : b + 1], block_masks(8, epoch_B[b], position_B[b], (14, 14), BEIT))
    assert len(np.unique(together, axis=0)) == 4


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (14, 14), (16, 24), (32, 32)])
def test_any_count_is_exact(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    for count in sorted({*range(min(patches, 20)), patches // 3, patches // 2, patches - 1, patches}):
        found = block_masks(1, 0, np.arange(20), grid, MaskConfig(patches=count))
        assert found.dtype == np.bool_
        assert found.shape == (20, patches)
        assert (found.sum(axis=1) == count).all()


def test_beits_masks_have_75_patches_always() -> None:
    assert (block_masks(0, 0, np.arange(200_000), (14, 14), BEIT).sum(axis=1) == 75).all()


def test_every_patch_is_masked_with_a_sensible_frequency() -> None:
    """Symmetric in both axes and their exchange; the middle more often than the rim, which fewer rectangles reach."""
    count = 50_000
    share = block_masks(0, 1, np.arange(count), (14, 14), BEIT).mean(axis=0).reshape(14, 14)
    assert share.mean() == pytest.approx(75 / 196)
    noise = 5 * math.sqrt(2 * 0.25 / count)
    for other in (share[::-1], share[:, ::-1], share.T):
        assert abs(share - other).max() < noise
    assert np.unravel_index(share.argmin(), share.shape) in {(0, 0), (0, 13), (13, 0), (13, 13)}
    assert share.min() > 0.03
    assert share.max() < 0.8
    rim = np.ones((14, 14), bool)
    rim[2:-2, 2:-2] = False
    assert share[rim].mean() < share[4:10, 4:10].mean()


def test_masks_are_blocks() -> None:
    """Few pieces, unlike patches drawn singly; at least one whole rectangle of 16 patches or more in every mask."""
    masks = block_masks(3, 0, np.arange(300), (14, 14), BEIT).reshape(-1, 14, 14)
    pieces = np.array([ndimage.label(mask)[1] for mask in masks])
    rng = np.random.default_rng(0)
    single = [ndimage.label(rng.permutation(196).reshape(14, 14) < 75)[1] for _ in range(300)]
    assert np.median(pieces) <= 4
    assert np.median(single) >= 10
    # 16 patches at aspect ratios in [0.3, 1 / 0.3]: 2 x 7 at the flattest.
    least = [(2, 7), (3, 5), (4, 4), (5, 3), (7, 2)]
    for mask in masks:
        assert any(ndimage.binary_erosion(mask, np.ones(sides)).any() for sides in least)


def test_distribution_is_that_of_independent_draws() -> None:
    """The same algorithm fed by Python's generator: as many single patches, pieces and masked neighbours."""
    rng = random.Random(5)
    reference = [slow_mask(lambda *_: [rng.getrandbits(32) for _ in range(4)], (14, 14), BEIT)[0] for _ in range(2000)]
    ours = block_masks(6, 0, np.arange(2000), (14, 14), BEIT)

    def features(mask: np.ndarray) -> tuple[int, int, int]:
        square = mask.reshape(14, 14)
        neighbours = int((square[1:] & square[:-1]).sum() + (square[:, 1:] & square[:, :-1]).sum())
        return neighbours, ndimage.label(square)[1], int(square[:7].sum())

    pairs = zip(zip(*map(features, ours), strict=True), zip(*map(features, reference), strict=True), strict=True)
    for found, wanted in pairs:
        assert stats.ks_2samp(found, wanted).pvalue > 1e-3


def test_filling_is_uniform_over_subsets() -> None:
    """No rectangle is smaller than a grid of one row, so all patches are filled in singly: 56 subsets."""
    masks = block_masks(4, 0, np.arange(56_000), (1, 8), MaskConfig(patches=3, min_block=1))
    counts = np.unique(masks @ (1 << np.arange(8)), return_counts=True)[1]
    assert len(counts) == 56
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        ((0, 14), BEIT),
        ((4, 4), MaskConfig(patches=17)),
        ((4, 4), MaskConfig(patches=-1)),
        ((4, 4), MaskConfig(patches=4, min_block=0)),
        ((4, 4), MaskConfig(patches=4, min_aspect=0.0)),
        ((4, 4), MaskConfig(patches=4, min_aspect=1.1)),
        ((513, 512), MaskConfig(patches=4)),
    ],
)
def test_out_of_range(grid: tuple[int, int], config: MaskConfig) -> None:
    with pytest.raises(ValueError, match=r"do not fit|out of range"):
        block_masks(0, 0, 0, grid, config)


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (2**32, 0), (0, -1)])
def test_epoch_or_position_out_of_range(epoch: int, position: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        block_masks(0, epoch, position, (14, 14), BEIT)


def test_no_rows() -> None:
    assert block_masks(0, 0, np.empty(0, np.int64), (14, 14), BEIT).shape == (0, 196)
