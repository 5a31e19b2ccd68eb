"""A teacher that is a frozen ViT: its patch embedding, and what computing in a type of its own takes.

Shape legend: B images, C colours, N patches, P pixel values a patch, M tokens in the loss, D channels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.models.patches import input_dtype
from mvp_fast.models.teachers.base import EXACT_MEAN, EXACT_STD, Teacher
from mvp_kernels import dispatch


class TowerTeacher(Teacher):
    """Patches through a linear layer, then `_features` of the tokens that this yields.

    Args:
        mean, std: colour statistics the tower was trained with, of values in [0, 1].
        others: see `Teacher`.

    Under autocast only a float32 tower follows autocast's type.
    """

    patch_weight_DP: Tensor
    patch_shift_D: Tensor

    def __init__(self, *, mean: tuple[float, ...], std: tuple[float, ...], **others: Any) -> None:
        super().__init__(**others)
        self.mean, self.std = mean, std

    @property
    @abstractmethod
    def embedding(self) -> nn.Conv2d:
        """The tower's own patch embedding."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The tower's blocks."""

    @abstractmethod
    def _features(self, x_BND: Tensor, index_BM: Tensor) -> Tensor:
        """From embedded patches on: features_BMD."""

    def lower(self, dtype: torch.dtype) -> Self:
        """Compute in float16 or bfloat16 from now on: all weights are cast, once.

        The colour statistics move into the patch embedding's weights (in float64, before the cast): it then takes
        (value - 128) / 256, which is exact in both types, where a normalised colour is rounded.
        """
        bias = self.embedding.bias
        weight_DCP = self.embedding.weight.double().flatten(2)
        mean_C1, std_C1 = (weight_DCP.new_tensor(values)[:, None] for values in (self.mean, self.std))
        weight_DCP = weight_DCP / std_C1
        shift_D = (weight_DCP * (EXACT_MEAN - mean_C1)).sum((1, 2))
        if bias is not None:
            shift_D = shift_D + bias.double()
        self.to(dtype)
        self.dtype = dtype
        self.register_buffer("patch_weight_DP", (weight_DCP * EXACT_STD).flatten(1).to(dtype), persistent=False)
        self.register_buffer("patch_shift_D", shift_D.to(dtype), persistent=False)
        return self

    def normalization(self) -> dispatch.Normalization:
        """How the tower wants its pixels, in the type that it computes in."""
        if self.lowered:
            colours = len(self.mean)
            return dispatch.Normalization((EXACT_MEAN,) * colours, (EXACT_STD,) * colours, self.dtype)
        return dispatch.Normalization(self.mean, self.std, input_dtype(self.embedding.weight))

    @torch.no_grad()
    def forward(self, patches_BNP: Tensor, index_BM: Tensor) -> Tensor:
        """See `Teacher.forward`; in `dtype`, or where that is float32 in the type that autocast makes of it."""
        if self.lowered:
            with torch.autocast(patches_BNP.device.type, enabled=False):
                return self._features(F.linear(patches_BNP, self.patch_weight_DP, self.patch_shift_D), index_BM)
        embedding = self.embedding
        return self._features(F.linear(patches_BNP, embedding.weight.flatten(1), embedding.bias), index_BM)
