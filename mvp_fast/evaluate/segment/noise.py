"""What is random in a training step beside the crops: colours, stochastic depth, dropped channels.

All of it is a pure function of seed, epoch and position, as the plan is: ranks, micro-batches and resumed runs agree.

Shape legend: B images, H and W pixels, C colours, D channels, L blocks, S branches of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mvp_fast.evaluate.segment.network import Noise
from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, uniforms
from mvp_fast.train.drop_path import scales, to_device

# Greatest change of each, as in mmsegmentation's PhotoMetricDistortion (its hue: 18 of 180).
CHANGES = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}


def draw_noise(
    rows: PlanRows, rates: Sequence[float], channels: Sequence[int], dropout: float, seed: int, device: torch.device
) -> Noise:
    """What a step on these rows drops.

    Args:
        rates: of the blocks.
        channels: before the last layer of the decoder's head and of the auxiliary one.
        dropout: share of them that is dropped, in [0, 1).
    """
    parts: list[Tensor | None] = [scales(rows, rates, seed) if any(rates) else None, None, None]
    if dropout:
        numbers_BX = uniforms(seed, Stream.SEGMENT_DROPOUT, rows.epoch_B, rows.position_B, sum(channels))
        scale_BX = np.where(numbers_BX < 1 - dropout, 1 / (1 - dropout), 0.0).astype(np.float32)
        for place, (first, end) in enumerate(pairwise([0, channels[0], sum(channels)])):
            parts[1 + place] = torch.from_numpy(scale_BX[:, first:end].copy())
    moved = iter(to_device([part for part in parts if part is not None], device))
    return Noise(*[None if part is None else next(moved) for part in parts])


def slice_noise(noise: Noise, these: slice) -> Noise:
    """What a part of the batch drops."""
    branch_LSB, *heads = noise
    return Noise(
        None if branch_LSB is None else branch_LSB[:, :, these],
        *[None if scale_BD is None else scale_BD[these] for scale_BD in heads],
    )


def draw_colours(rows: PlanRows, seed: int) -> npt.NDArray[np.float64]:
    """For each image the factors of brightness, contrast and saturation (1: none) and the shift of hue (0): (B, 4)."""
    numbers_B8 = uniforms(seed, Stream.SEGMENT_COLOUR, rows.epoch_B, rows.position_B, 2 * len(CHANGES))
    change_B4 = np.array(list(CHANGES.values())) * (2 * numbers_B8[:, 1::2] - 1)
    drawn_B4 = np.where(numbers_B8[:, ::2] < 0.5, change_B4, 0.0)
    colours_B4: npt.NDArray[np.float64] = drawn_B4 + np.array([1.0, 1.0, 1.0, 0.0])
    return colours_B4


def change_colours(images_BHWC: Tensor, colours_B4: npt.NDArray[np.float64]) -> Tensor:
    """Photometric distortion, by torchvision's functions, on the images' device.

    Args:
        images_BHWC: uint8.
        colours_B4: from `draw_colours`.

    Returns:
        float32, 0 to 255, as `images_BHWC` shaped.
    """
    unit_BCHW = images_BHWC.permute(0, 3, 1, 2).float() / 255
    changed = []
    for image_CHW, (brightness, contrast, saturation, hue) in zip(unit_BCHW, colours_B4.tolist(), strict=True):
        if brightness != 1:
            image_CHW = F.adjust_brightness(image_CHW, brightness)
        if contrast != 1:
            image_CHW = F.adjust_contrast(image_CHW, contrast)
        if saturation != 1:
            image_CHW = F.adjust_saturation(image_CHW, saturation)
        if hue != 0:
            image_CHW = F.adjust_hue(image_CHW, hue)
        changed.append(image_CHW)
    return 255 * torch.stack(changed).permute(0, 2, 3, 1)
