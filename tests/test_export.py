"""Exports loaded back by timm itself, in every way that timm offers: strictly, and with the same features."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvp_fast.cli.main import main
from mvp_fast.config.schema import StudentConfig
from mvp_fast.errors import EnvironmentProblem
from mvp_fast.export.timm_format import create_arguments, timm_state, write_timm
from mvp_fast.models.student import Student
from tests.export_cases import SIZE, SMALL, pixels_of, trained, write_run


def arguments(student: Student, num_classes: int = 0) -> dict[str, int]:
    return create_arguments(student, num_classes)


@torch.no_grad()
def check_features(student: Student, model: torch.nn.Module, count: int = 2) -> None:
    """Pooled features and all tokens, from pixels normalised by the statistics that the loaded model declares."""
    model.eval()
    settings = timm.data.resolve_model_data_config(model)
    pixels = torch.randint(0, 256, (count, student.image_size, student.image_size, 3), dtype=torch.uint8)
    x = ((pixels / 255 - torch.tensor(settings["mean"])) / torch.tensor(settings["std"])).permute(0, 3, 1, 2)
    tokens: Tensor = student.encode(student.patches(pixels))
    torch.testing.assert_close(student.norm(model.forward_features(x)), tokens, rtol=0, atol=1e-5)
    # timm norms the mean of the patch tokens: fc_norm has the weights of the student's norm.
    before_norm = student._encode(student.patches(pixels), None, None)[:, 1:]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, student.norm(before_norm.mean(1)), rtol=0, atol=1e-5)


def test_base_loads_by_name_alone(tmp_path: Path) -> None:
    """The real size, and the call that other tools make."""
    student = trained(StudentConfig(), 224)
    out = write_timm(student, tmp_path / "timm")
    path = str(out / "model.safetensors")
    model = timm.create_model("beitv2_base_patch16_224", num_classes=0, checkpoint_path=path)
    check_features(student, model, count=1)
    assert create_arguments(student) == {"num_classes": 0}
    assert set(load_file(path)) == set(model.state_dict())
    assert model.blocks[11].attn.relative_position_bias_table.shape == (732, 12)


@pytest.mark.parametrize(
    ("config", "image_size"),
    [(SMALL, SIZE), (replace(SMALL, name="beit_base_patch16_224", width=None, heads=12), 224), (SMALL, 32)],
    ids=["small", "beit", "32px"],
)
def test_both_ways_of_loading(config: StudentConfig, image_size: int, tmp_path: Path) -> None:
    student = trained(replace(config, width=config.width or 96), image_size)
    out = write_timm(student, tmp_path / "timm")
    by_path = timm.create_model(config.name, checkpoint_path=str(out / "model.safetensors"), **arguments(student))
    check_features(student, by_path)
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    check_features(student, by_folder)
    declared = timm.data.resolve_model_data_config(by_folder)
    assert declared["input_size"] == (3, image_size, image_size)
    assert (tuple(declared["mean"]), tuple(declared["std"])) == (student.mean, student.std)
    assert type(by_folder.head) is torch.nn.Identity


def test_layer_scale_of_zero_means_none_and_exports_ones(tmp_path: Path) -> None:
    student = trained(replace(SMALL, layer_scale=0.0))
    assert not any("gamma" in name for name in student.state_dict())
    out = write_timm(student, tmp_path / "timm")
    model = timm.create_model(SMALL.name, checkpoint_path=str(out / "model.safetensors"), **arguments(student))
    assert (model.blocks[0].gamma_1 == 1).all()
    check_features(student, model)
    check_features(student, timm.create_model(f"local-dir:{out}", pretrained=True))


def test_the_table_is_copied_and_what_is_for_pretraining_left_out() -> None:
    student = trained()
    state = timm_state(student)
    table = student.rel_pos_bias.relative_position_bias_table
    for number in range(3):
        assert torch.equal(state[f"blocks.{number}.attn.relative_position_bias_table"], table)
    assert not [name for name in state if name.startswith(("mask_token", "predictor", "norm.", "rel_pos_bias", "head"))]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(tensor.abs().max() > 0 for tensor in state.values()), "the export shares the student's memory"


def test_a_head_of_k_classes(tmp_path: Path) -> None:
    student = trained()
    out = write_timm(student, tmp_path / "timm", num_classes=7)
    model = timm.create_model(SMALL.name, checkpoint_path=str(out / "model.safetensors"), **arguments(student, 7))
    check_features(student, model)
    assert model.head.weight.shape == (7, 48)
    assert 0 < model.head.weight.abs().max() < 1e-3  # timm's initialisation: 0.02, scaled by 0.001
    assert (model.head.bias == 0).all()
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 7
    again = write_timm(student, tmp_path / "again", num_classes=7)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_without_a_head_k_classes_do_not_load_strictly(tmp_path: Path) -> None:
    """Why --num-classes exists. From the folder, timm itself adds a fresh head."""
    student = trained()
    out = write_timm(student, tmp_path / "timm")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.weight", "head.bias"'):
        timm.create_model(SMALL.name, checkpoint_path=str(out / "model.safetensors"), **arguments(student, 7))
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)
    assert model.head.weight.shape == (7, 48)
    check_features(student, model)


def test_config_json(tmp_path: Path) -> None:
    out = write_timm(trained(), tmp_path / "timm")
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (SMALL.name, 0, 48)
    want = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": [64, 64]}
    assert {name: config["model_args"][name] for name in want} == want
    declared = config["pretrained_cfg"]
    assert declared["mean"] == [0.485, 0.456, 0.406]
    assert declared["std"] == [0.229, 0.224, 0.225]
    assert declared["input_size"] == [3, 64, 64]
    assert declared["interpolation"] == "bicubic"
    assert not {"tag", "license", "hf_hub_id", "url"} & set(declared), "says that these are timm's own weights"


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    student = trained()
    before = torch.get_rng_state()
    write_timm(student, tmp_path / "timm", num_classes=3)
    assert torch.equal(before, torch.get_rng_state())


def test_writing_again_replaces_both_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "timm"
    write_timm(trained(), out)
    (out / "notes.txt").write_text("mine")
    second = trained()
    write_timm(second, out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["timm"]
    check_features(second, timm.create_model(f"local-dir:{out}", pretrained=True))
    modes = {stat.S_IMODE((out / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_a_failed_write_leaves_the_old_export_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained()
    out = write_timm(first, tmp_path / "timm")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("json.dump", full)  # the weights are written by then, their configuration is not
    with pytest.raises(EnvironmentProblem, match=r"could not be written: No space left on device.*another --out"):
        write_timm(trained(), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timm"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="could not be written"):
        write_timm(trained(), tmp_path / "file" / "timm")
    with pytest.raises(EnvironmentProblem, match="could not be written"):
        write_timm(trained(), tmp_path / "file")


# ---- the verb


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[tuple[int, str], Student]]:
    """A run's folder with the checkpoints of two steps, and the students in them."""
    students = write_run(tmp_path / "run")
    return tmp_path / "run", students


