"""FFCV's own loader over a beton, as its examples have it: RandomResizedCrop, flip, to a tensor, from the page cache.

It draws order and boxes by itself (scale, ratio and flip as ours). Its resize is the area filter that ours takes from
the same library, its flip a pass of its own; uint8 RGB, channels last.

Import nothing of FFCV through `mvp_fast.loaders.ffcv_library.load` in the same process: that leaves its compiler out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mvp_fast.config.schema import DataConfig

AHEAD = 3  # batches that FFCV prepares in advance by default


class FfcvPassages:
    """Passages through FFCV's loader, each to its end: one that is broken off keeps its thread and memory (ffcv#345).

    Args:
        beton: the file.
        samples: in it.
        data: size, scale, ratio and flip of the crops.
        batch_size: images a batch.
        batches: that one passage takes; it is longer by what FFCV holds ready when the last is taken.
        workers: threads.
    """

    def __init__(
        self, beton: Path, samples: int, data: DataConfig, *, batch_size: int, batches: int, workers: int
    ) -> None:
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor

        size = (data.image_size, data.image_size)
        crop = RandomResizedCropRGBImageDecoder(size, scale=data.crop_scale, ratio=data.crop_ratio)
        wanted = batch_size * (batches + AHEAD)
        self.loader: Any = Loader(
            str(beton),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=True,
            order=OrderOption.RANDOM,
            indices=np.resize(np.arange(samples), wanted),  # over and over the same samples
            pipelines={"image": [crop, RandomHorizontalFlip(data.flip), ToTensor()], "label": None, "row": None},
        )

    def start(self) -> Iterator[Tensor]:
        """A passage from its beginning: image tensors (B, H, W, C), each valid until the next but AHEAD is taken."""
        for (images_BHWC,) in self.loader:
            yield images_BHWC

    @staticmethod
    def end(passage: Iterator[Tensor]) -> None:
        """Drain it."""
        for _ in passage:
            pass
