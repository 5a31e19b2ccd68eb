"""Histograms of oriented gradients (Dalal and Triggs 2005) as the target, as in MaskFeat (arXiv 2112.09133).

The variant is that of scikit-image's `hog` on each colour by itself, with 9 orientations, cells of 8 x 8 pixels, blocks
of one cell and the norm "L2": centred differences [-1, 0, 1] that are 0 across the image's border, unsigned directions,
each pixel's magnitude into the one bin of its direction, no window, and each histogram over the root of the sum of its
squares + 1e-10. (MaskFeat's public code has Sobel's filters in place of the differences.)

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch, M tokens in the loss, D features;
in a patch Y and X cells down and across, S pixels of a cell's side; O orientations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.base import EXACT_MEAN, EXACT_STD, Teacher, fingerprint
from mvp_kernels import dispatch

ORIENTATIONS = 9  # bins of 20 degrees
CELL = 8  # pixels
COLOURS = 3
EPS = 1e-5  # of magnitudes, pixel values being in [0, 1)


class HogTeacher(Teacher):
    """Target of a patch: the histograms of its cells, ordered colour, cell row, cell column, orientation.

    108 values a patch of 16 pixels. A cell of one colour yields zeros. Always float32 (float64 for float64 patches).

    Args:
        grid: the student's patches down and across.
        patch_size: the student's, pixels; a multiple of 8.
        impl: implementation of mvp_kernels.

    Raises:
        ConfigError: patches can't be cut into cells.
    """

    def __init__(self, *, grid: tuple[int, int], patch_size: int, impl: str = "auto") -> None:
        if patch_size % CELL:
            raise ConfigError(
                f"The student's patches of {patch_size} px can't be cut into HOG's cells of {CELL} px",
                where="teacher.kind is hog",
                fix=f"Take a student with patches of a multiple of {CELL} px, such as beitv2_base_patch16_224",
            )
        description = {"kind": "hog", "orientations": ORIENTATIONS, "cell": CELL, "eps": EPS, "gradient": "centred"}
        super().__init__(
            words=f"HOG, {ORIENTATIONS} orientations, cells of {CELL} px",
            fingerprint=fingerprint({**description, "grid": grid, "patch_size": patch_size}, {}),
            width=COLOURS * ORIENTATIONS * (patch_size // CELL) ** 2,
            grid=grid,
            patch_size=patch_size,
            has_cls=False,
            impl=impl,
        )

    def normalization(self) -> dispatch.Normalization:
        """(value - 128) / 256, float32 whatever autocast says: histograms see neither offset nor scale."""
        return dispatch.Normalization((EXACT_MEAN,) * COLOURS, (EXACT_STD,) * COLOURS, torch.float32)

    @torch.no_grad()
    def forward(self, patches_BNP: Tensor, index_BM: Tensor) -> Tensor:
        """See `Teacher.forward`. Gradients are of the whole image, histograms of the tokens in the loss alone."""
        with torch.autocast(patches_BNP.device.type, enabled=False):
            magnitude_BCHW, bin_BCHW = gradients(self._image(patches_BNP))
            # One gather takes both of a patch.
            both_BNP = torch.cat((self._cut(magnitude_BCHW), self._cut(bin_BCHW)), dim=-1)
            taken_BMP = dispatch.masked_gather(both_BNP, index_BM - 1, impl=self.impl)
            return self._histograms(*taken_BMP.chunk(2, dim=-1))

    def _image(self, patches_BNP: Tensor) -> Tensor:
        """The image that was cut."""
        size = self.patch_size
        x_BYXCSS = patches_BNP.unflatten(2, (COLOURS, size, size)).unflatten(1, self.grid)
        image_BCHW: Tensor = x_BYXCSS.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image_BCHW

    def _cut(self, x_BCHW: Tensor) -> Tensor:
        """Patches of an image, in the order of `patchify`."""
        size = self.patch_size
        x_BCYSXS = x_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches_BNP: Tensor = x_BCYSXS.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return patches_BNP

    def _histograms(self, magnitude_BMP: Tensor, bin_BMP: Tensor) -> Tensor:
        cells = self.patch_size // CELL
        shape = (COLOURS, cells, CELL, cells, CELL)
        magnitude, chosen = magnitude_BMP.unflatten(-1, shape), bin_BMP.unflatten(-1, shape)
        # A pass for each bin gives the same sums every time; adding by index has no fixed order on a GPU.
        sums = [magnitude.masked_fill(chosen != number, 0.0).mean((-3, -1)) for number in range(ORIENTATIONS)]
        histogram_BMCYXO = torch.stack(sums, dim=-1)
        length = (histogram_BMCYXO.square().sum(-1, keepdim=True) + EPS**2).sqrt()
        return (histogram_BMCYXO / length).flatten(2)


def gradients(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's magnitude, and the number of its direction's bin as a float.

    A direction and its opposite are one: it is turned into [0, 180) degrees before the angle is taken, so that 180
    degrees are exactly 0.
    """
    down = F.pad(x_BCHW[:, :, 2:] - x_BCHW[:, :, :-2], (0, 0, 1, 1))
    across = F.pad(x_BCHW[..., 2:] - x_BCHW[..., :-2], (1, 1))
    turned = (down < 0) | ((down == 0) & (across < 0))
    angle = torch.atan2(down.where(~turned, -down), across.where(~turned, -across))
    number = (angle / math.pi * ORIENTATIONS).floor().clamp(max=ORIENTATIONS - 1)
    return torch.hypot(down, across), number
