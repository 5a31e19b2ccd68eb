"""Model cards: what they say is what is in the run's folder, no path of this machine is in them, their code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from mvp_fast.cli.main import main
from mvp_fast.config.schema import TeacherConfig
from mvp_fast.evaluate.backbone import BackboneSource, load_backbone
from mvp_fast.evaluate.results import write_results
from mvp_fast.export.card import model_card
from mvp_fast.export.provenance import flat, read_provenance, without_places
from mvp_fast.export.timm_format import timm_model
from mvp_fast.train.checkpoint import find_checkpoint, read_state
from tests.conftest import TINY, Launcher, arguments, losses
from tests.export_cases import INDEX, SIZE, TEACHER, write_run

FILE = TeacherConfig(name="ViT-B-16", pretrained="/secret/place/weights.pt")


def card_of(run: Path, *options: str) -> str:
    assert main(["export", str(run), *options]) == 0
    form = options[options.index("--format") + 1] if "--format" in options else "timm"
    return (run / "export" / form / "README.md").read_text()


def section(card: str, title: str) -> str:
    """The text under a heading, up to the next of its level."""
    return re.split(r"^## ", card.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, str]:
    """The rows of a table of two columns."""
    found = re.findall(r"^\| (.+?) \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: value for name, value in found if name.strip()}


def run_code(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's block of Python in a folder that holds an image."""
    (code,) = re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)
    picture = np.random.default_rng().integers(0, 256, (75, 100, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_what_the_card_says(form: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, FILE)
    card = card_of(run, "--format", form, "--checkpoint", "3")
    library = {"timm": "timm", "hf": "transformers"}[form]
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == (library, "image-feature-extraction", None)
    assert {library, "masked-image-modeling"} <= set(data.tags)
    told = rows(section(card, "What was trained"))
    want = {
        "steps": "3 of 12",
        "images seen": "96 (batch 32)",
        "loss": "cosine, targets normalised by l2",
        "tokens in the loss": "masked patches, CLS",
        "masked": "75 of 16 patches, block-wise",
        "optimizer": "adamw, peak learning rate 2.34e-05, weight decay 0.05",
        "weights": "of the last step, not averaged",
        "skipped updates": "1",
        "training loss": "0.3333",
        "device": "a device",
        "fingerprint": f"`{load_backbone(BackboneSource(str(run), checkpoint='3')).fingerprint}`",
    }
    assert {name: told[name] for name in want} == want
    assert f"96 images (fingerprint of the index `{INDEX}`)" in section(card, "Data")
    assert "`ViT-B-16`, weights `weights.pt`, 24 channels, frozen. Fingerprint" in section(card, "Teacher")
    assert TEACHER in section(card, "Teacher")
    assert "No evaluation of these weights" in section(card, "Results")
    versions = section(card, "Versions")
    assert "Trained with mvp_fast 0.0.9, torch 2.11.0." in versions
    assert f"timm {timm.__version__}" in versions
    for place in ("secret", str(tmp_path), str(Path.home()), "command"):
        assert place not in card
    (settings,) = re.findall(r"```yaml\n(.+?)```", card, flags=re.DOTALL)
    state = read_state(find_checkpoint(run))
    shown = yaml.safe_load(settings)
    assert shown["optim"] == {**state["config"]["optim"], "betas": list(state["config"]["optim"]["betas"])}
    assert not {"run", "resume", "kernels"} & set(shown)
    assert "index" not in shown["data"]


def test_averaged_weights_licence_and_control(tmp_path: Path) -> None:
    write_run(tmp_path, TeacherConfig(pretrained="random"))
    card = card_of(tmp_path, "--ema", "--license", "cc-by-nc-4.0")
    assert ModelCard(card).data.license == "cc-by-nc-4.0"
    assert "After 12 of 12 steps (averaged weights)" in card
    assert rows(card)["weights"] == "averaged, decay 0.99"
    assert "Its weights are random: this is a control." in card
    assert rows(card)["fingerprint"] == f"`{load_backbone(BackboneSource(str(tmp_path), ema=True)).fingerprint}`"


def test_files_that_are_missing_or_damaged_leave_their_part_out(tmp_path: Path) -> None:
    students = write_run(tmp_path)
    for name in ("metrics.jsonl", "environment.json"):
        (tmp_path / name).write_bytes(b"\xff{")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "results.json").write_text("[1")
    card = card_of(tmp_path)
    assert "An unknown number of images" in card
    assert not {"training loss", "device"} & rows(card).keys()
    assert "Trained with" not in card
    for name in ("metrics.jsonl", "environment.json"):
        (tmp_path / name).unlink()
    assert card_of(tmp_path) == card
    # A synthetic run is no training.
    state = read_state(find_checkpoint(tmp_path))
    state["config"]["data"]["loader"] = "synthetic"
    facts = read_provenance(tmp_path, state, averaged=False, fingerprint="")
    assert "of no use" in model_card(students[12, "student"], facts, form="timm")


def test_results_of_these_weights_alone(tmp_path: Path) -> None:
    """Written by the evaluations' own function, told apart by their own fingerprint."""
    write_run(tmp_path)
    latest = load_backbone(BackboneSource(str(tmp_path)))
    figures = {
        "knn": {"accuracy": 0.7251, "neighbours": 20},
        "linear": {"test_accuracy": 0.81, "best": {"block": 9, "pooling": "mean", "lr": 0.004}, "loss": 1.23456},
        "per_class_iou": list(np.linspace(0, 1, 100)),
        "folder": "/secret/place",
        "note": "a | b",
        "converged": True,
        "few_iou": [0.25, 0.5],
        "none": None,
    }
    content = {
        "backbone": {"words": f"run {tmp_path}", "fingerprint": latest.fingerprint, "step": 12},
        "data": {"train": {"index": "ef" * 32, "images": 1000, "path": str(tmp_path)}},
        "settings": {"epochs": 10},
        **figures,
    }
    write_results(tmp_path / "probe" / "results.json", "probe", content)
    other = load_backbone(BackboneSource(str(tmp_path), ema=True))
    write_results(
        tmp_path / "segment" / "results.json",
        "segment",
        {"backbone": {"fingerprint": other.fingerprint}, "miou": 0.123},
    )
    results = section(card_of(tmp_path), "Results")
    assert rows(results) == {
        "knn.accuracy": "72.5 %",
        "knn.neighbours": "20",
        "linear.test_accuracy": "81.0 %",
        "linear.best.block": "9",
        "linear.best.pooling": "mean",
        "linear.best.lr": "0.004",
        "linear.loss": "1.235",
        "note": "a \\| b",
        "converged": "yes",
        "few_iou": "25.0 % 50.0 %",
    }
    assert "### probe" in results
    assert "Data: train.index efefefefefef, train.images 1,000." in results
    assert "Settings: epochs 10." in results
    assert "Results of other weights of this run are left out: segment." in results
    averaged = section(card_of(tmp_path, "--ema"), "Results")
    assert rows(averaged) == {"miou": "12.3 %"}
    assert "left out: probe." in averaged
    assert str(tmp_path) not in results + averaged


def test_more_figures_than_fit(tmp_path: Path) -> None:
    write_run(tmp_path)
    content = {"backbone": {"fingerprint": load_backbone(BackboneSource(str(tmp_path))).fingerprint}}
    write_results(tmp_path / "x" / "results.json", "probe", {**content, **{f"figure{n}": n for n in range(45)}})
    results = section(card_of(tmp_path), "Results")
    assert list(rows(results)) == [f"figure{n}" for n in range(40)]
    assert "and 5 more figures." in results


def test_settings_without_places() -> None:
    config = {
        "run": {"dir": "/a"},
        "data": {"index": "/a/b", "loader": "cpu", "shards": ["x"]},
        "teacher": {"name": "local-dir:/a/b/clip", "pretrained": "~/w.pt", "other": {"file": "a/b", "x": 1}},
        "hub": "hf-hub:owner/name",
    }
    assert without_places(config) == {
        "data": {"loader": "cpu", "shards": ["x"]},
        "teacher": {"name": "clip", "pretrained": "w.pt", "other": {"file": "b", "x": 1}},
        "hub": "hf-hub:owner/name",
    }
    assert flat({"a": {"b": [1, 2], "c": ["/x"]}, "d": "/x/y", "e": "12" * 32, "f": [], "g": "x" * 81}) == {
        "a.b": [1, 2],
        "e": "121212121212",
    }


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_the_code_runs(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = write_run(tmp_path)[12, "student"]
    card = card_of(tmp_path, "--format", form)
    names = run_code(card, tmp_path / "export" / form, monkeypatch)
    tokens, features = names["tokens"], names["features"]
    for name, tensor in (("tokens", tokens), ("features", features)):
        (shape,) = re.findall(rf"^ *{name} = .*# (\(.+?\))", card, flags=re.MULTILINE)
        assert str(tuple(tensor.shape)) == shape
    assert tokens.shape == (1, 1 + (SIZE // 16) ** 2, 48)
    with torch.no_grad():
        x = names["image"] if form == "timm" else names["inputs"]["pixel_values"]
        reference = timm_model(student).eval()
        torch.testing.assert_close(tokens, reference.forward_features(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(features, reference(x), rtol=0, atol=1e-5)
        if form == "hf":
            torch.testing.assert_close(names["normed"], student.norm(tokens), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_of_a_run_that_was_trained(launcher: Launcher, scenes: Path, tmp_path: Path) -> None:
    """The files are those that training writes."""
    run = tmp_path / "run"
    launcher.run("train", *arguments({**TINY, "data.index": scenes, "run.dir": run, "train.steps": 2}))
    card = card_of(run, "--format", "hf")
    told = rows(card)
    assert (told["steps"], told["images seen"]) == ("2 of 2", "16 (batch 8)")
    assert told["training loss"] == f"{losses(run)[2]:.4f}"
    assert told["masked"] == "6 of 16 patches, block-wise"
    state = read_state(find_checkpoint(run))
    assert f"96 images (fingerprint of the index `{state['plan']['index']}`)" in card
    assert state["teacher"] in card
    assert "Trained with mvp_fast" in card
    assert str(tmp_path.parent) not in card
    environment = json.loads((run / "environment.json").read_text())
    assert f"torch {environment['versions']['torch']}" in card
    weights = load_file(run / "export" / "hf" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) > 1e5
