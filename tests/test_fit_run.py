"""`mvp-fast teacher fit` as a whole: what it writes, who can read it, resume, ranks, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file

from mvp_fast.cli.teacher.fit import main
from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError, DataError, UserError
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.clip_settings import clip_words, model_settings
from mvp_fast.samples.index import Index
from mvp_fast.train.fit.captions import read_captions
from mvp_fast.train.fit.measure import recall
from mvp_fast.train.fit.run import write_model
from tests.conftest import TINY, Launcher, Process, arguments, read_metrics

SETTINGS = {
    **{name: value for name, value in TINY.items() if name.startswith(("train.", "run.", "optim."))},
    **{"data.image-size": 32, "data.loader": "torchvision", "data.threads": 1},
    **{"model.embed-dim": 16, "model.width": 32, "model.layers": 1, "model.heads": 2, "model.patch-size": 8},
    **{"model.text-width": 32, "model.text-layers": 1, "model.context-length": 48},
    **{"train.steps": 6, "train.checkpoint-every": 2, "train.keep-checkpoints": 0, "train.ema-decay": 0.5},
    **{"fit.brief": True, "fit.evaluate-every": 4},
}
Fit = Callable[..., Process]


def words_of(settings: dict[str, Any]) -> list[Any]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    return ["teacher", "fit", *arguments({**SETTINGS, **named})]


@pytest.fixture(scope="module")
def fit(scenes: Path, launcher: Launcher) -> Fit:
    """Run the verb; keywords override settings, `__` standing for the dot."""

    def call(run: Path, code: int = 0, **overrides: Any) -> Process:
        return launcher.run(*words_of({"data.index": scenes, "run.dir": run, **overrides}), code=code)

    return call


@pytest.fixture(scope="module")
def few(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scenes with an index; read only."""
    folder = tmp_path_factory.mktemp("few") / "scenes"
    launcher.run(*("data", "scenes", "--out", folder, "--images", 11, "--profile", "small", "--workers", 1))
    launcher.run("data", "index", folder)
    return folder


