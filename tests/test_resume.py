"""Stopped and resumed runs, in processes of their own: killed, signalled, gone on with from any checkpoint.

The measure is bit-identity with the run that nobody stopped: each step's loss as metrics.jsonl has it, and every tensor
of the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, Launcher, Process, arguments, losses, read_metrics

STEPS = 14  # more than the 12 of an epoch
SETTINGS = {
    **TINY,
    "student.drop-path": 0.3,
    "train.accumulate": 2,
    "train.ema-decay": 0.9,
    "train.steps": STEPS,
    "train.checkpoint-every": 2,
    "train.keep-checkpoints": 0,
}
Start = Callable[..., Process]


@pytest.fixture(scope="module")
def start(scenes: Path, launcher: Launcher) -> Start:
    """Start a run in a folder; keywords override settings, `__` standing for the dot."""

    def call(run: Path, **overrides: Any) -> Process:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        return launcher.start("train", *arguments({**SETTINGS, "data.index": scenes, "run.dir": run, **named}))

    return call


@pytest.fixture(scope="module", params=["dali", "torchvision"])
def loader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole_runs(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each loader a run that nobody stopped, with all its checkpoints; read only."""
    runs = {name: tmp_path_factory.mktemp("whole") / name for name in ("dali", "torchvision")}
    for process in [start(run, data__loader=name) for name, run in runs.items()]:
        assert process.wait() == 0, process.err
    for run in runs.values():
        assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
        assert [name for name, _ in checkpoints(run)] == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    return runs


