"""Shared by all tests: small real image sets, the command line in a process of its own, and a tiny run's settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]

# A run that takes a fraction of a second a step on a CPU: real parts, small sizes.
TINY = {
    "data.image-size": 64,
    "mask.patches": 6,
    "mask.min-block": 2,
    "student.width": 64,
    "student.depth": 2,
    "student.heads": 2,
    "teacher.name": "ViT-S-16",
    "teacher.pretrained": "random",
    "train.batch-size": 8,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.log-every": 1,
    "optim.reference-batch-size": 8,
    "run.tensorboard": False,
    "data.threads": 2,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are left out, not skipped, where there is no GPU: a run's count tells what was run."""
    import torch

    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 small scenes with an index; read only."""
    folder = tmp_path_factory.mktemp("scenes")
    run_verb("data", "scenes", "--out", folder, "--images", 96, "--profile", "small", "--workers", 1)
    run_verb("data", "index", folder)
    return folder


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line overrides."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def run_verb(*words: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `mvp-fast` in a process of its own; with `check`, a failure shows what it printed."""
    command = [sys.executable, "-m", "mvp_fast", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **options.pop("env", {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture
def train(scenes: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call `mvp-fast train` with the tiny settings; keywords with `__` for the dot override them."""

    def call(run: Path | None = None, check: bool = True, **overrides: Any) -> subprocess.CompletedProcess[str]:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        settings = {"data.index": scenes, "run.dir": run or tmp_path / "run", **TINY, **named}
        return run_verb("train", *arguments(settings), check=check)

    return call


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """The loss at each step."""
    return {line["step"]: line["loss"] for line in read_metrics(run)}
