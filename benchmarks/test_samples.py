"""The sample plan and the index, one core: they must cost nothing beside decoding.

Peers: torchvision's RandomResizedCrop.get_params, one call an image, as every data set with random crops makes them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from compare import in_words, ratio_of_medians
from torchvision.transforms import v2

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.samples.crops import crop_boxes
from mvp_fast.samples.index import COLUMNS, Index
from mvp_fast.samples.index_build import build_index, write_table
from mvp_fast.samples.masks import block_masks
from mvp_fast.samples.plan import SamplePlan

BATCH = 2048


def rounds(quick: bool) -> int:
    return 1 if quick else 20


def record(benchmark: Any, items: int, what: str, extra: str = "") -> None:
    seconds = float(np.median(benchmark.stats.stats.data))
    benchmark.extra_info.update(
        summary=f"{items / seconds:,.0f} {what} a second, {1e3 * seconds:.2f} ms{extra}", items=items
    )


def test_plan_step(benchmark: Any, quick: bool) -> None:
    """Samples, boxes, flips and masks of a batch of 2048."""
    plan = SamplePlan(Index.synthetic(), seed=0, batch_size=BATCH, data=DataConfig(), mask=MaskConfig())
    rows = plan.step(3)
    assert len(rows) == BATCH
    assert (rows.mask_BN.sum(1) == MaskConfig().patches).all()
    benchmark.pedantic(plan.step, args=(3,), rounds=rounds(quick), iterations=1, warmup_rounds=1)
    record(benchmark, BATCH, "rows of the plan")


def test_masks(benchmark: Any, quick: bool) -> None:
    """Block-wise masks alone."""
    epoch_B, position_B = np.zeros(BATCH, np.int64), np.arange(BATCH)

    def draw() -> Any:
        return block_masks(0, epoch_B, position_B, (14, 14), MaskConfig())

    assert (draw().sum(1) == MaskConfig().patches).all()
    benchmark.pedantic(draw, rounds=rounds(quick), iterations=1, warmup_rounds=1)
    record(benchmark, BATCH, "masks")


def test_crop_boxes(benchmark: Any, quick: bool) -> None:
    """Boxes of a batch against torchvision's, taken in turn."""
    data, position_B = DataConfig(), np.arange(BATCH)
    sizes_B = (np.full(BATCH, 500), np.full(BATCH, 375))
    image_CHW = torch.empty(3, 375, 500, dtype=torch.uint8)
    peer_seconds: list[float] = []

    def ours() -> Any:
        return crop_boxes(0, np.zeros(BATCH, np.int64), position_B, *sizes_B, data.crop_scale, data.crop_ratio)

    def peer_round() -> None:
        transform = v2.RandomResizedCrop(data.image_size, data.crop_scale, data.crop_ratio)
        start = time.perf_counter()
        for _ in range(BATCH):
            transform.make_params([image_CHW])
        peer_seconds.append(time.perf_counter() - start)

    x_B, y_B, width_B, height_B = ours()
    assert ((x_B >= 0) & (x_B + width_B <= 500) & (y_B >= 0) & (y_B + height_B <= 375)).all()
    benchmark.pedantic(ours, setup=peer_round, rounds=rounds(quick), iterations=1)
    times = ratio_of_medians(benchmark.stats.stats.data, peer_seconds)
    record(benchmark, BATCH, "boxes", f"; torchvision: {in_words(times)}")
    benchmark.extra_info.update(peer_seconds=peer_seconds, times_the_peer=times)


@pytest.mark.parametrize("verify", [False, True], ids=["headers", "verify"])
def test_index_files(benchmark: Any, imagenet_scenes: Path, tmp_path: Path, quick: bool, verify: bool) -> None:
    """Files a second, one process, from the page cache."""
    for copy in range(1 if verify or quick else 16):  # enough files that the table's cost does not count
        for folder in sorted(path for path in imagenet_scenes.iterdir() if path.is_dir() and path.name != "masks"):
            (tmp_path / "set" / folder.name).mkdir(parents=True, exist_ok=True)
            for file in folder.glob("*.jpg"):
                (tmp_path / "set" / folder.name / f"{copy}-{file.name}").hardlink_to(file)
    files = len(list((tmp_path / "set").glob("*/*.jpg")))

    def index() -> Any:
        return build_index(tmp_path / "set", tmp_path / "index.parquet", verify=verify, workers=1)

    index()
    assert len(Index.open(tmp_path / "index.parquet")) == files
    benchmark.pedantic(index, rounds=1 if quick else 5, iterations=1)
    record(benchmark, files, "files")


def test_index_open(benchmark: Any, tmp_path: Path, quick: bool) -> None:
    """Opening an index of ImageNet's size."""
    images = 10_000 if quick else 1_281_167
    names = pa.array([f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(images)], pa.large_string())
    long, short = np.ones(images, np.int64), np.ones(images, np.int32)
    numbers = {"offset": 0 * long, "length": long, "width": short, "height": short, "label": -short}
    table = pa.table({"key": names, "path": names, **numbers}, schema=COLUMNS)
    about = {
        "version": 1,
        "classes": [],
        "root": ".",
        "root_absolute": str(tmp_path),
        "tool": "test",
        "verified": False,
    }
    write_table(table, about, tmp_path / "index.parquet")
    assert len(Index.open(tmp_path / "index.parquet")) == images
    benchmark.pedantic(Index.open, args=(tmp_path / "index.parquet",), rounds=1 if quick else 5, iterations=1)
    record(benchmark, images, "rows")