@pytest.fixture(scope="module")
def whole(fit: Fit, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    told = fit(run, fit__test=few).out
    assert "11 images, test" in told
    assert "96 images, one caption each of 288" in told
    assert f"--teacher.name {run}" in told
    return run


def test_what_is_written(whole: Path, few: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    measured = {line["step"]: line for line in read_metrics(whole) if "test_pair" in line}
    assert sorted(measured) == [4, 6]
    assert results["figures"] == {name: value for name, value in measured[6].items() if name != "step"}
    assert results["step"] == 6
    assert results["chances"]["test_pair"] == 0.01
    assert results["chances"]["test_image_to_text_5"] == pytest.approx(5 / 11)
    assert results["data"]["test"] == {"index": Index.open(few).fingerprint(), "images": 11}
    assert sorted(course(whole)) == list(range(1, 7))
    weights = load_file(whole / "model" / "open_clip_model.safetensors")
    average = load_file(next((whole / "checkpoints" / "step-00000006" / "ema").glob("*.safetensors")))
    bare = load_file(next((whole / "checkpoints" / "step-00000006" / "clip").glob("*.safetensors")))
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert not torch.equal(weights["visual.proj"], bare["visual.proj"])


def test_open_clip_reads_it_and_finds_what_was_measured(whole: Path, few: Path) -> None:
    """With open_clip alone: its model, its preprocessing of the files, its tokenizer."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{whole / 'model'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{whole / 'model'}")
    clip.eval()
    index = Index.open(few)
    captions = read_captions(index, few / "scenes.parquet", 48)
    assert tokenizer(captions.texts).tolist() == captions.tokens_KL.tolist()
    with torch.no_grad():
        pictures = torch.stack([preprocess(Image.open(index.file(i))) for i in range(len(index))])
        images, texts = clip.encode_image(pictures, normalize=True), clip.encode_text(tokenizer(captions.texts), True)
    found = json.loads((whole / "results.json").read_text())["figures"]
    for name, value in recall(images, texts, torch.arange(11)).items():
        assert found[f"test_{name}"] == pytest.approx(value, abs=1.5 / 11)  # one image that rounding turns around


def test_it_is_a_teacher(whole: Path) -> None:
    clip, *_ = open_clip.create_model_and_transforms(f"local-dir:{whole / 'model'}")
    clip.eval()
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = clip.encode_image(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    prints = []
    for name in (whole, whole / "model"):
        teacher = build_teacher(TeacherConfig(name=str(name)), grid=(4, 4), image_size=32)
        found = teacher(teacher.patches(images), torch.zeros(3, 1, dtype=torch.int64))[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (teacher.width, teacher.grid, teacher.patch_size) == (16, (4, 4), 8)
        prints.append(teacher.fingerprint)
    file = str(whole / "model" / "open_clip_model.safetensors")
    given = build_teacher(TeacherConfig(name=str(whole), pretrained=file), grid=(4, 4), image_size=32)
    assert {*prints, given.fingerprint} == {prints[0]}
    fresh = build_teacher(TeacherConfig(name=str(whole), pretrained="random"), grid=(4, 4), image_size=32)
    assert fresh.fingerprint != prints[0]
    assert fresh.width == 16
    assert clip_words(str(whole), "openai") == f"{whole} (its own weights)"
    assert clip_words(str(whole), "random") == f"{whole} (random)"
    assert clip_words("ViT-B-16", "openai") == "ViT-B-16 (openai)"


def test_train_takes_it(whole: Path, scenes: Path, launcher: Launcher, tmp_path: Path) -> None:
    settings = {**TINY, "data.index": scenes, "run.dir": tmp_path / "run", "train.steps": 1, "teacher.name": whole}
    del settings["teacher.pretrained"]
    told = launcher.run("train", *arguments(settings)).out
    assert f"{whole} (its own weights), 16 channels" in told


def test_folders_that_are_no_clip(whole: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(whole / "model", tmp_path / "broken"))
    (broken / "open_clip_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no open_clip_model\.safetensors"):
        build_teacher(TeacherConfig(name=str(broken)), grid=(4, 4), image_size=32)
    for content in ("{", "{}", '{"model_cfg": {"embed_dim": 3}}', "[]"):
        (broken / "open_clip_config.json").write_text(content)
        with pytest.raises(DataError, match="settings can't be read"):
            model_settings(str(broken))
    (broken / "open_clip_config.json").unlink()
    with pytest.raises(ConfigError, match="holds no CLIP"):
        model_settings(str(broken))
    with pytest.raises(ConfigError, match="no weights 'laion2b'"):
        build_teacher(TeacherConfig(name=str(whole), pretrained="laion2b"), grid=(4, 4), image_size=32)


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = [path for part in ("clip", "ema", "optimizer") for path in (folder / part).glob("*.safetensors")]
    return {f"{path.parent.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def course(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def test_it_goes_on_as_if_nobody_had_stopped(whole: Path, fit: Fit, few: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for file in ("results.json", "model/open_clip_model.safetensors", "model/open_clip_config.json"):
        (run / file).unlink()
    told = fit(run, resume=2, fit__test=few).out
    assert "resumed   at step 2" in told
    assert course(run) == course(whole)
    before, after = tensors_of(whole, 6), tensors_of(run, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    figures = [json.loads((folder / "results.json").read_text())["figures"] for folder in (whole, run)]
    assert figures[0] == figures[1]
    # A run that is complete writes its model again, where that was lost.
    (run / "model" / "open_clip_model.safetensors").unlink()
    assert write_model(run) == run / "model"
    assert (run / "model" / "open_clip_model.safetensors").is_file()


def test_ranks_and_micro_batches_change_nothing(
    whole: Path, scenes: Path, launcher: Launcher, few: Path, tmp_path: Path
) -> None:
    """Two ranks of two micro-batches each: an image is told from the captions of all."""
    settings = {"data.index": scenes, "run.dir": tmp_path / "two", "fit.test": few, "train.accumulate": 2}
    ranks = launcher.start_ranks([words_of(settings)] * 2)
    for rank in ranks:
        assert rank.wait() == 0, rank.err
    one, two = course(whole), course(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    figures = [json.loads((run / "results.json").read_text())["figures"] for run in (whole, tmp_path / "two")]
    assert figures[1] == pytest.approx(figures[0], abs=1.5 / 11)
    before, after = tensors_of(whole, 6), tensors_of(tmp_path / "two", 6)
    distance = {name: float(F.mse_loss(before[name].float(), after[name].float())) for name in before}
    assert max(distance.values()) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        ({"model__heads": 4}, 2, "of another model"),
        ({"fit__brief": False}, 3, "trained with other captions"),
        ({"data__flip": 0.5}, 2, "flip was 0.0, is 0.5"),
    ],
)
def test_what_cannot_go_on(
    overrides: dict[str, Any], code: int, message: str, whole: Path, fit: Fit, few: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert message in fit(run, code, resume="auto", fit__test=few, **overrides).err
    assert tensors_of(run, 6).keys() == tensors_of(whole, 6).keys()


def test_bad_input(
    fit: Fit, scenes: Path, whole: Path, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def refused(kind: type[UserError], message: str, **overrides: Any) -> None:
        with pytest.raises(kind, match=message):
            main(list(map(str, words_of({"data.index": scenes, "run.dir": run, **overrides})[2:])))

    refused(ConfigError, r"Set model\.context-length to", model__context_length=12)
    refused(ConfigError, "are in the training set", fit__held_out=scenes)
    refused(DataError, "no such table of captions", fit__captions=tmp_path / "x.tsv")
    refused(ConfigError, r"train\.sharding", train__sharding="full")
    alone = Path(shutil.copytree(scenes, tmp_path / "alone"))
    (alone / "scenes.parquet").unlink()
    assert "Give a table with --fit.captions FILE" in fit(run, 3, data__index=alone).err
    assert not run.exists()
    settings = {**TINY, "data.index": scenes, "run.dir": whole, "resume": "auto"}
    assert "teacher fit, not pretrain" in launcher.run("train", *arguments(settings), code=2).err
    assert main(["--print-config", *map(str, words_of({"data.index": scenes})[2:])]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["context_length"], shown["data"]["flip"]) == (48, 0.0)
