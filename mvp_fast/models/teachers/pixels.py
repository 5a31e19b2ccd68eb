"""Raw pixels as the target, as in MAE (arXiv 2111.06377): each patch normalised by its own mean and deviation.

Shape legend: B images, N patches, P pixel values a patch, M tokens in the loss.
"""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mvp_fast.models.teachers.base import Teacher, fingerprint
from mvp_kernels import dispatch

EPS = 1e-6


class PixelTeacher(Teacher):
    """Target of a patch: its P values with ImageNet's colour statistics, less their mean, over the root of their
    variance (of P - 1 degrees of freedom) + 1e-6. Always float32 (float64 for float64 patches).

    Args:
        grid: the student's patches down and across.
        patch_size: the student's, pixels.
        impl: implementation of mvp_kernels.
    """

    def __init__(self, *, grid: tuple[int, int], patch_size: int, impl: str = "auto") -> None:
        description = {"kind": "pixels", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "eps": EPS}
        super().__init__(
            words="pixels, normalised per patch",
            fingerprint=fingerprint({**description, "grid": grid, "patch_size": patch_size}, {}),
            width=3 * patch_size**2,
            grid=grid,
            patch_size=patch_size,
            has_cls=False,
            impl=impl,
        )

    def normalization(self) -> dispatch.Normalization:
        """ImageNet's statistics, float32 whatever autocast says."""
        return dispatch.Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.float32)

    @torch.no_grad()
    def forward(self, patches_BNP: Tensor, index_BM: Tensor) -> Tensor:
        """See `Teacher.forward`; a patch without any variance yields zeros."""
        x_BMP = dispatch.masked_gather(patches_BNP, index_BM - 1, impl=self.impl)
        variance_BM1, mean_BM1 = torch.var_mean(x_BMP, dim=-1, keepdim=True)
        return (x_BMP - mean_BM1) / (variance_BM1 + EPS).sqrt()
