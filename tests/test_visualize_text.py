"""Words on patches: the text tower, the maps, and the verb with --text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvp_fast.cli.main import main
from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import Config, DataConfig, ObjectiveConfig, StudentConfig, TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.results import read_results
from mvp_fast.evaluate.visualize import draw
from mvp_fast.evaluate.visualize.images import from_index
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.clip_text import build_whole_clip, text_features
from mvp_fast.samples.index import Index
from mvp_fast.train.checkpoint import Checkpointer, load_student
from tests.conftest import Launcher, arguments

NAME = "tiny-clip"
VISION = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TEXTS = ["red", "blue", "grass"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "grass": (90, 140, 60)}


def save_clip(folder: Path, model: Any, settings: dict[str, Any]) -> Path:
    """A checkpoint as open_clip's hub folders hold it."""
    folder.mkdir()
    path = folder / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    colours = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    about = {"model_cfg": settings, "preprocess_cfg": colours}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return path


def make_clip(settings: dict[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision, text = open_clip.CLIPVisionCfg(**settings["vision_cfg"]), open_clip.CLIPTextCfg(**settings["text_cfg"])
        return open_clip.CLIP(settings["embed_dim"], vision, text).eval()


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small whole CLIP, whose name open_clip knows while the tests of this module run."""
    folder = tmp_path_factory.mktemp("clip")
    settings = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / f"{NAME}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / f"{NAME}.json")
    yield save_clip(folder / "whole", make_clip(settings, 1), settings)
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder / f"{NAME}.json")
    del open_clip.factory._MODEL_CONFIGS[NAME]


@pytest.fixture
def config(clip_file: Path) -> Config:
    return Config(
        student=StudentConfig(width=48, depth=2, heads=3),
        data=DataConfig(image_size=64),
        teacher=TeacherConfig(name=NAME, pretrained=str(clip_file)),
    )


def write_run(folder: Path, config: Config, student: Student, fingerprint: str | None = None) -> Path:
    """A run's folder with one checkpoint."""
    if fingerprint is None:
        fingerprint = build_teacher(config.teacher, grid=student.grid, image_size=config.data.image_size).fingerprint
    state = {"config": config_to_dict(config), "target_width": 24, "teacher": fingerprint, "plan": {}}
    writer = Checkpointer(folder / "checkpoints", keep=0)
    writer.save(5, {"student": student.state_dict()}, {**state, "total_steps": 5, "skipped": 0})
    writer.close()
    return folder


@torch.no_grad()
def planted(config: Config, text_TD: Tensor) -> Student:
    """A student that predicts, for a patch of one of COLOURS, that colour's text: its blocks add nothing, and its
    predictor takes the three embedded patches to the three texts."""
    student = Student(config.student, target_width=24, image_size=64).eval()
    for block in student.blocks:
        block.gamma_1.zero_()  # type: ignore[union-attr,operator]
        block.gamma_2.zero_()  # type: ignore[union-attr,operator]
    student.patch_embed.proj.weight.normal_(std=0.1)
    images = torch.tensor([COLOURS[text] for text in TEXTS], dtype=torch.uint8)[:, None, None].expand(3, 64, 64, 3)
    embedded = student.encode(student.patches(images.contiguous()))[:, 1].double()
    student.predictor.weight.copy_((torch.linalg.pinv(embedded) @ text_TD.double()).T)
    student.predictor.bias.zero_()
    return student


def scene(path: Path) -> tuple[int, int]:
    """An image of 4 x 4 patches: grass, one red patch (row 2, column 1), one blue one (row 0, column 3)."""
    image = np.full((64, 64, 3), COLOURS["grass"], dtype=np.uint8)
    image[32:48, 16:32], image[:16, 48:] = COLOURS["red"], COLOURS["blue"]
    Image.fromarray(image).save(path)
    return 2 * 4 + 1, 3


# ---- the text tower


@pytest.mark.parametrize("templates", [("{}",), ("a photo of {}", "{}, drawn")], ids=["as given", "ensemble"])
@torch.no_grad()
def test_features_are_open_clips_own(clip_file: Path, config: Config, templates: tuple[str, ...]) -> None:
    clip = build_whole_clip(config.teacher)
    found = text_features(clip, TEXTS, templates)
    other, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip_file.parent}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_file.parent}")
    for number, text in enumerate(TEXTS):
        each = [other.encode_text(tokenizer([template.replace("{}", text)])) for template in templates]
        mean = torch.stack([feature / feature.norm() for feature in each]).mean(0)[0]
        torch.testing.assert_close(found[number], mean / mean.norm(), atol=1e-5, rtol=1e-5)
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(clip.model.encode_image(pixels), other.encode_image(pixels), atol=1e-5, rtol=1e-5)


