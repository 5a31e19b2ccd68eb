"""Whole fine-tuning runs, in processes of their own: what they learn, resume, ranks, and the ways they refuse.

The measure of resume is bit-identity with the run that nobody stopped, with all of the augmentation on.
"""

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

from mvp_fast.evaluate.backbone import BackboneSource, load_backbone
from mvp_fast.evaluate.results import read_results
from tests.conftest import TINY, Launcher, Process, arguments, read_metrics, run_verb

STEPS = 10
COMMON = {name: value for name, value in TINY.items() if not name.startswith(("mask", "student", "teacher"))}
COMMON |= {"data.loader": "torchvision", "data.threads": 1}
SETTINGS = {
    **COMMON,
    "optim.lr": 2e-3,
    "finetune.head-init-scale": 1.0,
    "finetune.evaluate-every": 0.34,  # of 12 steps an epoch
    "finetune.drop-path": 0.3,
    "augmentation.mixup-prob": 0.8,
    "augmentation.random-erasing": 0.5,
    "train.accumulate": 2,
    "train.ema-decay": 0.9,
    "train.steps": STEPS,
    "train.checkpoint-every": 2,
    "train.keep-checkpoints": 0,
}
PLAIN = {
    "augmentation.rand-augment": "",
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0,
    "augmentation.random-erasing": 0,
    "augmentation.label-smoothing": 0,
    "finetune.drop-path": 0,
    "data.flip": 0,
}
Start = Callable[..., list[Process]]


def index_of(folder: Path) -> Path:
    run_verb("data", "index", folder)
    return folder


@pytest.fixture(scope="module")
def held_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_set")
    run_verb("data", "scenes", "--out", folder, "--images", 30, "--profile", "small", "--workers", 1, "--seed", 9)
    return index_of(folder)


@pytest.fixture(scope="module")
def pretrained(scenes: Path, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `mvp-fast train` of two steps, with averaged weights."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    settings = {**TINY, "data.index": scenes, "run.dir": run, "train.steps": 2, "train.ema-decay": 0.5}
    launcher.run("train", *arguments({**settings, "data.loader": "torchvision", "optim.lr": 0.01}))
    return run


@pytest.fixture(scope="module")
def start(scenes: Path, held_set: Path, pretrained: Path, launcher: Launcher) -> Start:
    """Start a fine-tuning run; keywords override settings, `__` standing for the dot."""

    def call(
        run: Path, ranks: int = 1, model: Any = pretrained, words: tuple[Any, ...] = (), **overrides: Any
    ) -> list[Process]:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        settings = {**SETTINGS, "data.index": scenes, "finetune.test": held_set, "run.dir": run, **named}
        return launcher.start_ranks([["finetune", model, *arguments(settings), *words]] * ranks)

    return call


def end(processes: list[Process], code: int = 0) -> Process:
    for process in processes:
        assert process.wait() == code, f"exit {process.code}\n{process.out}\n{process.err}"
    return processes[0]


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = end(start(run))
    assert "recipe    layer decay 0.65, drop path 0.3, rand-m9-mstd0.5-inc1, mixup 0.8, cutmix 1" in process.out
    assert "averaged top-1" in process.out
    return run


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "test_top1" in line]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{file.parent.name} {name}": tensor
        for file in last.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def figures(run: Path) -> dict[str, Any]:
    content = read_results(run / "results.json")
    return {name: content[name] for name in ("backbone", "step", "data", "images", "undecoded", "test", "ema")}


def test_what_a_run_leaves(whole: Path, pretrained: Path, held_set: Path) -> None:
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    assert len(set(losses(whole).values())) == STEPS
    assert [line["step"] for line in evaluations(whole)] == [5, 9, 10]
    content = read_results(whole / "results.json")
    assert content["verb"] == "finetune"
    backbone = load_backbone(BackboneSource(str(pretrained)))
    assert content["backbone"] == {"words": backbone.words, "fingerprint": backbone.fingerprint, "step": 2}
    assert (content["images"], content["undecoded"]) == ({"train": 96, "test": 30}, {"test": 0})
    last = evaluations(whole)[-1]
    for name in ("test", "ema"):
        told = content[name]
        assert told["accuracy"] == last[f"{name}_top1"]
        assert (told["accuracy_top5"], told["loss"]) == (last[f"{name}_top5"], last[f"{name}_loss"])
        assert len(told["per_class"]) == 10
    state = json.loads((whole / "checkpoints" / "step-00000010" / "state.json").read_text())
    assert (state["task"], len(state["classes"])) == ("finetune", 10)
    assert f"name: {pretrained}" in (whole / "config.yaml").read_text()


