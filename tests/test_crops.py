"""Crop boxes: the slow reference's with the same draws, torchvision's in distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from mvp_fast.samples.crops import ATTEMPTS, central_boxes, crop_boxes, flips
from mvp_fast.samples.random import Stream, draws

DRAWS = 20_000
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
Box = tuple[int, int, int, int]


def our_boxes(
    width: int, height: int, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO, count: int = DRAWS
) -> np.ndarray:
    """(count, 4): x, y, width, height."""
    position_B = np.arange(count)
    sizes = np.full(count, width, np.int32), np.full(count, height, np.int32)
    boxes = crop_boxes(11, np.zeros(count, np.int64), position_B, *sizes, scale, ratio)
    assert all(column.dtype == np.int32 for column in boxes)
    return np.stack(boxes, axis=1)


def torchvision_boxes(
    width: int, height: int, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO, count: int = DRAWS
) -> np.ndarray:
    image = torch.empty((1, height, width), device="meta")
    torch.manual_seed(4)
    rows = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    return np.array(rows)[:, [1, 0, 3, 2]]


def slow_box(
    seed: int,
    epoch: int,
    position: int,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Box, int]:
    """One box in plain Python, and the attempt that gave it (ATTEMPTS: the central one)."""
    for attempt in range(ATTEMPTS):
        words = [int(word) for word in draws(seed, Stream.CROP, epoch, position, attempt)[0]]
        area = width * height * (scale[0] + words[0] / 2**32 * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + words[1] / 2**32 * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (words[3] * (width - w + 1) // 2**32, words[2] * (height - h + 1) // 2**32, w, h), attempt
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return ((width - w) // 2, (height - h) // 2, w, h), ATTEMPTS


def test_agrees_with_the_reference_on_every_attempt() -> None:
    rng = np.random.default_rng()
    seen = np.zeros(ATTEMPTS + 1, int)
    for scale, ratio in [(SCALE, RATIO), ((0.08, 1.0), RATIO), ((0.9, 1.0), (0.4, 0.6)), ((0.3, 0.3), (1.0, 1.0))]:
        seed, n = int(rng.integers(0, 2**63)), 400
        epoch_B, position_B = rng.integers(0, 2**32, n), rng.integers(0, 2**40, n)
        width_B, height_B = (np.exp(rng.uniform(0, 8, n)).astype(np.int32) for _ in range(2))
        boxes = np.stack(crop_boxes(seed, epoch_B, position_B, width_B, height_B, scale, ratio), axis=1)
        for b in range(n):
            case = (seed, int(epoch_B[b]), int(position_B[b]), int(width_B[b]), int(height_B[b]), scale, ratio)
            wanted, attempt = slow_box(*case)
            assert tuple(boxes[b].tolist()) == wanted, case
            seen[attempt] += 1
    assert seen.all(), "every attempt and the fallback were reached"


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (1000, 120), (90, 700)])
def test_distribution_is_torchvisions(width: int, height: int) -> None:
    ours, theirs = our_boxes(width, height), torchvision_boxes(width, height)
    for x, y, w, h in (ours.T, theirs.T):
        assert (x >= 0).all()
        assert (y >= 0).all()
        assert (x + w <= width).all()
        assert (y + h <= height).all()
    same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    for axis in range(4):
        same_distribution(ours[:, axis], theirs[:, axis])
    for axis, side in ((0, width), (1, height)):  # where in its slack a box sits
        positions = [boxes[:, axis] / np.maximum(side - boxes[:, axis + 2], 1) for boxes in (ours, theirs)]
        same_distribution(*positions)


@pytest.mark.parametrize(("width", "height"), [(2, 2), (3, 2), (2, 5), (4, 4)])
def test_joint_distribution_on_tiny_images_is_torchvisions(width: int, height: int) -> None:
    """So few boxes are possible that all can be counted, positions and sizes together."""
    ours, theirs = our_boxes(width, height), torchvision_boxes(width, height)
    codes = [boxes @ 8 ** np.arange(4) for boxes in (ours, theirs)]
    assert set(codes[0]) == set(codes[1])
    kinds = np.unique(np.concatenate(codes))
    table = np.array([[(code == kind).sum() for kind in kinds] for code in codes])
    table = table[:, table.sum(axis=0) >= 10]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(("width", "height"), [(5000, 1), (1, 5000), (1, 1), (5000, 40)])
def test_extreme_images_are_exactly_torchvisions(width: int, height: int) -> None:
    """One box is possible: the fallback, or the only pixel."""
    ours, theirs = our_boxes(width, height, count=2000), torchvision_boxes(width, height, count=100)
    assert len(np.unique(theirs, axis=0)) == 1
    assert np.array_equal(np.unique(ours, axis=0), theirs[:1])


def test_fallback_is_exactly_torchvisions() -> None:
    rng = np.random.default_rng()
    too_large = (50.0, 60.0)  # no attempt fits
    for ratio in (RATIO, (0.5, 0.9), (1.2, 3.0), (1.0, 1.0)):
        for _ in range(50):
            width, height = (int(math.exp(rng.uniform(2, 8))) for _ in range(2))
            wanted = torchvision_boxes(width, height, too_large, ratio, count=1)
            assert np.array_equal(our_boxes(width, height, too_large, ratio, count=1), wanted), (width, height, ratio)


def test_fallback_has_a_pixel() -> None:
    one = np.array([1])
    assert [int(side[0]) for side in central_boxes(one, one, (3.0, 4.0))] == [0, 0, 1, 1]
    assert [int(side[0]) for side in central_boxes(one, one, (0.2, 0.3))] == [0, 0, 1, 1]


def test_no_rows() -> None:
    nothing, sizes = np.empty(0, np.int64), np.empty(0, np.int32)
    assert [len(column) for column in crop_boxes(0, nothing, nothing, sizes, sizes, SCALE, RATIO)] == [0] * 4


def test_flips() -> None:
    epoch_B, position_B = np.zeros(40_000, np.int64), np.arange(40_000)
    for probability in (0.5, 0.1):
        count = int(flips(2, epoch_B, position_B, probability).sum())
        assert stats.binomtest(count, len(position_B), probability).pvalue > 1e-4
    assert not flips(2, epoch_B, position_B, 0.0).any()
    assert flips(2, epoch_B, position_B, 1.0).all()
    words = draws(2, Stream.FLIP, epoch_B, position_B, 0)[:, 0]
    assert np.array_equal(flips(2, epoch_B, position_B, 0.25), words < 2**30)
