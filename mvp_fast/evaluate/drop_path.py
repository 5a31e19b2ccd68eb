"""Stochastic depth of a timm model as the sample plan has it, in place of timm's own draws.

Shape legend: B images, N tokens, D channels, L blocks, S the two branches of a block (attention, MLP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvp_fast.errors import ConfigError

BRANCHES = ("drop_path1", "drop_path2")  # as timm's blocks call them


class PlannedDropPath(nn.Module):
    """Multiplies a branch by each image's factor in training; passes it on in evaluation.

    Attributes:
        scale_B: float32, 0 or 1 / keep, set before each forward pass.
    """

    scale_B: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.scale_B = None

    def forward(self, x_BND: Tensor) -> Tensor:
        """The scaled branch."""
        if not self.training or self.scale_B is None:
            return x_BND
        return x_BND * self.scale_B.to(x_BND.dtype)[:, None, None]


class PlannedDepth:
    """Puts a `PlannedDropPath` into both branches of a model's blocks.

    Args:
        model: timm's; changed in place.
        rate: of the last block, linear from 0 at the first.
        setting: what the rate is called, for messages.

    Attributes:
        rates: of the blocks; empty where the rate is 0 and nothing was changed.

    Raises:
        ConfigError: its blocks have no such branches.
    """

    def __init__(self, model: Any, rate: float, setting: str) -> None:
        self.rates: list[float] = []
        self._drops: list[tuple[PlannedDropPath, PlannedDropPath]] = []
        if not rate:
            return
        self.rates = torch.linspace(0, rate, len(model.blocks), dtype=torch.float64).tolist()  # as timm's
        for block in model.blocks:
            if not all(hasattr(block, name) for name in BRANCHES):
                raise ConfigError(
                    "The network's blocks have no stochastic depth",
                    where=f"{setting} {rate}",
                    fix=f"Set {setting} to 0, or take another model",
                )
            pair = PlannedDropPath(), PlannedDropPath()
            self._drops.append(pair)
            for name, drop in zip(BRANCHES, pair, strict=True):
                setattr(block, name, drop.train(block.training))

    def set(self, scale_LSB: Tensor) -> None:
        """Set the factors of a micro-batch; on the model's device."""
        for pair, scale_SB in zip(self._drops, scale_LSB.contiguous(), strict=True):
            for drop, scale_B in zip(pair, scale_SB, strict=True):
                drop.scale_B = scale_B
