"""One resident batch of random pixels, over and over: what a step could reach if loading cost nothing.

Order, boxes and masks still come from the plan, so that all but the pixels is as in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvp_fast.loaders.base import Batch, StageStats
from mvp_fast.samples.plan import SamplePlan


class SyntheticLoader:
    """Yields the same random images at every step; reads no file.

    Args:
        seed: decides the pixels; rank and device do not.
        device: where the batch stays, so that no copy is measured either.
    """

    bad_samples = 0  # nothing is decoded

    def __init__(self, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._seed, self._device = seed, torch.device(device)
        self._images_BHWC: torch.Tensor | None = None
        self._stats = StageStats()

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        """Yield steps without end. All batches share one image tensor: do not write to it."""
        shape = (plan.local_batch_size, plan.image_size, plan.image_size, 3)
        if self._images_BHWC is None or self._images_BHWC.shape != shape:
            generator = torch.Generator().manual_seed(self._seed)
            images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            self._images_BHWC = images_BHWC.to(self._device)
        step = start_step
        while True:
            rows = plan.step(step)
            yield Batch(step, self._images_BHWC, torch.from_numpy(rows.masked_BM()), rows)
            step += 1

    def stats(self) -> StageStats:
        """Nothing is read, decoded or transformed."""
        return self._stats

    def close(self) -> None:
        """Give back the batch."""
        self._images_BHWC = None
