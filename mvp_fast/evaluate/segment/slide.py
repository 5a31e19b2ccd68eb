"""Slide inference: an image of any size is judged window by window, and scores are averaged where windows overlap.

Shape legend: H and W pixels of an image, C classes, K windows, S pixels along a side of a window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scorer = Callable[[Tensor], Tensor]
"""From images (K, S, S, 3) to scores of the classes for each pixel, float32 (K, C, S, S)."""


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the edge.

    Args:
        length: of the side, at least `size`.
        size: of a window.
        stride: at most `size`.
    """
    count = -(-(length - size) // stride) + 1
    return [min(number * stride, length - size) for number in range(count)]


def slide_scores(score: Scorer, image_HWC: Tensor, size: int, stride: int, batch: int) -> Tensor:
    """Scores of the classes for each pixel of an image, the mean over the windows that it lies in: float32 (C, H, W).

    Args:
        score: the network.
        image_HWC: at least `size` pixels high and wide, on the network's device.
        size, stride: of the windows, pixels.
        batch: windows that are scored at once.
    """
    height, width, _ = image_HWC.shape
    places = [(y, x) for y in window_starts(height, size, stride) for x in window_starts(width, size, stride)]
    total_CHW = None
    counts_HW = image_HWC.new_zeros((height, width), dtype=torch.float32)
    for first in range(0, len(places), batch):
        these = places[first : first + batch]
        windows_KSSC = torch.stack([image_HWC[y : y + size, x : x + size] for y, x in these])
        scores_KCSS = score(windows_KSSC)
        if total_CHW is None:
            total_CHW = scores_KCSS.new_zeros((scores_KCSS.shape[1], height, width), dtype=torch.float32)
        for (y, x), scores_CSS in zip(these, scores_KCSS, strict=True):
            total_CHW[:, y : y + size, x : x + size] += scores_CSS
            counts_HW[y : y + size, x : x + size] += 1
    assert total_CHW is not None
    return total_CHW.div_(counts_HW)


def predict(scores_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel of an image `size` pixels high and wide, to which the scores are scaled: int64."""
    if scores_CHW.shape[1:] != size:
        scores_CHW = F.interpolate(scores_CHW[None], size=size, mode="bilinear", align_corners=False)[0]
    return scores_CHW.argmax(dim=0)
