"""Runs of several ranks, a process each, over gloo on the CPU: the curve of one rank, agreement on how to end.

Some ranks are started by torchrun itself, the others with the environment that torchrun would give them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.distributed import all_reduce
from tests.conftest import TINY, Launcher, Process, arguments, losses, read_metrics

STEPS = 8
SETTINGS = {
    **TINY,
    "data.loader": "torchvision",
    "data.threads": 1,
    "data.bad-sample-budget": 1.0,
    "student.drop-path": 0.3,
    "train.steps": STEPS,
    "train.checkpoint-every": 4,
    "train.keep-checkpoints": 0,
}
Start = Callable[..., list[Process]]


def spoil(index: Index, sample: int) -> str:
    """Overwrite an image with as many zeros, so that nobody notices before it is decoded; returns its key."""
    file = index.file(sample)
    file.write_bytes(bytes(file.stat().st_size))
    return index.key(sample)


def settings_of(run: Path, data: Path, overrides: dict[str, Any]) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
    return arguments({**SETTINGS, "data.index": data, "run.dir": run, **named})


@pytest.fixture(scope="module")
def dented(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes with every seventh image spoiled."""
    folder = Path(shutil.copytree(scenes, tmp_path_factory.mktemp("dented") / "scenes"))
    index = Index.open(folder)
    for sample in range(0, len(index), 7):
        spoil(index, sample)
    return folder


@pytest.fixture(scope="module")
def start(launcher: Launcher, dented: Path) -> Start:
    """Start the ranks of a run; `folders` gives each rank one of its own."""

    def call(
        run: Path, world: int = 1, data: Path = dented, folders: list[Path] | None = None, **overrides: Any
    ) -> list[Process]:
        return launcher.start_ranks(
            [["train", *settings_of(folders[rank] if folders else run, data, overrides)] for rank in range(world)]
        )

    return call


def torchrun(run: Path, data: Path, **overrides: Any) -> subprocess.Popen[str]:
    """Start two ranks as users do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mvp_fast", "train", *settings_of(run, data, overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def one_rank(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one rank; read only."""
    run = tmp_path_factory.mktemp("one") / "run"
    (process,) = start(run)
    assert process.wait() == 0, process.err
    assert list(losses(run)) == list(range(1, STEPS + 1))
    return run


def end(ranks: list[Process], code: int = 0) -> None:
    for rank in ranks:
        assert rank.wait() == code, f"{rank.code}\n{rank.out}\n{rank.err}"
        assert "Traceback" not in rank.err


def close(losses: list[float]) -> Any:
    return pytest.approx(losses, rel=1e-6, abs=0)


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def bad_samples(run: Path, ranks: int) -> dict[str, int]:
    """The bad samples that the ranks met in the steps of the run, and where; loaders are a little ahead of the step."""
    names = ["bad_samples.jsonl"] if ranks == 1 else [f"bad_samples.rank{rank}.jsonl" for rank in range(ranks)]
    met: dict[str, int] = {}
    for name in names:
        for line in (run / name).read_text().splitlines():
            bad = json.loads(line)
            if bad["step"] < STEPS:
                met[bad["key"]] = min(bad["step"], met.get(bad["key"], STEPS))
    return met