def test_a_name_that_only_the_settings_beside_know(clip_file: Path, config: Config) -> None:
    """And a text tower under the names of open_clip's other class."""
    folder = clip_file.parent.with_name("prefixed")
    settings = json.loads((clip_file.parent / "open_clip_config.json").read_text())["model_cfg"]
    path = save_clip(folder, make_clip(settings, 1), settings)
    tensors = load_file(path)
    kept = ("visual.", "logit")
    save_file({name if name.startswith(kept) else f"text.{name}": each for name, each in tensors.items()}, path)
    unknown = TeacherConfig(name="made-here", pretrained=str(path))
    assert torch.equal(
        text_features(build_whole_clip(unknown), TEXTS), text_features(build_whole_clip(config.teacher), TEXTS)
    )


def test_texts_that_can_not_be_read(config: Config) -> None:
    clip = build_whole_clip(config.teacher)
    for texts, templates, message in [
        (["red", " "], ("{}",), "A text is empty"),
        (["very " * 20], ("{}",), "has 22 tokens with its template, the CLIP takes 16"),
        (["red"], ("a photo",), "has no {} for the text"),
    ]:
        with pytest.raises(ConfigError, match=message):
            text_features(clip, texts, templates)


# ---- maps


def test_the_map_finds_the_planted_patch(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_TD = text_features(build_whole_clip(config.teacher), TEXTS)
    run = write_run(tmp_path / "run", config, planted(config, text_TD))
    red, blue = scene(tmp_path / "scene.png")
    assert main(["visualize", str(run), "--data", str(tmp_path / "scene.png"), "--text", *TEXTS, "--with-teacher"]) == 0
    results = read_results(run / "visualize" / "results.json")
    found = results["text"]["text"]
    assert [row["high"] for row in found["texts"]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert (
        results["text"]["teacher_fingerprint"] == build_teacher(config.teacher, grid=(4, 4), image_size=64).fingerprint
    )
    assert found["figures"] == []
    assert "no figures of the texts" in capsys.readouterr().out
    assert (run / "visualize" / "text-teacher.png").is_file()
    with Image.open(run / "visualize" / "text.png") as picture:
        drawn = np.asarray(picture)
    assert drawn.shape[1] == 2 * draw.MARGIN + 5 * (224 + draw.GAP) - draw.GAP
    top = len(drawn) - draw.MARGIN - draw.NOTE - 224
    for column, brightest in enumerate((red, blue)):
        left = draw.MARGIN + (column + 1) * (224 + draw.GAP)
        tile = drawn[top : top + 224, left : left + 224].astype(float).sum(-1).reshape(4, 56, 4, 56).mean((1, 3))
        assert int(tile.argmax()) == brightest


@pytest.mark.parametrize("target_norm", ["l2", "layernorm"])
@torch.no_grad()
def test_maps_are_the_cosines(config: Config, target_norm: Any, tmp_path: Path) -> None:
    """Of students as they come, against the predictor on all encoded tokens."""
    from mvp_fast.evaluate.backbone import BackboneSource
    from mvp_fast.evaluate.visualize.text import load_text_side, student_map, teacher_map

    config = replace(config, objective=ObjectiveConfig(target_norm=target_norm))
    student = Student(config.student, target_width=24, image_size=64, seed=3).eval()
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    run = write_run(tmp_path / "run", config, student)
    side = load_text_side(BackboneSource(str(run)), TEXTS, ("{}",), None, torch.device("cpu"))
    images_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    text_TD = text_features(build_whole_clip(config.teacher), TEXTS)
    if target_norm == "layernorm":
        text_TD = text_TD - text_TD.mean(1, keepdim=True)
    predicted = student.predictor(student.encode(student.patches(images_BHWC)))[:, 1:]
    expected = torch.stack([F.cosine_similarity(predicted, text_D, dim=-1) for text_D in text_TD], 1)
    torch.testing.assert_close(student_map(side, images_BHWC), expected, atol=1e-5, rtol=1e-5)

    visual = build_whole_clip(config.teacher).model.visual
    mean, std = (torch.tensor(each) for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    taken: dict[str, Tensor] = {}
    visual.transformer.register_forward_hook(lambda *parts: taken.update(x=parts[2]))
    visual(((images_BHWC / 255 - mean) / std).permute(0, 3, 1, 2))
    features = (visual.ln_post(taken["x"]) @ visual.proj)[:, 1:]
    text_TD = text_features(build_whole_clip(config.teacher), TEXTS)
    expected = torch.stack([F.cosine_similarity(features, text_D, dim=-1) for text_D in text_TD], 1)
    torch.testing.assert_close(teacher_map(side, images_BHWC), expected, atol=1e-5, rtol=1e-5)


# ---- the verb


def test_a_run_that_was_trained(
    scenes: Path,
    tiny: dict[str, Any],
    launcher: Launcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From training against a checkpoint to the picture of a text, nothing named twice."""
    settings = {"embed_dim": 384, "vision_cfg": open_clip.get_model_config("ViT-S-16")["vision_cfg"], "text_cfg": TEXT}
    path = save_clip(tmp_path / "clip", make_clip(settings, 2), settings)
    named = {**tiny, "teacher.pretrained": path, "data.index": scenes, "run.dir": tmp_path / "run", "train.steps": 2}
    launcher.run("train", *arguments(named))
    words = ["visualize", tmp_path / "run", "--images", 4, "--score-images", 48, "--loader", "torchvision"]
    words += [
        "--text",
        "a red square",
        "a ring",
        "grass",
        "--template",
        "a photo of {}",
        "{}",
        "--out",
        tmp_path / "out",
    ]
    assert main([str(word) for word in words]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert results["pictures"] == ["attention.png", "pca.png", "similarity.png", "text.png"]
    assert results["backbone"]["step"] == 2
    assert [row["word"] for row in results["text"]["text"]["figures"]] == ["square", "ring"]
    for row in results["text"]["text"]["figures"]:
        assert row["images"] == 48
        assert 0 <= row["roc_auc"] <= 1
    assert "“a red square”: square in" in capsys.readouterr().out
    for name in results["pictures"]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.height > 4 * 224

    student, _, _ = load_student(tmp_path / "run")
    index = Index.open(scenes)
    numbers = [[index.key(i) for i in range(len(index))].index(name) for name in results["data"]["images"]]
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    shown = from_index(index, np.array(numbers), data, 16, 1.0, torch.device("cpu"))
    clip = build_whole_clip(TeacherConfig(name="ViT-S-16", pretrained=str(path)))
    with torch.no_grad():
        predicted = student.predictor(student.eval().encode(student.patches(shown.images_BHWC)))[:, 1:]
    for row, text_D in zip(
        results["text"]["text"]["texts"],
        text_features(clip, ["a red square", "a ring", "grass"], ("a photo of {}", "{}")),
        strict=True,
    ):
        cosine = F.cosine_similarity(predicted, text_D, dim=-1)
        assert [row["low"], row["high"]] == pytest.approx([float(cosine.min()), float(cosine.max())], abs=1e-4)


def test_weights_from_elsewhere(
    clip_file: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of the run is gone or has no text tower: another file of the same CLIP does, one of another does not."""
    scene(tmp_path / "scene.png")
    student = Student(config.student, target_width=24, image_size=64)
    run = write_run(tmp_path / "run", config, student)
    state_path = run / "checkpoints" / "step-00000005" / "state.json"
    state = json.loads(state_path.read_text())
    tensors = load_file(clip_file)
    vision, other, text_of_another = (tmp_path / f"{name}.safetensors" for name in ("vision", "other", "narrow"))
    save_file({name: each for name, each in tensors.items() if name.startswith("visual.")}, vision)
    save_file({name: each + 0.01 for name, each in tensors.items()}, other)
    save_file({**tensors, "ln_final.weight": torch.ones(7)}, text_of_another)
    words = ["visualize", str(run), "--data", str(tmp_path / "scene.png"), "--text", "red", "--pictures", "text"]

    def check(pretrained: str, more: list[str], code: int, message: str) -> None:
        state["config"]["teacher"]["pretrained"] = pretrained
        state_path.write_text(json.dumps(state))
        assert main([*words, *more]) == code
        told = capsys.readouterr().err
        assert message in told
        assert len(told.splitlines()) == (code > 0)

    check(str(vision), [], 3, "holds a vision tower alone: --text needs a CLIP with both its towers")
    check(str(vision), ["--clip-weights", str(clip_file)], 0, "")
    check(str(tmp_path / "gone.pt"), [], 3, "no such checkpoint file")
    check(str(tmp_path / "gone.pt"), ["--clip-weights", str(clip_file)], 0, "")
    check(str(clip_file), ["--clip-weights", str(other)], 3, "The run's teacher was another CLIP")
    check(str(other), [], 3, "The run's teacher was another CLIP")
    check(str(text_of_another), [], 3, "first ln_final.weight")
    check(str(clip_file), ["--clip-weights", str(tmp_path / "none")], 3, "There is no such file (--clip-weights")
    check("random", [], 2, "has random weights, which no language taught")
    state["config"]["teacher"]["name"] = "vit_small_patch16_224"
    check(str(vision), [], 2, "is no CLIP of open_clip")
    (run / "checkpoints").rename(tmp_path / "set-aside")
    assert main(words) == 3
    assert "no checkpoint" in capsys.readouterr().err
