"""What a teacher is: a frozen map from crops to a target feature of each token in the loss.

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch (C * patch * patch, ordered colour,
row, column), M tokens in the loss, D channels of a feature.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.errors import ConfigError
from mvp_kernels import dispatch

# (value - 128) / 256 as a normalisation of value / 255: float32 and eight bits hold it, so nothing is rounded.
EXACT_MEAN, EXACT_STD = 128 / 255, 256 / 255
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Teacher(nn.Module, ABC):
    """`teacher(teacher.patches(images_BHWC), index_BM) -> features_BMD`, without a gradient.

    A call does all its work on the current stream, the same for any values, without waiting for the device: it can be
    captured in a CUDA graph.

    Args and attributes:
        words: what it is, for people.
        fingerprint: sha256 over all that decides the features; a run goes on only against the same.
        width: D, channels of a feature.
        grid: patches down and across, the student's.
        patch_size: side of a patch, pixels.
        has_cls: whether there is a feature of token 0, the CLS token.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Attributes:
        dtype: that it computes in.
    """

    def __init__(
        self,
        *,
        words: str,
        fingerprint: str,
        width: int,
        grid: tuple[int, int],
        patch_size: int,
        has_cls: bool,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.words, self.fingerprint, self.width = words, fingerprint, width
        self.grid, self.patch_size, self.has_cls, self.impl = grid, patch_size, has_cls, impl
        self.dtype = torch.float32

    @property
    def input_size(self) -> tuple[int, int]:
        """Pixels down and across that it sees."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def lower(self, dtype: torch.dtype) -> Self:
        """Compute in float16 or bfloat16 from now on; a teacher without weights has nothing to gain and stays float32.

        Args:
            dtype: the type asked for.
        """
        return self

    @property
    def lowered(self) -> bool:
        """Whether it computes in a type of its own, whatever autocast says."""
        return self.dtype != torch.float32

    @abstractmethod
    def normalization(self) -> dispatch.Normalization:
        """How it wants its pixels, and in which type."""

    def patches(self, images_BHWC: Tensor) -> Tensor:
        """uint8 crops of any size to patches_BNP of `input_size`, normalised as `normalization` says."""
        images_BHWC = resize(images_BHWC, self.input_size)
        return dispatch.patchify(images_BHWC, self.patch_size, [self.normalization()], impl=self.impl)[0]

    @abstractmethod
    def forward(self, patches_BNP: Tensor, index_BM: Tensor) -> Tensor:
        """Features of the tokens in the loss.

        Args:
            patches_BNP: normalised patches of whole images, see `patches`.
            index_BM: int64 tokens: 0 is CLS (only where `has_cls`), 1 + n is patch n of the grid, row-major.

        Returns:
            features_BMD, without the objective's normalisation.
        """


def resize(images_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images, bicubic with antialiasing, on their own device; as they are where the size fits.

    The result is rounded to uint8, as CLIP's own preprocessing leaves it before it normalises.
    """
    if tuple(images_BHWC.shape[1:3]) == tuple(size):
        return images_BHWC
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    x_BCHW = F.interpolate(x_BCHW, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return x_BCHW.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def fingerprint(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """sha256 over what decides the features: shape and preprocessing as JSON, and every weight with its name.

    The model's name and the file are left out: the same weights from another place are the same teacher.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def teacher_dtype(precision: str, train_precision: str, device: torch.device) -> torch.dtype:
    """The type that a tower of this setting computes in (see TeacherConfig.precision)."""
    if precision != "auto":
        return PRECISIONS[precision]
    if train_precision == "fp32":
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def check_grid(name: str, patch: int, grid: tuple[int, int], image_size: int, fitting: str) -> None:
    """A tower never sees more pixels than the crops have.

    Args:
        name: the tower's.
        patch: side of its patches, pixels.
        grid: the student's.
        image_size: of the crops, pixels.
        fitting: of `such as ...`, which towers would fit.

    Raises:
        ConfigError: its grid can't be the student's.
    """
    greatest = image_size // max(grid)
    if patch > greatest:
        own = image_size // patch
        raise ConfigError(
            f"{name} has patches of {patch} px: {image_size} px crops give it a grid of {own}x{own}, the student has"
            f" {grid[0]}x{grid[1]}",
            where="teacher.name",
            fix=f"Take a teacher with patches of at most {greatest} px, such as {fitting}",
        )