def test_four_ranks_train_as_one_and_see_the_same_samples(start: Start, one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start(run, 4)
    end(ranks)
    one = list(losses(one_rank).values())
    assert len(set(one)) == STEPS
    assert list(losses(run).values()) == close(one)
    assert bad_samples(run, 4) == bad_samples(one_rank, 1)
    assert len(bad_samples(run, 4)) > 4
    assert all(not rank.out and not rank.err for rank in ranks[1:]), "only the first rank speaks"
    assert json.loads((run / "environment.json").read_text())["ranks"] == 4


def test_torchrun_stopped_resumed(start: Start, dented: Path, one_rank: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun itself: it hands the signal on, the ranks agree on a step, one checkpoint holds it."""
    run = tmp_path / "run"
    process = torchrun(run, dented, train__log_every=3)
    try:
        while lines(run) < 1:
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:  # where it went wrong, the ranks must not outlive torchrun
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
    assert process.returncode == 1  # torchrun's own; the ranks' is in what it prints, if it still waits for that
    reached = checkpoints(run)[-1]
    preempted = re.findall(r"mvp-fast train: preempted: .* step (\d+) of", err)
    assert preempted == [str(reached)] * 2, err
    assert checkpoints(run) == ([reached] if reached <= 4 else [4, reached])
    end(start(run, 2, resume="auto", train__log_every=3))
    by_step = list(losses(one_rank).values())
    assert [line["step"] for line in read_metrics(run)] == [3, 6, 8]
    assert list(losses(run).values()) == close([sum(by_step[:3]) / 3, sum(by_step[3:6]) / 3, sum(by_step[6:]) / 2])
    # The steps between metric lines are means over the ranks in a checkpoint too, not those of the rank that writes it.
    if reached <= 4:
        (progress,) = (run / "checkpoints" / "step-00000004" / "progress").glob("*.safetensors")
        assert load_file(progress)["losses"].tolist() == close([by_step[3]])


def test_signal_to_one_rank_of_a_run_begun_with_one(start: Start, one_rank: Path, tmp_path: Path) -> None:
    """Two ranks go on from one rank's checkpoint; one of them gets SIGTERM, both stop at the same step; one goes on."""
    run = tmp_path / "run"
    shutil.copytree(one_rank, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    ranks = start(run, 2, resume="auto")
    ranks[0].wait_until(lambda: lines(run) in (5, 6))
    ranks[1].send(signal.SIGTERM)
    end(ranks, 75)
    reached = checkpoints(run)[-1]
    assert checkpoints(run) == [4, reached]
    assert 4 < reached < STEPS
    assert f"A signal on another rank came, step {reached} of" in ranks[0].err
    assert f"SIGTERM came, step {reached} of" in ranks[1].err
    end(start(run, 1, resume="auto"))
    assert list(losses(run).items())[:4] == list(losses(one_rank).items())[:4]
    assert list(losses(run).values()) == close(list(losses(one_rank).values()))


def test_data_failure_of_one_rank_ends_all(start: Start, scenes: Path, tmp_path: Path) -> None:
    """The second rank meets a bad sample in its third batch, and none is allowed: all save step 2 and end."""
    data, run = Path(shutil.copytree(scenes, tmp_path / "scenes")), tmp_path / "run"
    index = Index.open(data)
    plan = SamplePlan(
        index,
        seed=0,
        batch_size=8,
        data=DataConfig(image_size=64),
        mask=MaskConfig(patches=6, min_block=2),
        rank=1,
        world=2,
    )
    key = spoil(index, int(plan.step(2).sample_B[1]))
    ranks = start(run, 2, data, data__bad_sample_budget=0)
    end(ranks, 3)
    assert checkpoints(run) == [2]
    assert lines(run) == 2
    assert [rank.err.count("\n") for rank in ranks] == [1, 1]
    assert ranks[0].err.startswith("mvp-fast train: data error: Another rank's data failed")
    assert ranks[1].err.startswith("mvp-fast train: data error: 1 of the ")
    assert key in ranks[1].err
    assert [json.loads(line)["key"] for line in (run / "bad_samples.rank1.jsonl").read_text().splitlines()] == [key]
    assert not (run / "bad_samples.rank0.jsonl").exists()


def test_ranks_with_different_checkpoints_refuse(start: Start, one_rank: Path, tmp_path: Path) -> None:
    """As on machines that don't share the run's folder: the ranks would train apart."""
    alone = tmp_path / "alone"
    ranks = start(tmp_path, 2, folders=[one_rank, alone], resume="auto", train__steps=STEPS + 4)
    end(ranks, 4)
    assert all("The ranks don't see the same checkpoints" in rank.err for rank in ranks)
    assert not alone.exists()
    assert checkpoints(one_rank) == [4, 8]


def test_reductions_leave_nothing_to_gloos_thread() -> None:
    """Or a process that ends right after one hangs now and then: freeing the group waits for that thread."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for number in range(2000):
            tensor = torch.tensor(number)
            all_reduce(tensor, dist.ReduceOp.MAX)
            assert tensor._use_count() == 1
            assert int(tensor) == number
    finally:
        dist.destroy_process_group()
