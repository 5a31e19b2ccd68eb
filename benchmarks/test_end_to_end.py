"""`mvp-fast train` as it is run: images a second, time spent waiting for data and peak memory, from metrics.jsonl.

Once from JPEG files through DALI and once with `synthetic`, whose resident batch costs nothing to load: the difference
is what loading costs. The first fifth of the metric lines is left out (start-up).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
LOADERS = ("dali", "synthetic")


def mvp_fast(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "mvp_fast", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def draw_scenes(folder: Path, images: int) -> Path:
    """ImageNet-shaped JPEG files with an index."""
    mvp_fast("data", "scenes", "--out", folder, "--images", images, "--profile", "imagenet")
    mvp_fast("data", "index", folder)
    return folder


def run(benchmark: Any, data: Path, folder: Path, settings: dict[str, object]) -> None:
    """Train once and put down what metrics.jsonl says."""
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    common = ("--config", REPO / "configs" / "vit_b16_in1k.yaml", "--data.index", data, "--run.dir", folder)
    command = ("train", *common, "--run.tensorboard", False, "--teacher.pretrained", "random", *words)
    benchmark.pedantic(mvp_fast, args=command, rounds=1, iterations=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == settings["train.steps"]
    assert not any(line["skipped_updates"] or line["bad_samples"] for line in lines)
    steady = lines[len(lines) // 5 or 1 :] or lines
    rates = [line["images_per_second"] for line in steady]
    rate, wait = float(np.median(rates)), float(np.mean([line["data_wait"] for line in steady]))
    memory = max((line.get("peak_memory_bytes", 0) for line in lines), default=0)
    environment = json.loads((folder / "environment.json").read_text())
    in_memory = f", {memory / 2**30:.1f} GiB" if memory else ""
    benchmark.extra_info.update(
        summary=f"{rate:.1f} images/s, {100 * wait:.1f} % waiting for data{in_memory}",
        images_a_second=rate,
        images_a_second_lines=rates,
        data_wait=wait,
        peak_memory_bytes=memory or None,
        loss_first_last=[lines[0]["loss"], lines[-1]["loss"]],
        kernels=environment["kernels"],
        settings={name: str(value) for name, value in settings.items()},
    )


@pytest.fixture(scope="module")
def photo_sized(tmp_path_factory: pytest.TempPathFactory, quick: bool) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("end_to_end"), 256 if quick else 2048)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("loader", LOADERS)
def test_b16(benchmark: Any, photo_sized: Path, tmp_path: Path, quick: bool, loader: str) -> None:
    """The B/16 recipe on one GPU."""
    settings = {
        "data.loader": loader,
        "teacher.name": "ViT-B-16",
        "train.batch-size": 256,
        "train.precision": "bf16",
        "train.steps": 20 if quick else 200,
        "train.log-every": 10,
        "train.device": "cuda",
    }
    run(benchmark, photo_sized, tmp_path / "run", settings)


@pytest.mark.parametrize("loader", LOADERS)
def test_small(benchmark: Any, imagenet_scenes: Path, tmp_path: Path, quick: bool, loader: str) -> None:
    """The same way at a size that a few CPU cores can bear."""
    if quick and loader == "synthetic":
        pytest.skip("one short run through files is enough for --quick")
    settings = {
        "data.loader": loader,
        "data.image-size": 112,
        "mask.patches": 19,
        "mask.min-block": 4,
        "student.width": 96,
        "student.depth": 2,
        "student.heads": 3,
        "teacher.name": "ViT-S-16",
        "train.batch-size": 8,
        "train.precision": "fp32",
        "train.steps": 4 if quick else 40,
        "train.log-every": 2,
        "train.device": "cpu",
    }
    run(benchmark, imagenet_scenes, tmp_path / "run", settings)
