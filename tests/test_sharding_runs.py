"""Whole runs with train.sharding full, a process a rank: one rank's curve, checkpoints that anyone goes on from."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvp_fast.train.checkpoint import load_student
from tests.conftest import TINY, Launcher, Process, arguments, losses

STEPS = 8
SETTINGS = {
    **TINY,
    "data.loader": "torchvision",
    "data.threads": 1,
    "student.drop-path": 0.3,
    "train.sharding": "full",
    "train.ema-decay": 0.9,
    "train.accumulate": 2,
    "train.steps": STEPS,
    "train.checkpoint-every": 2,
    "train.keep-checkpoints": 0,
    "optim.clip-grad": 0.5,
}
Start = Callable[..., list[Process]]


@pytest.fixture(scope="module")
def start(launcher: Launcher, scenes: Path) -> Start:
    """Start the ranks of a run; keywords override settings, `__` standing for the dot."""

    def call(run: Path, world: int, **overrides: Any) -> list[Process]:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        words = arguments({**SETTINGS, "data.index": scenes, "run.dir": run, **named})
        return launcher.start_ranks([["train", *words]] * world)

    return call


def end(ranks: list[Process], code: int = 0) -> None:
    for rank in ranks:
        assert rank.wait() == code, f"{rank.code}\n{rank.out}\n{rank.err}"
        assert "Traceback" not in rank.err


@pytest.fixture(scope="module")
def sharded(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of two ranks that share the student; read only."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    ranks = start(run, 2)
    end(ranks)
    assert "sharding  full: weights, gradients and optimizer state in 2 parts" in ranks[0].out
    return run


@pytest.fixture(scope="module")
def one_rank(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of one rank; read only."""
    run = tmp_path_factory.mktemp("one") / "run"
    (process,) = start(run, 1)
    end([process])
    assert "sharding  full has no effect: there is one rank" in process.out
    return run


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by part and name."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file.parent.name}:{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Adam divides what it is given by its size: a gradient that is all but 0 leaves the same step or its opposite."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype), name
        difference = (tensor.double() - theirs[name].double()).norm()
        assert difference <= 1e-4 * theirs[name].double().norm(), f"{name}: {difference}"


def close(losses: dict[int, float]) -> Any:
    return pytest.approx(losses, rel=1e-6, abs=0)


def cut(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was at a step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:step]))
    return copy


def test_two_ranks_that_share_train_as_one(sharded: Path, one_rank: Path) -> None:
    assert len(set(losses(one_rank).values())) == STEPS
    assert losses(sharded) == close(losses(one_rank))
    for step in (2, STEPS):
        assert_close(tensors(sharded, step), tensors(one_rank, step))
    parts = {path.name for path in (sharded / "checkpoints" / "step-00000008").iterdir()}
    assert parts == {"state.json", "student", "optimizer", "progress", "ema"}
    state = json.loads((sharded / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["config"]["train"]["sharding"] == "full"


@pytest.mark.parametrize(("world", "sharding"), [(1, "full"), (2, "none"), (4, "full")])
def test_others_go_on_from_it(
    start: Start, sharded: Path, one_rank: Path, tmp_path: Path, world: int, sharding: str
) -> None:
    """One rank, two with DDP, four that share."""
    run = cut(sharded, tmp_path / "run", 4)
    ranks = start(run, world, resume="auto", train__sharding=sharding)
    end(ranks)
    assert "resumed   at step 4 " in ranks[0].out
    assert "changed" not in ranks[0].out
    assert losses(run) == close(losses(one_rank))
    assert_close(tensors(run, STEPS), tensors(one_rank, STEPS))


def test_it_goes_on_from_others(start: Start, one_rank: Path, tmp_path: Path) -> None:
    run = cut(one_rank, tmp_path / "run", 4)
    end(start(run, 2, resume="auto"))
    assert losses(run) == close(losses(one_rank))
    assert_close(tensors(run, STEPS), tensors(one_rank, STEPS))


def test_killed_and_resumed(start: Start, sharded: Path, tmp_path: Path) -> None:
    """SIGKILL to one rank and then the other: what follows is bit for bit what it would have been."""
    run = tmp_path / "run"
    ranks = start(run, 2)
    ranks[0].wait_until(lambda: len(list((run / "checkpoints").glob("step-*"))) >= 2)
    for rank in reversed(ranks):
        if rank.poll() is None:  # the other may have noticed already
            rank.send(signal.SIGKILL)
        assert rank.wait() != 0
    ranks = start(run, 2, resume="auto")
    end(ranks)
    assert 4 <= int(ranks[0].out.split("resumed   at step ")[1].split()[0]) < STEPS
    assert losses(run) == losses(sharded)
    ours, theirs = tensors(run, STEPS), tensors(sharded, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_export(launcher: Launcher, sharded: Path, tmp_path: Path) -> None:
    launcher.run("export", sharded, "--format", "timm", "--out", tmp_path / "out")
    student, _, step = load_student(sharded)
    assert step == STEPS
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["blocks.1.mlp.fc1.weight"], student.blocks[1].mlp.fc1.weight)
    averaged, _, _ = load_student(sharded, ema=True)
    assert not torch.equal(averaged.blocks[1].mlp.fc1.weight, student.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["adam", "nadamw", "lion", "lamb"])
def test_optimizers(start: Start, tmp_path: Path, name: str) -> None:
    """Shared or not, each optimizer takes the same steps, and can go on."""
    settings = {"optim__name": name, "train__steps": 4, "optim__lr": 1e-4}
    for run, sharding in (("ddp", "none"), ("shared", "full")):
        end(start(tmp_path / run, 2, train__sharding=sharding, **settings))
    assert losses(tmp_path / "shared") == close(losses(tmp_path / "ddp"))
    run = cut(tmp_path / "shared", tmp_path / "resumed", 2)
    end(start(run, 2, resume="auto", **settings))
    assert losses(run) == losses(tmp_path / "shared")


def test_an_optimizer_that_needs_whole_weights_is_refused(start: Start, tmp_path: Path) -> None:
    ranks = start(tmp_path / "run", 2, optim__name="muon")
    end(ranks, 2)
    assert "train.sharding" in ranks[0].err
    assert "muon" in ranks[0].err
    assert not (tmp_path / "run").exists()
