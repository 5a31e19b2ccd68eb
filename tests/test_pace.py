"""Each rank's own speed, and the rank that keeps the others waiting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_fast.train.distributed import Ranks
from mvp_fast.train.pace import Pace, compare, in_words
from mvp_fast.train.stages import STAGES, unrecorded
from tests.conftest import TINY, Launcher, Process, arguments, read_metrics

IMAGES = 100


def rows(*each: tuple[float, float, float, float, float]) -> np.ndarray:
    """A rank a row: seconds in all, waiting for data, agreeing, in stages without an exchange, in steps."""
    return np.array(each, dtype=np.float64)


def test_ranks_that_keep_step() -> None:
    metrics = compare(rows(*[(10, 0.1, 0.2, 4, 9.5)] * 4), IMAGES)
    assert metrics["rank_images_per_second"] == [10.0] * 4
    assert metrics["straggler"] is None
    assert in_words(metrics) == ""


def test_a_rank_that_waits_for_data() -> None:
    """The others wait for it in the agreement: 5 of 10 seconds."""
    metrics = compare(rows((10, 0, 5, 2, 5), (10, 5, 0, 2, 5), (10, 0, 5, 2, 5)), IMAGES)
    assert metrics["rank_images_per_second"] == [20.0, 10.0, 20.0]
    assert (metrics["slowest_rank"], metrics["straggler"]) == (1, "data")
    assert in_words(metrics) == "rank 1 is 50 % slower than the median rank: it waits for data"


def test_a_rank_that_computes_slowly() -> None:
    """The others wait for it in the step, where no clock tells; it needs twice their time for what all do alone."""
    metrics = compare(rows((10, 0, 0, 2, 10), (10, 0, 0, 2, 10), (10, 0, 0, 4, 10)), IMAGES)
    assert metrics["rank_images_per_second"] == [20.0, 20.0, 10.0]
    assert (metrics["slowest_rank"], metrics["straggler"]) == (2, "compute")
    assert in_words(metrics) == "rank 2 is 50 % slower than the median rank: it computes slowly"


def test_waiting_beside_the_computing_does_not_count_twice() -> None:
    """A GPU that computes for 9 of 10 seconds could not be five times as fast, although its host only waited."""
    metrics = compare(rows((10, 0, 8, 3, 9), (10, 8, 0, 3, 9)), IMAGES)
    assert metrics["rank_images_per_second"] == [round(IMAGES / 9, 2), 10.0]
    assert metrics["straggler"] is None


@pytest.mark.parametrize(("speed", "named"), [(0.92, False), (0.88, True)])
def test_a_tenth_is_the_limit(speed: float, named: bool) -> None:
    metrics = compare(rows(*[(1, 0, 1 - speed, 0, 0)] * 3, (1, 1 - speed, 0, 0, 0)), IMAGES)
    assert metrics["slowest_rank"] == 3
    assert (metrics["straggler"] == "data") is named


def test_one_rank_has_nothing_to_compare() -> None:
    pace = Pace(Ranks(0, 1, 1, torch.device("cpu")), sharded=False)
    assert pace.recorder(unrecorded) is unrecorded
    assert pace.read(8, 0.0) == {}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_recorder_goes_on_recording(sharded: bool) -> None:
    """The clocks stand around whoever records already; stages with an exchange are not among them."""
    pace = Pace(Ranks(0, 2, 2, torch.device("cpu")), sharded=sharded)
    seen: list[str] = []

    def inner(stage: Any) -> Any:
        seen.append(stage)
        return unrecorded(stage)

    recorder = pace.recorder(inner)
    for stage in STAGES:
        with recorder(stage):
            pass
    assert seen == list(STAGES)
    assert pace.alone <= set(STAGES)
    assert "backward" not in pace.alone
    assert ("student forward" in pace.alone) is not sharded


SETTINGS = {
    **TINY,
    "data.threads": 1,
    "train.batch-size": 4,
    "train.log-every": 4,
    "train.steps": 12,
    "train.checkpoint-every": 0,  # writing is left out of the ranks' paces, not of images_per_second
}
StartTwo = Callable[..., list[Process]]


@pytest.fixture(scope="module")
def large(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images that take long to decode."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).integers(0, 256, (2600, 3600, 3), dtype=np.uint8)
    for number in range(8):
        Image.fromarray(noise[number:]).save(folder / f"{number}.jpg", quality=95)
    launcher.run("data", "index", folder)
    return folder


@pytest.fixture
def start_two(launcher: Launcher, large: Path, tmp_path: Path) -> StartTwo:
    """Start two ranks, each with a loader of its own."""

    def call(loaders: tuple[str, str], sharding: str) -> list[Process]:
        common = {**SETTINGS, "data.index": large, "run.dir": tmp_path / "run", "train.sharding": sharding}
        return launcher.start_ranks([["train", *arguments({**common, "data.loader": each})] for each in loaders])

    return call


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_rank_with_a_slow_loader(start_two: StartTwo, tmp_path: Path, sharding: str) -> None:
    """The first has its batch at hand, the second decodes large files with one thread."""
    ranks = start_two(("synthetic", "torchvision"), sharding)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].err
    for line in read_metrics(tmp_path / "run"):
        assert line["slowest_rank"] == 1
        assert line["straggler"] == "data"
        first, second = line["rank_images_per_second"]
        assert second < 0.9 * first
        # The slowest waits for nobody: its own speed is half of what both reach together.
        assert second == pytest.approx(line["images_per_second"] / 2, rel=0.2)
    assert "slower than the median rank: it waits for data" in ranks[0].out


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_rank_that_is_held_up(start_two: StartTwo, tmp_path: Path, sharding: str) -> None:
    """The second is stopped four fifths of the time, from its first metric line on; both have their data at hand."""
    ranks = start_two(("synthetic", "synthetic"), sharding)
    path = tmp_path / "run" / "metrics.jsonl"
    ranks[0].wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 1)
    while ranks[1].poll() is None:
        for number, seconds in ((signal.SIGSTOP, 0.04), (signal.SIGCONT, 0.01)):
            os.kill(ranks[1].pid, number)
            time.sleep(seconds)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].err
    *_, last = read_metrics(tmp_path / "run")
    assert (last["slowest_rank"], last["straggler"]) == (1, "compute")
    assert "rank 1 is " in ranks[0].out
    assert "it computes slowly" in ranks[0].out
