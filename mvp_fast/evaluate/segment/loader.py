"""A loader around any other that adds the classes of the pixels: the same box of the mask, by nearest neighbour.

The masks are read by threads of their own while the images are made. Each pixel of a crop takes the class at its
centre: pixel i of S lies at (i + 1/2) w / S in a box w pixels wide, which is where the filters of the images put it.

Shape legend: B crops, S pixels along a side of a crop, H and W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mvp_fast.evaluate.segment.masks import LabelledSet
from mvp_fast.loaders.base import Batch, Loader, StageStats
from mvp_fast.samples.plan import PlanRows, SamplePlan


def crop_mask(mask_HW: npt.NDArray[Any], row: PlanRows, size: int) -> npt.NDArray[Any]:
    """Cut the first row's box out of a mask, scale it by nearest neighbour and flip it: (size, size)."""
    x, y, width, height = (int(column[0]) for column in (row.x_B, row.y_B, row.width_B, row.height_B))
    middles_S = 2 * np.arange(size, dtype=np.int64) + 1
    down_S, across_S = y + middles_S * height // (2 * size), x + middles_S * width // (2 * size)
    crop_SS: npt.NDArray[Any] = mask_HW[down_S[:, None], across_S[None, :]]
    return crop_SS[:, ::-1] if row.flip_B[0] else crop_SS


class MaskLoader:
    """Batches of `images` with the classes of their pixels as target: int16 (B, S, S), on the CPU.

    Args:
        images: any loader; closed with this one.
        labelled: the set whose index the plan has.
        threads: that read masks.
    """

    def __init__(self, images: Loader, labelled: LabelledSet, threads: int) -> None:
        self._images, self._labelled, self._threads = images, labelled, threads

    @property
    def bad_samples(self) -> int:
        """How many images were bad so far."""
        return self._images.bad_samples

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step, start_step + 1, ... without end (see `Loader`).

        Raises:
            DataError: also where a mask can't be used.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="mvp-masks") as pool:
            made = self._images.batches(plan, start_step)
            with closing(made):  # type: ignore[type-var]  # all loaders' are generators
                step = start_step
                while True:
                    rows = plan.step(step)
                    target_BSS = np.empty((len(rows), plan.image_size, plan.image_size), np.int16)
                    futures = self._submit(pool, plan, rows, target_BSS)
                    try:
                        batch = next(made)
                        self._settle(plan, batch.rows, rows, futures, target_BSS)
                    finally:
                        for future in futures:
                            future.cancel()
                    yield replace(batch, target=torch.from_numpy(target_BSS))
                    step += 1

    def _submit(
        self, pool: ThreadPoolExecutor, plan: SamplePlan, rows: PlanRows, target_BSS: npt.NDArray[np.int16]
    ) -> list[Future[None]]:
        """Start reading: a task for each sample, with all its crops."""
        firsts = range(0, len(rows), plan.repeat)
        return [pool.submit(self._fill, rows, first, plan.repeat, target_BSS) for first in firsts]

    def _settle(
        self,
        plan: SamplePlan,
        rows: PlanRows,
        planned: PlanRows,
        futures: list[Future[None]],
        target_BSS: npt.NDArray[np.int16],
    ) -> None:
        """Wait for the masks; for a stand-in read its own instead, whatever became of the other's."""
        for group, future in enumerate(futures):
            first = group * plan.repeat
            if rows.attempt_B[first] == planned.attempt_B[first]:
                future.result()
            else:
                future.exception()
                self._fill(rows, first, plan.repeat, target_BSS)

    def _fill(self, rows: PlanRows, first: int, count: int, target_BSS: npt.NDArray[np.int16]) -> None:
        size = target_BSS.shape[1]

        def crops(mask_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.stack([crop_mask(mask_HW, rows.slice(i, i + 1), size) for i in range(first, first + count)])

        target_BSS[first : first + count] = self._labelled.read(int(rows.sample_B[first]), crops)

    def stats(self) -> StageStats:
        """Where the time of the images went; that of the masks is not booked."""
        return self._images.stats()

    def close(self) -> None:
        """Give back the images' threads; the masks' end with their passage."""
        self._images.close()