@pytest.fixture(scope="module")
def seed() -> int:
    seed = int(os.environ.get("MVP_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"MVP_TEST_SEED={seed}")
    return seed


def checkpoints(run: Path) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted((run / "checkpoints").iterdir())]


def lines(run: Path) -> int:
    """Whole lines in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by part, file and name."""
    return {
        f"{file.relative_to(checkpoint)}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_tensors(one: Path, other: Path, but: str = "none") -> None:
    ones, others = (
        {name: value for name, value in tensors(path).items() if not name.startswith(but)} for path in (one, other)
    )
    assert ones.keys() == others.keys()
    for part in ("student/", "optimizer/", "ema/"):
        assert any(name.startswith(part) for name in ones)
    for name, value in ones.items():
        assert torch.equal(value, others[name]), name


def assert_same_run(run: Path, whole: Path) -> None:
    """Each step once, in order, with the very loss, and the very weights, averages and optimizer state at the end."""
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == list(losses(whole).items())
    assert_same_tensors(run / "checkpoints" / f"step-{STEPS:08d}", whole / "checkpoints" / f"step-{STEPS:08d}")


def all_threads_stopped(pid: int) -> bool:
    """Whether a stop signal has reached all threads (or they have ended)."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(state in "TZX" for state in states)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder: time of its last change, content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def test_the_measure_can_fail(whole_runs: dict[str, Path]) -> None:
    """Bit-identity says something only where steps, loaders, and weights and their average differ."""
    assert len({loss for run in whole_runs.values() for loss in losses(run).values()}) == 2 * STEPS
    for run in whole_runs.values():
        *_, before, last = (tensors(path) for _, path in checkpoints(run))
        for part in ("student", "ema", "optimizer"):
            assert any(not torch.equal(value, before[name]) for name, value in last.items() if name.startswith(part))
        weights = {name.partition(":")[2]: value for name, value in last.items() if name.startswith("student")}
        averages = {name.partition(":")[2]: value for name, value in last.items() if name.startswith("ema")}
        assert weights.keys() == averages.keys()
        assert any(not torch.equal(weights[name], averages[name]) for name in weights)


def test_killed_twice_and_resumed(
    loader: str, start: Start, whole_runs: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    """SIGKILL at a random step, and again while a checkpoint is being written: nothing differs afterwards."""
    chance, run = random.Random(f"{seed} {loader}"), tmp_path / "run"
    first = chance.randint(1, 6)
    process = start(run, data__loader=loader)
    process.wait_until(lambda: lines(run) >= first)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    # A checkpoint every step, the other settings unchanged: that is when it is written, not what is in it.
    process = start(run, data__loader=loader, resume="auto", train__checkpoint_every=1)
    second = chance.randint(7, 10)

    def stopped_while_writing() -> bool:
        if lines(run) < second or not list((run / "checkpoints").glob(".step-*.partial")):
            return False
        os.kill(process.pid, signal.SIGSTOP)
        while not all_threads_stopped(process.pid):
            time.sleep(0.001)
        if list((run / "checkpoints").glob(".step-*.partial")):
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    process.wait_until(stopped_while_writing)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list((run / "checkpoints").glob(".step-*.partial"))

    process = start(run, data__loader=loader, resume="auto")
    assert process.wait() == 0, process.err
    resumed_at = int(process.out.split("resumed   at step ")[1].split()[0])
    assert second - 2 <= resumed_at < STEPS, "from the newest whole checkpoint, at most two steps before the kill"
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_run(run, whole_runs[loader])


def test_signals_between_metric_lines(start: Start, whole_runs: dict[str, Path], tmp_path: Path, seed: int) -> None:
    """A line is the mean of three steps; SIGTERM and SIGINT come anywhere between them, checkpoints every fourth."""
    run, chance = tmp_path / "run", random.Random(f"{seed} signals")
    settings = {"data__loader": "torchvision", "train__log_every": 3, "train__checkpoint_every": 4}
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(run, resume="auto" if reached else "none", **settings)
        wanted = reached // 3 + chance.randint(1, 2)
        process.wait_until(lambda wanted=wanted: lines(run) >= wanted)
        process.send(number)
        assert process.wait() == 75
        assert "Traceback" not in process.err
        paragraph = process.err.strip().splitlines()
        assert len(paragraph) == 1, process.err
        newest = checkpoints(run)[-1][1]
        reached = json.loads((newest / "state.json").read_text())["step"]
        assert paragraph[0].startswith("mvp-fast train: preempted: ")
        assert f"{number.name} came, step {reached} of {STEPS} was finished" in paragraph[0]
        assert "--resume auto" in paragraph[0]
        assert newest.name == f"step-{reached:08d}"
        assert [line["step"] for line in read_metrics(run)] == [*range(3, reached + 1, 3)]
        # The checkpoint has the very state of the run that was not stopped, and the steps not yet in a metric line.
        if reached % 2 == 0:
            assert_same_tensors(newest, whole_runs["torchvision"] / "checkpoints" / newest.name, but="progress/")
        assert len(load_file(next((newest / "progress").glob("*.safetensors")))["losses"]) == reached % 3
    process = start(run, resume="auto", **settings)
    assert process.wait() == 0, process.err
    by_step = losses(whole_runs["torchvision"])
    groups = [(3, (1, 2, 3)), (6, (4, 5, 6)), (9, (7, 8, 9)), (12, (10, 11, 12)), (14, (13, 14))]
    expected = [(last, sum(by_step[step] for step in steps) / len(steps)) for last, steps in groups]
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == expected
    last = f"checkpoints/step-{STEPS:08d}"
    assert_same_tensors(run / last, whole_runs["torchvision"] / last)


def test_signal_before_the_first_step(start: Start, whole_runs: dict[str, Path], tmp_path: Path) -> None:
    """While the run is being built the signal is noted: the checkpoint is that of step 0, and a resumed run starts."""
    run = tmp_path / "run"
    process = start(run, data__loader="torchvision")
    process.wait_until(lambda: catches(process.pid, signal.SIGTERM))  # about a second before the first step
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.err
    assert f"step 0 of {STEPS} was finished" in process.err
    assert [name for name, _ in checkpoints(run)] == ["step-00000000"]
    assert lines(run) == 0
    process = start(run, data__loader="torchvision", resume="auto")
    process.wait_until(lambda: lines(run) >= 2)
    process.send(signal.SIGTERM)
    assert process.wait() == 75
    found = list(losses(run).items())
    assert found == list(losses(whole_runs["torchvision"]).items())[: len(found)]


@pytest.fixture
def copied(whole_runs: dict[str, Path], tmp_path: Path) -> Path:
    """The whole torchvision run, to be changed."""
    return Path(shutil.copytree(whole_runs["torchvision"], tmp_path / "copied"))


def test_a_new_run_refuses_the_folder_of_another(start: Start, copied: Path) -> None:
    (copied / "checkpoints" / ".step-00000099.partial").mkdir()
    before = snapshot(copied)
    process = start(copied, data__loader="torchvision", train__steps=20)
    assert process.wait() == 2
    assert process.err.count("\n") == 1
    assert "configuration error: The folder already holds a run" in process.err
    assert "--resume auto" in process.err
    assert snapshot(copied) == before


def test_older_checkpoint_by_path(start: Start, copied: Path, whole_runs: dict[str, Path]) -> None:
    """The run goes on from there; its later lines and checkpoints are those of the new course, the old set aside."""
    wrong = copied / "checkpoints" / "step-00000014" / "student"
    for file in wrong.glob("*.safetensors"):
        file.write_bytes(b"of a course that the run left")
    process = start(copied, data__loader="torchvision", resume=copied / "checkpoints" / "step-00000010")
    assert process.wait() == 0, process.err
    assert "resumed   at step 10 " in process.out
    assert_same_run(copied, whole_runs["torchvision"])
    aside = [name for name, _ in checkpoints(copied) if name.startswith("superseded-")]
    assert aside == ["superseded-step-00000012", "superseded-step-00000014"]


def test_complete_run_and_longer_run(start: Start, copied: Path, whole_runs: dict[str, Path], tmp_path: Path) -> None:
    """At its last step a run says that it is complete; with more steps it goes on, in its folder or in a new one."""
    leftover = copied / "checkpoints" / ".step-00000016.partial"
    shutil.copytree(copied / "checkpoints" / "step-00000002", leftover)  # looks whole, but was never renamed
    metrics = (copied / "metrics.jsonl").read_bytes()
    process = start(copied, data__loader="torchvision", resume="auto")
    assert process.wait() == 0, process.err
    assert f"The run is complete: {STEPS} steps" in process.out
    assert (copied / "metrics.jsonl").read_bytes() == metrics

    whole, other = whole_runs["torchvision"], tmp_path / "other"
    longer = [
        start(copied, data__loader="torchvision", resume="auto", train__steps=16),
        start(other, data__loader="torchvision", resume=whole, train__steps=16),
    ]
    for process in longer:
        assert process.wait() == 0, process.err
        assert f"resumed   at step {STEPS} " in process.out
    assert list(losses(copied)) == list(range(1, 17))
    assert list(losses(copied).items())[:STEPS] == list(losses(whole).items())
    assert list(losses(copied).items())[STEPS:] == list(losses(other).items())
    assert_same_tensors(copied / "checkpoints" / "step-00000016", other / "checkpoints" / "step-00000016")
    assert not leftover.exists()
