"""A fine-tuned run as a timm model with its head: the same classifier, which timm loads, and which can be a teacher."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mvp_fast.cli.main import main
from mvp_fast.evaluate.finetune.export import load_classifier
from mvp_fast.train.checkpoint import find_checkpoint


def call(*words: Any, code: int = 0) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            ended = main([str(word) for word in words])
        except SystemExit as end:
            ended = int(end.code or 0)
    assert ended == code, f"exit {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue() + err.getvalue()


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BEiT from fresh weights, trained for two steps with averaged weights."""
    folder = tmp_path_factory.mktemp("finetuned")
    words: dict[str, Any] = {
        "--data.index": scenes,
        "--data.image-size": 64,
        "--finetune.test": scenes,
        "--run.dir": folder / "run",
        "--run.tensorboard": False,
        "--augmentation.rand-augment": "",
        "--augmentation.mixup": 0,
        "--augmentation.cutmix": 0,
        "--train.steps": 2,
        "--train.batch-size": 8,
        "--train.precision": "fp32",
        "--train.ema-decay": 0.5,
        "--optim.lr": 0.1,
    }
    start = ["finetune", "vit_tiny_patch16_224", "--from-scratch"]
    call(*start, *(word for pair in words.items() for word in pair))
    return folder / "run"


@pytest.mark.parametrize("ema", [False, True])
def test_timm_loads_the_same_classifier(run: Path, ema: bool, tmp_path: Path) -> None:
    said = call("export", run, "--out", tmp_path / "model", *(["--ema"] if ema else []))
    assert "10 classes" in said
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    own, network, state = load_classifier(find_checkpoint(run), ema)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), own(images), rtol=1e-6, atol=1e-6)
    assert model.pretrained_cfg["label_names"] == state["classes"]
    assert tuple(model.pretrained_cfg["mean"]) == network.mean
    assert model.num_classes == 10


def test_averaged_weights_are_others(run: Path) -> None:
    plain, averaged = (load_classifier(find_checkpoint(run), ema)[0] for ema in (False, True))
    assert not torch.equal(plain.blocks[0].attn.qkv.weight, averaged.blocks[0].attn.qkv.weight)


def test_the_card_says_what_it_is(run: Path) -> None:
    call("export", run, "--license", "cc-by-4.0")
    card = (run / "export" / "timm" / "README.md").read_text()
    accuracy = json.loads((run / "results.json").read_text())["test"]["accuracy"]
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert f"Top-1 accuracy {100 * accuracy:.2f} %" in card
    assert "2 of 2 steps" in card
    assert str(run) not in card


def test_the_cards_code_runs(run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("export", run, "--out", tmp_path)
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    picture = next(scenes.rglob("*.jpg"))
    (tmp_path / "image.jpg").write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().strip() in load_classifier(find_checkpoint(run))[2]["classes"]


def test_it_can_be_a_teacher(run: Path, scenes: Path, tmp_path: Path) -> None:
    call("export", run, "--out", tmp_path / "model")
    words: dict[str, Any] = {
        "--teacher.kind": "timm",
        "--teacher.pretrained": tmp_path / "model",
        "--data.index": scenes,
        "--data.image-size": 64,
        "--mask.patches": 6,
        "--mask.min-block": 2,
        "--student.width": 48,
        "--student.depth": 2,
        "--student.heads": 3,
        "--train.steps": 1,
        "--train.batch-size": 8,
        "--train.precision": "fp32",
        "--run.dir": tmp_path / "student",
        "--run.tensorboard": False,
    }
    call("train", *(word for pair in words.items() for word in pair))
    assert (tmp_path / "student" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("words", "named"), [(["--format", "hf"], "--format hf"), (["--num-classes", 3], "--num-classes 3")]
)
def test_what_it_can_not_be_is_said(run: Path, words: list[Any], named: str) -> None:
    said = call("export", run, *words, code=2)
    assert named in said
    assert said.count("\n") == 1


def test_a_run_of_another_task_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = find_checkpoint(copy) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": "segment"}))
    assert "this run's task is segment" in call("export", copy, code=2)