def test_killed_and_resumed(start: Start, whole: Path, tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM, another number of processes each time: nothing differs afterwards."""
    run = tmp_path / "run"
    (process,) = start(run, augmentation__workers=2)
    process.wait_until(lambda: (run / "checkpoints" / "step-00000002").is_dir())
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (process,) = start(run, resume="auto", data__threads=2)
    process.wait_until(lambda: len(losses(run)) >= 5)
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.err
    assert not (run / "results.json").exists()
    assert "resumed   at step" in end(start(run, resume="auto")).out
    assert losses(run) == losses(whole)
    same, other = tensors(run), tensors(whole)
    assert same.keys() == other.keys()
    assert {"model", "ema", "optimizer", "progress"} == {name.split()[0] for name in same}
    for name, tensor in same.items():
        assert torch.equal(tensor, other[name]), name
    assert any(not torch.equal(same[name], same[name.replace("model ", "ema ")]) for name in same if "model " in name)
    assert figures(run) == figures(whole)


def test_two_ranks_are_one(start: Start, whole: Path, tmp_path: Path) -> None:
    """Pairs, boxes, noise and dropped branches are the plan's: what differs is the order of sums."""
    run = tmp_path / "run"
    end(start(run, 2))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    for one, two in zip(evaluations(whole), evaluations(run), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert figures(run)["data"] == figures(whole)["data"]


def test_results_that_are_missing_are_written(start: Start, whole: Path, tmp_path: Path) -> None:
    """As where the process died after its last checkpoint; and a complete run with its results is left as it is."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    assert "The run is complete" in end(start(run, resume="auto")).out
    assert figures(run) == figures(whole)
    written = (run / "results.json").stat().st_mtime_ns
    end(start(run, resume="auto"))
    assert (run / "results.json").stat().st_mtime_ns == written
    assert "another objective, optimizer or network" in end(start(run, model="x", resume="auto"), 2).err


def test_it_learns_a_small_set(start: Start, scenes: Path, tmp_path: Path) -> None:
    """12 images of 3 classes, tested on themselves; from fresh weights of the same shape, and a part of the labels."""
    folder = tmp_path / "set"
    for name in ("circle", "star", "cross"):
        (folder / name).mkdir(parents=True)
        for file in sorted((scenes / name).glob("*.jpg"))[:4]:
            shutil.copy(file, folder / name)
    index_of(folder)
    settings = {
        **{name.replace(".", "__").replace("-", "_"): value for name, value in PLAIN.items()},
        "data__index": folder,
        "finetune__test": folder,
        "finetune__evaluate_every": 0,
        "train__batch_size": 12,
        "train__ema_decay": 0,
        "finetune__layer_decay": 1,
        "optim__lr": 4e-3,
        "train__steps": 80,
        "train__log_every": 80,
        "train__checkpoint_every": 0,
        "words": ("--data.crop-scale", 0.8, 1),
        "optim__reference_batch_size": 12,
    }
    end(start(tmp_path / "run", **settings))
    content = read_results(tmp_path / "run" / "results.json")
    assert content["test"]["accuracy"] >= 11 / 12
    assert "accuracy_top5" not in content["test"]
    assert "ema" not in content
    part = {**settings, "train__steps": 2, "train__batch_size": 4, "finetune__label_fraction": 0.5}
    out = end(start(tmp_path / "part", model__untrained=True, **part)).out
    assert "6 images (50 % of 12) of 3 classes" in out
    assert "fresh weights (seed 0) in the shape of" in out
    content = read_results(tmp_path / "part" / "results.json")
    assert content["images"]["train"] == 6
    assert content["data"]["train"]["of"] == 12
    assert content["backbone"]["fingerprint"] != figures_of(tmp_path / "run")


def figures_of(run: Path) -> str:
    return str(read_results(run / "results.json")["backbone"]["fingerprint"])


def test_what_a_run_begins_from(
    start: Start, whole: Path, pretrained: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """A run, its export, its averaged weights, a fine-tuned run, a timm model: told by their fingerprints."""
    launcher.run("export", pretrained, "--format", "timm", "--out", tmp_path / "export")
    brief = {"train__steps": 1, "train__checkpoint_every": 0, "train__ema_decay": 0, "finetune__evaluate_every": 0}
    brief |= {"augmentation__rand_augment": ""}
    tuned = load_backbone(BackboneSource(str(whole)))
    assert tuned.step == STEPS
    assert not any(name.startswith("head") for name in tuned.model.state_dict())
    weights = tensors(whole)
    for name, tensor in tuned.model.state_dict().items():
        assert torch.equal(tensor, weights[f"model {name}"])
    expected = {
        str(pretrained): load_backbone(BackboneSource(str(pretrained))).fingerprint,
        str(tmp_path / "export"): load_backbone(BackboneSource(str(pretrained))).fingerprint,
        str(whole): tuned.fingerprint,
    }
    started = [start(tmp_path / str(number), model=name, **brief) for number, name in enumerate(expected)]
    for number, fingerprint in enumerate(expected.values()):
        end(started[number])
        run = tmp_path / str(number)
        assert figures_of(run) == fingerprint
        again = load_backbone(BackboneSource(str(run)))
        assert (again.grid, again.width) == ((4, 4), 64)
    averaged = load_backbone(BackboneSource(str(whole), ema=True))
    assert averaged.fingerprint != tuned.fingerprint
    end(start(tmp_path / "timm", model="vit_tiny_patch16_224", model__untrained=True, **brief))
    assert load_backbone(BackboneSource(str(tmp_path / "timm"))).width == 192


def test_a_bad_test_set_loses_nothing(start: Start, held_set: Path, tmp_path: Path) -> None:
    """Training goes on to its last checkpoint; then the failure is told, and a mended set is tested."""
    folder, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(held_set, folder)
    good = {file: file.read_bytes() for file in sorted((folder / "star").glob("*.jpg"))}
    for file, data in good.items():
        file.write_bytes(bytes(len(data)))
    settings = {"finetune__test": folder, "train__steps": 2, "finetune__evaluate_every": 0.08}
    process = end(start(run, augmentation__rand_augment="", **settings), 3)
    assert process.err.splitlines()[0].startswith("the test failed, training goes on: ")
    assert process.err.splitlines()[-1].startswith("mvp-fast finetune: data error: ")
    assert list(losses(run)) == [1, 2]
    assert (run / "bad_test_samples.jsonl").exists()
    assert not (run / "results.json").exists()
    for file, data in good.items():
        file.write_bytes(data)
    end(start(run, augmentation__rand_augment="", resume="auto", **settings))
    assert read_results(run / "results.json")["images"]["test"] == 30


def test_refusals(start: Start, scenes: Path, held_set: Path, tmp_path: Path) -> None:
    """Bad input: one paragraph and the documented exit code, and no run is begun."""
    less, flat, empty = tmp_path / "less", tmp_path / "flat", tmp_path / "empty"
    shutil.copytree(held_set, less)
    shutil.rmtree(less / "star")
    (less / "index.parquet").unlink()
    index_of(less)
    flat.mkdir()
    for file in sorted((held_set / "star").glob("*.jpg"))[:2]:
        shutil.copy(file, flat)
    index_of(flat)
    empty.mkdir()
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (3, "The test set has no image of the class 'star'", {"finetune__test": less}),
        (3, "In the test set the images have no class", {"finetune__test": flat}),
        (3, "There is no index here", {"finetune__test": tmp_path / "nothing"}),
        (2, "There is no run and no timm model named 'vit_tny'", {"model": "vit_tny"}),
        (3, "The run has no checkpoint", {"model": empty}),
        (2, "takes images of 64 px, but data.image-size is 96", {"data__image_size": 96}),
        (2, "can't be split into pairs to be mixed", {"train__batch_size": 6}),
        (2, "Only pre-training can spread", {"train__sharding": "full"}),
        (2, "Only pre-training can take its step as one CUDA graph", {"train__step_graph": True}),
        (2, "timm knows no RandAugment", {"augmentation__rand_augment": "rnd"}),
    ]
    runs = [(case, start(tmp_path / f"run{number}", **case[2])) for number, case in enumerate(cases)]
    for number, ((code, message, _), processes) in enumerate(runs):
        process = end(processes, code)
        assert message in process.err
        assert process.err.startswith("mvp-fast finetune: ")
        assert process.err.count("\n") == 1
        assert not (tmp_path / f"run{number}").exists()