def python_of(printed: str) -> dict[str, Any]:
    """Run the lines of Python that the verb prints."""
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in printed.splitlines() if line.startswith("    ")), names)
    return names


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ([], (12, "student")),
        (["--format", "timm", "--ema"], (12, "ema")),
        (["--checkpoint", "3"], (3, "student")),
        (["--checkpoint", "3", "--ema", "--num-classes", "5"], (3, "ema")),
    ],
    ids=["latest", "ema", "step", "head"],
)
def test_the_verb(run, options: list[str], which: tuple[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, students = run
    assert main(["export", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    out = folder / "export" / "timm"
    assert f"{out}: step {which[0]}" in printed
    assert ("averaged weights" in printed) == (which[1] == "ema")
    model = python_of(printed)["model"]
    check_features(students[which], model)
    assert model.num_classes == (5 if "--num-classes" in options else 0)
    check_features(students[which], timm.create_model(f"local-dir:{out}", pretrained=True))
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in printed


def test_the_verb_writes_elsewhere(run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, students = run
    monkeypatch.chdir(folder.parent)
    path = folder / "checkpoints" / "step-00000003"
    assert main(["export", "run", "--out", "here/it/is", "--checkpoint", str(path)]) == 0
    assert not (folder / "export").exists()
    monkeypatch.chdir("/")  # what is printed works from any folder
    check_features(students[3, "student"], python_of(capsys.readouterr().out)["model"])


def test_the_verb_writes_for_transformers(run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, students = run
    assert main(["export", str(folder), "--format", "hf", "--ema"]) == 0
    printed = capsys.readouterr().out
    out = folder / "export" / "hf"
    assert f"{out}: step 12, averaged weights" in printed
    names = python_of(printed)
    images, x = pixels_of(students[12, "ema"])
    with torch.no_grad():
        output = names["model"].eval()(x)
        tokens = students[12, "ema"].encode(students[12, "ema"].patches(images))
    torch.testing.assert_close(names["model"].pooler.layernorm(output.last_hidden_state), tokens, rtol=0, atol=1e-5)
    assert names["processor"].crop_size["height"] == SIZE
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert main(["export", str(folder), "--format", "hf", "--num-classes", "3"]) == 0
    assert python_of(capsys.readouterr().out)["model"].config.num_labels == 3


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--checkpoint", "4"], 3, "There is no checkpoint 4"),
        (["--num-classes", "-1"], 2, "--num-classes is -1, but must be 0 or more"),
        (["--private"], 2, "--private is for --push, which is not there"),
    ],
)
def test_the_verbs_errors(run, options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    assert main(["export", str(folder), *options]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("mvp-fast export: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (folder / "export").exists()


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing")]) == 3
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export"])
    assert ended.value.code == 2
