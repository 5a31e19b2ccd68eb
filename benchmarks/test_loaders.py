"""Images a second and core from JPEG files to uint8 crops: our loaders against PyTorch's usual way.

The peer is a DataLoader with one worker process a core over Pillow and torchvision's RandomResizedCrop (bicubic,
antialiased) and flip, as in most public recipes. Both read the same ImageNet-shaped files from the page cache and use
all cores. They take turns: before each of our rounds, the peer does its own. A round is timed in the steady state:
batches are under way when it begins, and as many when it ends; whatever else is under way is stopped or drained
before the other's turn.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import in_words, ratio_of_medians
from PIL import Image
from recorder import cores
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.base import Batch, Loader, StageStats
from mvp_fast.loaders.registry import make_loader
from mvp_fast.loaders.torchvision import carry_out
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan

BATCH, WARM_UP = 32, 4
PREFETCH_FACTOR = 2  # DataLoader's default


class Crops(Dataset[torch.Tensor]):
    """The usual map-style set: open, decode, RandomResizedCrop, flip; `length` samples, over and over the files."""

    def __init__(self, index: Index, length: int, data: DataConfig) -> None:
        self.files, self.length = [str(index.file(i)) for i in range(len(index))], length
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    data.image_size, data.crop_scale, data.crop_ratio, InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(data.flip),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i % len(self.files)]) as image:
            crop_CHW: torch.Tensor = self.transform(image.convert("RGB"))
        return crop_CHW


def take(batches: Iterator[Any], count: int) -> None:
    for _ in islice(batches, count):
        pass


def check_ours(loader: Loader, plan: SamplePlan, interpolation: str) -> None:
    """Before anything is timed: the right shape, and the pixels that Pillow makes of the plan's boxes."""
    batches = loader.batches(plan, 5)
    batch: Batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert batch.images_BHWC.shape == (BATCH, plan.image_size, plan.image_size, 3)
    assert batch.images_BHWC.dtype == torch.uint8
    np.testing.assert_array_equal(batch.rows.sample_B, plan.step(5).sample_B)
    for i in range(BATCH):
        expected = carry_out(plan.index, batch.rows.slice(i, i + 1), plan.image_size, interpolation).image_HWC
        assert np.abs(batch.images_BHWC[i].numpy().astype(int) - expected).mean() < 0.5


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_images_a_second_and_core(benchmark: Any, imagenet_scenes: Path, quick: bool, name: str) -> None:
    rounds, count = (1, 2) if quick else (15, 8)
    index, data = Index.open(imagenet_scenes), DataConfig()
    plan = SamplePlan(index, seed=0, batch_size=BATCH, data=data, mask=MaskConfig())
    loader = make_loader(name, data)
    check_ours(loader, plan, data.interpolation)

    ahead = PREFETCH_FACTOR * cores()  # the set must not end while the workers prefetch in a timed round
    peer = DataLoader(
        Crops(index, BATCH * (WARM_UP + count + ahead), data),
        batch_size=BATCH,
        shuffle=True,
        num_workers=cores(),
        prefetch_factor=PREFETCH_FACTOR,
        persistent_workers=True,
    )
    sample_BCHW = next(iter(peer))
    assert sample_BCHW.shape == (BATCH, 3, data.image_size, data.image_size)
    assert sample_BCHW.dtype == torch.uint8

    peer_seconds: list[float] = []

    def peer_round() -> tuple[tuple[Iterator[Batch], int], dict[str, Any]]:
        batches = iter(peer)
        take(batches, WARM_UP)
        start = time.perf_counter()
        take(batches, count)
        peer_seconds.append(time.perf_counter() - start)
        take(batches, len(peer))  # drain what the workers have under way
        ours = loader.batches(plan, 0)
        take(ours, WARM_UP)
        return (ours, count), {}

    def end_of_round(ours: Any, _: int) -> None:
        ours.close()

    benchmark.pedantic(take, setup=peer_round, teardown=end_of_round, rounds=rounds, iterations=1)
    stats = loader.stats()
    loader.close()
    images, ours_seconds = count * BATCH, benchmark.stats.stats.data
    rates = {who: images / float(np.median(s)) / cores() for who, s in (("ours", ours_seconds), ("peer", peer_seconds))}
    times = ratio_of_medians(ours_seconds, peer_seconds)
    benchmark.extra_info.update(
        summary=f"{rates['ours']:.0f} images/s a core, DataLoader {rates['peer']:.0f}; {in_words(times)}",
        images_a_round=images,
        images_a_second_and_core=rates,
        peer_seconds=peer_seconds,
        times_the_peer=times,
        images_a_cpu_second={stage: rate(stats, stage) for stage in ("decode", "transform")},
    )


def rate(stats: StageStats, stage: str) -> float | None:
    return stats.items[stage] / stats.seconds[stage] if stats.seconds[stage] else None
