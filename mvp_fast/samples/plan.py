"""The sample plan: for every step, which samples, which crop boxes, which flips and which masks.

The plan is a set of pure functions of (seed, epoch, position). Its stream is endless: for an index of n samples, each
repeated r times in a row (data.repeat), row i of global batch k has the global position g = k * batch_size + i; its
epoch is g // (n r), its position in that epoch p = g % (n r), its sample number p // r in the epoch's order. So every
sample comes r times an epoch, a batch may straddle two epochs, the stream depends on neither batch size nor ranks, and
a run resumes by going on at step k. The r rows of a sample, its group, have boxes, flips and masks of their own; a
stand-in takes the place of the whole group.

Shape legend: B rows, N patches (row-major over the grid), M masked patches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.samples.crops import crop_boxes, flips
from mvp_fast.samples.index import Index
from mvp_fast.samples.masks import block_masks
from mvp_fast.samples.order import order
from mvp_fast.samples.plan_check import check_crops, check_mask, check_ranks
from mvp_fast.samples.random import BLOCKS, Stream, draws
from mvp_fast.samples.sharded_order import ShardedOrder

VERSION = 1
"""Changes whenever the same settings would give other samples, boxes, flips or masks."""
EPOCHS = 1 << 32
"""Epochs in a plan: the counter of the random numbers has a word for them."""


@dataclass(frozen=True)
class PlanRows:
    """Rows of the plan, one a sample.

    Attributes:
        epoch_B: int64.
        position_B: int64, position within the epoch.
        sample_B: int64, row of the index.
        x_B, y_B, width_B, height_B: int32, the crop box in pixels of the stored image (EXIF orientation not applied).
        flip_B: bool, flip the crop left to right.
        mask_BN: bool, the masked patches. Every row of a plan masks the same number.
        attempt_B: int32, 0 for the sample itself, a for its a-th stand-in.
    """

    epoch_B: npt.NDArray[np.int64]
    position_B: npt.NDArray[np.int64]
    sample_B: npt.NDArray[np.int64]
    x_B: npt.NDArray[np.int32]
    y_B: npt.NDArray[np.int32]
    width_B: npt.NDArray[np.int32]
    height_B: npt.NDArray[np.int32]
    flip_B: npt.NDArray[np.bool_]
    mask_BN: npt.NDArray[np.bool_]
    attempt_B: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.sample_B)

    def masked_BM(self) -> npt.NDArray[np.int64]:
        """The numbers of the masked patches, ascending in each row: int64 (B, M); (0, 0) without rows."""
        if not len(self):
            return np.empty((0, 0), dtype=np.int64)
        return np.nonzero(self.mask_BN)[1].astype(np.int64, copy=False).reshape(len(self), -1)

    def slice(self, start: int, stop: int) -> PlanRows:
        """Rows start to stop - 1, as views."""
        return PlanRows(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def replace_row(self, i: int, other_rows: PlanRows, j: int) -> PlanRows:
        """A copy in which row i is row j of `other_rows`; these rows stay as they are."""
        return self.replace_rows(i, other_rows.slice(j, j + 1))

    def replace_rows(self, i: int, other_rows: PlanRows) -> PlanRows:
        """A copy in which the rows from i on are `other_rows`; these rows stay as they are."""
        copies = []
        for field in fields(self):
            column = getattr(self, field.name).copy()
            column[i : i + len(other_rows)] = getattr(other_rows, field.name)
            copies.append(column)
        return PlanRows(*copies)


class SamplePlan:
    """What one rank sees at every step.

    Attributes:
        index, seed, rank, world, image_size: as given.
        batch_size: the global batch.
        local_batch_size: this rank's part of it, batch_size / world.
        repeat: rows in a row that are crops of the same sample. Groups begin at multiples of it in every batch.
        epoch_rows: rows of an epoch.
        grid: rows and columns of patches.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        batch_size: int,
        data: DataConfig,
        mask: MaskConfig,
        patch_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            index: the images.
            seed: in [0, 2**64).
            batch_size: global, over all ranks.
            data: image_size, crop_scale, crop_ratio, flip, order, shuffle_window and repeat are used.
            mask: number and shape of the masked blocks.
            patch_size: side of a patch, pixels.
            rank, world: this process and how many there are.

        Raises:
            ConfigError: a value out of range, a batch that does not divide by the ranks or into groups, an image that
                does not divide into patches, more masked patches than patches, or an index without shards for the order
                `sharded`.
        """
        check_ranks(seed, batch_size, rank, world, data.repeat)
        check_crops(data, patch_size)
        side = data.image_size // patch_size
        check_mask(mask, side)
        self.index, self.seed, self.batch_size, self.rank, self.world = index, seed, batch_size, rank, world
        self.local_batch_size = batch_size // world
        self.image_size, self.patch_size, self.grid = data.image_size, patch_size, (side, side)
        self.data, self.mask = data, mask
        self.repeat, self.epoch_rows = data.repeat, len(index) * data.repeat
        self._sharded = _sharded_order(index, seed, data) if data.order == "sharded" else None

    def step(self, k: int) -> PlanRows:
        """This rank's part of global batch k (from 0): rows rank * B / world to (rank + 1) * B / world - 1.

        Raises:
            ConfigError: the step lies beyond the 2**32 epochs that a plan has.
        """
        if k < 0:
            raise ValueError(f"step {k} is negative")
        first = k * self.batch_size + self.rank * self.local_batch_size
        epoch, position = divmod(first, self.epoch_rows)  # Python integers: they do not overflow
        epoch = min(epoch, EPOCHS)  # which `rows` refuses
        ahead_B = position + np.arange(self.local_batch_size, dtype=np.int64)
        return self.rows(epoch + ahead_B // self.epoch_rows, ahead_B % self.epoch_rows)

    def rows(self, epoch_B: npt.ArrayLike, position_B: npt.ArrayLike, attempt: int = 0) -> PlanRows:
        """Any rows of the plan.

        Args:
            epoch_B: epochs in [0, 2**32); broadcasts against `position_B`.
            position_B: positions in [0, epoch_rows).
            attempt: 0 for the samples themselves, a for their a-th stand-ins, up to 2**16.

        Raises:
            ConfigError: an epoch, position or attempt out of range.
        """
        broadcast = np.broadcast_arrays(np.atleast_1d(epoch_B), np.atleast_1d(position_B))
        epoch, position = (array.astype(np.int64) for array in broadcast)
        if epoch.size and (epoch.min() < 0 or epoch.max() >= EPOCHS):
            raise ConfigError("the plan has epochs 0 to 2**32 - 1", where=f"epoch {epoch.max()}")
        if position.size and (position.min() < 0 or position.max() >= self.epoch_rows):
            raise ConfigError(f"an epoch has positions 0 to {self.epoch_rows - 1}", where=f"position {position.max()}")
        if not 0 <= attempt <= BLOCKS:
            raise ConfigError(f"a sample has stand-ins 1 to {BLOCKS}", where=f"attempt {attempt}")
        sample_B = self._samples(epoch, position // self.repeat)
        for earlier in range(attempt):
            sample_B = self._another(epoch, position, earlier, sample_B)
        return self._rows(epoch, position, sample_B, attempt)

    def stand_in(self, rows: PlanRows, i: int) -> PlanRows:
        """One row that takes the place of row i, whose sample can't be used: its next attempt.

        The sample is drawn anew, never the same as row i's where the index has more than one. The box is drawn anew for
        that sample's size; flip and mask belong to the position and stay. The rows of a group get the same stand-in.
        """
        return self.stand_ins(rows.slice(i, i + 1))

    def stand_ins(self, rows: PlanRows) -> PlanRows:
        """The stand-in for each of some rows, as `stand_in`; all must be of the same attempt."""
        attempt = int(rows.attempt_B[0])
        if attempt >= BLOCKS:
            raise ConfigError(f"a sample has stand-ins 1 to {BLOCKS}", where=f"position {rows.position_B[0]}")
        sample_B = self._another(rows.epoch_B, rows.position_B, attempt, rows.sample_B)
        return self._rows(rows.epoch_B, rows.position_B, sample_B, attempt + 1)

    def state(self) -> dict[str, object]:
        """The plan's identity, JSON-able: two plans with equal states give the same global batches.

        Rank and world are left out: they only divide the batches. What has its default is left out where it came
        later than version 1, so that a plan from before has the state that it had.
        """
        later: dict[str, object] = {"repeat": self.repeat} if self.repeat > 1 else {}
        if self._sharded is not None:
            window, shards = self._sharded.window, self._sharded.fingerprint()
            later |= {"order": "sharded", "shuffle_window": window, "shards": shards}
        return {
            "version": VERSION,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "index": self.index.fingerprint(),
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "crop_scale": [float(x) for x in self.data.crop_scale],
            "crop_ratio": [float(x) for x in self.data.crop_ratio],
            "flip": float(self.data.flip),
            "mask_patches": self.mask.patches,
            "mask_min_block": self.mask.min_block,
            "mask_min_aspect": float(self.mask.min_aspect),
            **later,
        }

    def _samples(self, epoch_B: npt.NDArray[np.int64], number_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which samples have these numbers in the order of their epochs."""
        if self._sharded is not None:
            return self._sharded(epoch_B, number_B)
        return order(self.seed, epoch_B, number_B, len(self.index))

    def _rows(
        self,
        epoch_B: npt.NDArray[np.int64],
        position_B: npt.NDArray[np.int64],
        sample_B: npt.NDArray[np.int64],
        attempt: int,
    ) -> PlanRows:
        sizes_B = self.index.width[sample_B], self.index.height[sample_B]
        data = self.data
        boxes = crop_boxes(self.seed, epoch_B, position_B, *sizes_B, data.crop_scale, data.crop_ratio)
        return PlanRows(
            epoch_B,
            position_B,
            sample_B,
            *boxes,
            flips(self.seed, epoch_B, position_B, data.flip),
            block_masks(self.seed, epoch_B, position_B, self.grid, self.mask),
            np.full(len(sample_B), attempt, dtype=np.int32),
        )

    def _another(
        self,
        epoch_B: npt.NDArray[np.int64],
        position_B: npt.NDArray[np.int64],
        attempt: int,
        sample_B: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """A sample drawn uniformly from all but `sample_B`, the same for all rows of a group."""
        n = len(self.index)
        if n == 1:
            return sample_B
        words_B4 = draws(self.seed, Stream.STAND_IN, epoch_B, position_B // self.repeat, attempt)
        unit_B = (words_B4[:, 0] * 2.0**-32 + words_B4[:, 1]) * 2.0**-32
        other_B = np.minimum((unit_B * (n - 1)).astype(np.int64), n - 2)
        return other_B + (other_B >= sample_B)


def _sharded_order(index: Index, seed: int, data: DataConfig) -> ShardedOrder:
    starts = index.shard_starts()
    if starts is None:
        raise ConfigError(
            "The order `sharded` needs an index of shards, and this one has each image in a file of its own",
            where=f"data.order, and {index.path}",
            fix="Write shards with `mvp-fast data convert INDEX --to shards`, or set data.order to shuffled",
        )
    if data.shuffle_window < 1:
        raise ConfigError("a window has at least 1 sample", where=f"data.shuffle_window is {data.shuffle_window}")
    return ShardedOrder(starts, seed, data.shuffle_window)
