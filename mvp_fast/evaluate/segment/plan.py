"""The sample plan of segmentation: each image scaled by a random factor, and a crop of fixed size cut from it.

With a factor r, an image whose shorter side is s is scaled to r times its base size (segment.shorter_side, or its own
size, and at least a crop), and data.image_size pixels of it are kept. As every plan's boxes lie in the stored image, a
crop that would exceed the scaled image is cut at its edge, on each axis, and filled out by the resize; the box's
aspect ratio stays within data.crop_ratio (3/4 to 4/3 unless set). mmsegmentation's pipeline pads there with pixels that
are ignored; and it draws a crop anew where one class fills more than three quarters of it, which no plan can know.

Shape legend: B rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.samples.crops import flips
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from mvp_fast.samples.random import Stream, below, draws

VERSION = 1
"""Changes whenever the same settings would give other boxes."""


class SegmentPlan(SamplePlan):
    """Crops of scaled images; nothing is masked.

    Args:
        index: the images.
        seed, batch_size, rank, world: as in SamplePlan.
        data: image_size, crop_ratio, flip, order, shuffle_window and repeat are used.
        scale: least and greatest factor.
        shorter_side: base length of the shorter side, pixels; 0 for each image's own.
        patch_size: must divide data.image_size.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        batch_size: int,
        data: DataConfig,
        scale: tuple[float, float],
        shorter_side: int = 0,
        patch_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.scale, self.shorter_side = scale, shorter_side
        super().__init__(
            index,
            seed=seed,
            batch_size=batch_size,
            data=data,
            mask=MaskConfig(patches=0),
            patch_size=patch_size,
            rank=rank,
            world=world,
        )

    def part(self, rank: int, world: int) -> SegmentPlan:
        """The same plan for another rank of another number."""
        return SegmentPlan(
            self.index,
            seed=self.seed,
            batch_size=self.batch_size,
            data=self.data,
            scale=self.scale,
            shorter_side=self.shorter_side,
            patch_size=self.patch_size,
            rank=rank,
            world=world,
        )

    def state(self) -> dict[str, object]:
        """The plan's identity, JSON-able."""
        scale = [float(factor) for factor in self.scale]
        return {**super().state(), "segment": VERSION, "scale": scale, "shorter_side": self.shorter_side}

    def _rows(
        self,
        epoch_B: npt.NDArray[np.int64],
        position_B: npt.NDArray[np.int64],
        sample_B: npt.NDArray[np.int64],
        attempt: int,
    ) -> PlanRows:
        image_w, image_h = (sizes[sample_B].astype(np.int64) for sizes in (self.index.width, self.index.height))
        words_B4 = draws(self.seed, Stream.CROP, epoch_B, position_B, 0)
        base_B = base_scale(np.minimum(image_w, image_h), self.image_size, self.shorter_side)
        factor_B = self.scale[0] + words_B4[:, 0] * 2.0**-32 * (self.scale[1] - self.scale[0])
        side_B = self.image_size / (base_B * factor_B)
        w_B, h_B = np.minimum(side_B, image_w), np.minimum(side_B, image_h)
        low, high = self.data.crop_ratio
        w_B, h_B = np.minimum(w_B, h_B * high), np.minimum(h_B, w_B / low)
        w_B, h_B = (np.maximum(np.rint(length), 1).astype(np.int64) for length in (w_B, h_B))
        rows, (side, _) = len(sample_B), self.grid
        return PlanRows(
            epoch_B,
            position_B,
            sample_B,
            below(words_B4[:, 1], image_w - w_B + 1).astype(np.int32),
            below(words_B4[:, 2], image_h - h_B + 1).astype(np.int32),
            w_B.astype(np.int32),
            h_B.astype(np.int32),
            flips(self.seed, epoch_B, position_B, self.data.flip),
            np.zeros((rows, side * side), dtype=np.bool_),
            np.full(rows, attempt, dtype=np.int32),
        )


def base_scale(shorter_B: npt.NDArray[np.int64], image_size: int, shorter_side: int) -> npt.NDArray[np.float64]:
    """By what an image is scaled before crops or windows of `image_size` are cut from it: float64 (B,).

    Args:
        shorter_B: its shorter side, pixels.
        image_size: side of a crop or window, which fits into every scaled image.
        shorter_side: what the shorter side is scaled to, at least; 0 for its own length.
    """
    wanted_B = np.full(len(shorter_B), shorter_side) if shorter_side else shorter_B
    scale_B: npt.NDArray[np.float64] = np.maximum(wanted_B, image_size) / shorter_B
    return scale_B
