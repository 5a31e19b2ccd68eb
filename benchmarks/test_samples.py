"""The sample plan and the index, one core: they must cost nothing beside decoding.

Peers: torchvision's RandomResizedCrop.get_params, one call an image, as every data set with random crops makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from harness import Session, Variant, compare
from torchvision.transforms import v2

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.samples.crops import crop_boxes
from mvp_fast.samples.index import COLUMNS, Index
from mvp_fast.samples.index_build import build_index, write_table
from mvp_fast.samples.masks import block_masks
from mvp_fast.samples.plan import SamplePlan

BATCH, ROUNDS, FILE_ROUNDS = 2048, 20, 5


def test_plan_step(benchmark: Any, session: Session) -> None:
    """Samples, boxes, flips and masks of a batch of 2048."""
    plan = SamplePlan(Index.synthetic(), seed=0, batch_size=BATCH, data=DataConfig(), mask=MaskConfig())

    def check() -> None:
        rows = plan.step(3)
        assert len(rows) == BATCH
        assert (rows.mask_BN.sum(1) == MaskConfig().patches).all()

    ours = Variant(lambda: [plan.step(step) for step in range(4)])
    compare(benchmark, session, ours=ours, check=check, items=4 * BATCH, unit="rows of the plan", rounds=ROUNDS)


def test_masks(benchmark: Any, session: Session) -> None:
    """Block-wise masks alone."""
    epoch_B, position_B = np.zeros(BATCH, np.int64), np.arange(BATCH)

    def draw() -> Any:
        return block_masks(0, epoch_B, position_B, (14, 14), MaskConfig())

    def check() -> None:
        assert (draw().sum(1) == MaskConfig().patches).all()

    ours = Variant(lambda: [draw() for _ in range(8)])
    compare(benchmark, session, ours=ours, check=check, items=8 * BATCH, unit="masks", rounds=ROUNDS)


def test_crop_boxes(benchmark: Any, session: Session) -> None:
    """Boxes of a batch against torchvision's, taken in turn."""
    data, position_B = DataConfig(), np.arange(BATCH)
    sizes_B = (np.full(BATCH, 500), np.full(BATCH, 375))
    image_CHW = torch.empty(3, 375, 500, dtype=torch.uint8)

    def ours() -> Any:
        return crop_boxes(0, np.zeros(BATCH, np.int64), position_B, *sizes_B, data.crop_scale, data.crop_ratio)

    transform = v2.RandomResizedCrop(data.image_size, data.crop_scale, data.crop_ratio)

    def torchvisions() -> list[tuple[int, ...]]:
        drawn = (transform.make_params([image_CHW]) for _ in range(BATCH))
        return [(box["left"], box["top"], box["width"], box["height"]) for box in drawn]

    def check() -> None:
        """Both draw boxes within the image, from the same distribution: the same mean area."""
        areas = []
        for x_B, y_B, width_B, height_B in (ours(), np.array(torchvisions()).T):
            assert ((x_B >= 0) & (x_B + width_B <= 500) & (y_B >= 0) & (y_B + height_B <= 375)).all()
            areas.append((width_B * height_B).mean() / (500 * 375))
        assert abs(areas[0] - areas[1]) < 0.05, f"mean areas {areas}"

    compare(
        benchmark,
        session,
        ours=Variant(lambda: [ours() for _ in range(8)]),
        peers={"torchvision": Variant(lambda: [torchvisions() for _ in range(8)])},
        check=check,
        items=8 * BATCH,
        unit="boxes",
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("verify", [False, True], ids=["headers", "verify"])
def test_index_files(benchmark: Any, imagenet_scenes: Path, tmp_path: Path, session: Session, verify: bool) -> None:
    """Files a second, one process, from the page cache."""
    for copy in range(1 if verify or session.quick else 16):  # enough files that the table's cost does not count
        for folder in sorted(path for path in imagenet_scenes.iterdir() if path.is_dir() and path.name != "masks"):
            (tmp_path / "set" / folder.name).mkdir(parents=True, exist_ok=True)
            for file in folder.glob("*.jpg"):
                (tmp_path / "set" / folder.name / f"{copy}-{file.name}").hardlink_to(file)
    files = len(list((tmp_path / "set").glob("*/*.jpg")))

    def index() -> Any:
        return build_index(tmp_path / "set", tmp_path / "index.parquet", verify=verify, workers=1)

    def check() -> None:
        index()
        assert len(Index.open(tmp_path / "index.parquet")) == files

    compare(benchmark, session, ours=Variant(index), check=check, items=files, unit="files", rounds=FILE_ROUNDS)


def test_index_open(benchmark: Any, tmp_path: Path, session: Session) -> None:
    """Opening an index of ImageNet's size."""
    images = 10_000 if session.quick else 1_281_167
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
    file = tmp_path / "index.parquet"
    write_table(table, about, file)

    def check() -> None:
        assert len(Index.open(file)) == images

    ours = Variant(lambda: Index.open(file))
    compare(benchmark, session, ours=ours, check=check, items=images, unit="rows", rounds=FILE_ROUNDS)
