"""A plan without chance, for evaluation: every sample once in the index's order, its centre cropped, nothing masked.

Any loader carries it out as it does a training plan. The last batch goes on with the first samples again, so that all
batches have one size; `counted` tells whose result counts.

Shape legend: B rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan


class CentrePlan(SamplePlan):
    """Centre crops of every sample.

    The crop is the central square whose side is `share` of the image's shorter side, scaled to `image_size`: what
    resizing the shorter side to image_size / share and cutting out the centre gives, with one resize.

    Args:
        index: the images.
        batch_size: global, over all ranks.
        image_size: side of the crops, pixels.
        patch_size: must divide image_size.
        share: in (0, 1]; 224 / 256 as common for ImageNet.
        rank, world: this process and how many there are.

    Attributes:
        steps: global batches in which every sample comes once.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        image_size: int = 224,
        patch_size: int = 16,
        share: float = 0.875,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"the share of the shorter side in a centre crop is {share}, but must be in (0, 1]")
        self.share = share
        super().__init__(
            index,
            seed=0,
            batch_size=batch_size,
            data=DataConfig(image_size=image_size, flip=0.0),
            mask=MaskConfig(patches=0),
            patch_size=patch_size,
            rank=rank,
            world=world,
        )
        self.steps = -(-len(index) // batch_size)

    def counted(self, rows: PlanRows) -> npt.NDArray[np.bool_]:
        """Rows that are a sample itself (no stand-in for one that does not decode) at its first time: bool (B,)."""
        counted_B: npt.NDArray[np.bool_] = (rows.epoch_B == 0) & (rows.attempt_B == 0)
        return counted_B

    def state(self) -> dict[str, object]:
        """The plan's identity, JSON-able."""
        return {**super().state(), "centre_share": self.share}

    def _samples(self, epoch_B: npt.NDArray[np.int64], number_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return number_B

    def _rows(
        self,
        epoch_B: npt.NDArray[np.int64],
        position_B: npt.NDArray[np.int64],
        sample_B: npt.NDArray[np.int64],
        attempt: int,
    ) -> PlanRows:
        width_B, height_B = (sizes[sample_B].astype(np.int64) for sizes in (self.index.width, self.index.height))
        side_B = np.maximum(np.rint(self.share * np.minimum(width_B, height_B)).astype(np.int64), 1)
        rows, (side, _) = len(sample_B), self.grid
        return PlanRows(
            epoch_B,
            position_B,
            sample_B,
            ((width_B - side_B) // 2).astype(np.int32),
            ((height_B - side_B) // 2).astype(np.int32),
            side_B.astype(np.int32),
            side_B.astype(np.int32),
            np.zeros(rows, dtype=np.bool_),
            np.zeros((rows, side * side), dtype=np.bool_),
            np.full(rows, attempt, dtype=np.int32),
        )
