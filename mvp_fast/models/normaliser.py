"""Pixels as a network of timm or open_clip takes them, where it cuts its patches itself.

Shape legend: B images, H and W pixels, C colours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normaliser(nn.Module):
    """Crops to float32 (B, C, H, W), normalised. Its statistics lie on its device, so that no step brings them there.

    Args:
        mean, std: of values in [0, 1].
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean_C", 255 * torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", 255 * torch.tensor(std), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """The crops, colours from 0 to 255 of any type."""
        return ((images_BHWC - self.mean_C) / self.std_C).permute(0, 3, 1, 2)
