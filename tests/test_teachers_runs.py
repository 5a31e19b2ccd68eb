"""Whole runs against each kind of teacher: they train, go on against the same teacher alone, and say what is wrong."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from mvp_fast.cli.main import main
from mvp_fast.config.load import load_config
from tests.conftest import losses

PATCHES = {"objective.cls": False, "objective.loss": "mse", "objective.target-norm": "none"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from a second thread, and lose much where other processes want the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tower in timm's format."""
    arguments = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **arguments)
    folder = tmp_path_factory.mktemp("tower")
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder


class Runs:
    """`mvp-fast train` in this process, with a tiny run's settings."""

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base

    def __call__(self, code: int = 0, **settings: Any) -> str:
        """What it says, once it has ended as it should."""
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
        words = [word for name, value in {**self.base, **named}.items() for word in (f"--{name}", str(value))]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                ended = main(["train", *words])
            except SystemExit as end:
                ended = int(end.code or 0)
        assert ended == code, f"exit {ended}\n{out.getvalue()}\n{err.getvalue()}"
        assert code == 0 or err.getvalue().count("\n") == 1, err.getvalue()
        return err.getvalue() if code else out.getvalue()


@pytest.fixture
def runs(tiny: dict[str, Any], scenes: Path, tmp_path: Path) -> Runs:
    more = {"data.index": scenes, "data.loader": "torchvision", "run.dir": tmp_path / "run", "train.steps": 3}
    return Runs({**tiny, **more})


def settings_of(kind: str, tower: Path) -> dict[str, Any]:
    return {
        "timm": {"teacher.kind": "timm", "teacher.pretrained": tower},
        "pixels": {"teacher.kind": "pixels", **PATCHES},
        "hog": {"teacher.kind": "hog", **PATCHES},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("timm", "teacher vit_small_patch14_reg4_dinov2 ({tower}), 48 channels, frozen, fp32, eager"),
        ("pixels", "teacher pixels, normalised per patch, 768 channels, frozen, fp32, eager"),
        ("hog", "teacher HOG, 9 orientations, cells of 8 px, 108 channels, frozen, fp32, eager"),
    ],
)
def test_a_run_against_each_kind(kind: str, says: str, runs: Runs, tower: Path, tmp_path: Path) -> None:
    """Five steps, and the last two again from the checkpoint at three: the same curve."""
    runs.base |= {**settings_of(kind, tower), "train.steps": 5, "train.checkpoint-every": 3}
    assert says.format(tower=tower) in " ".join(runs().split())
    assert load_config(tmp_path / "run" / "config.yaml").teacher.kind == kind
    runs(run__dir=tmp_path / "again", resume=tmp_path / "run" / "checkpoints" / "step-00000003")
    whole, again = losses(tmp_path / "run"), losses(tmp_path / "again")
    assert sorted(whole) == [1, 2, 3, 4, 5]
    assert again == {step: whole[step] for step in (4, 5)}
    assert len(set(whole.values())) == 5


def test_bf16_leaves_pixels_and_hog_in_fp32(runs: Runs, tower: Path, tmp_path: Path) -> None:
    for kind, precision in (("pixels", "fp32"), ("hog", "fp32"), ("timm", "bf16")):
        runs.base["run.dir"] = tmp_path / kind
        told = Runs({**runs.base, **settings_of(kind, tower)})(train__precision="bf16", train__steps=1)
        assert f"frozen, {precision}, eager" in " ".join(told.split())


@pytest.mark.parametrize("kind", ["pixels", "hog", "timm"])
def test_the_loss_goes_down(kind: str, runs: Runs, tower: Path, tmp_path: Path) -> None:
    more = {"train.steps": 20, "optim.lr": 4e-3, "optim.warmup-fraction": 0.1, "student.drop-path": 0.0}
    Runs({**runs.base, **settings_of(kind, tower), **more})()
    curve = [loss for _, loss in sorted(losses(tmp_path / "run").items())]
    assert len(curve) == 20
    assert sum(curve[-4:]) / 4 < 0.95 * sum(curve[:4]) / 4, curve


def test_going_on_against_another_kind_is_refused(runs: Runs, tower: Path, tmp_path: Path) -> None:
    runs(**{name.replace(".", "__"): value for name, value in settings_of("pixels", tower).items()})
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    for kind in ("hog", "timm"):
        settings = {**settings_of("pixels", tower), **{"teacher.kind": kind, "teacher.pretrained": tower}}
        other = Runs({**runs.base, **settings, "resume": "auto", "train.steps": 6})
        said = other(3)
        assert "trained against another teacher than" in said
        assert "teacher.* settings in the config.yaml" in said
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    more = {**settings_of("pixels", tower), "teacher.name": "another", "teacher.seed": 4}
    Runs({**runs.base, **more, "resume": "auto", "train.steps": 4})()  # what has no effect may change


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"teacher.kind": "pixels"}, 2, ("configuration error", "none for the CLS token", "objective.cls to False")),
        ({"teacher.kind": "timm", "teacher.name": "resnet18"}, 2, ("resnet18 can't be the teacher",)),
        ({"teacher.kind": "timm", "teacher.name": "vit_tiny_patch16_242"}, 2, ("Did you mean vit_tiny_patch16_224",)),
        (
            {"teacher.kind": "timm", "teacher.name": "vit_tiny_patch16_224", "teacher.pretrained": "none.pth"},
            3,
            ("data error", "There is no such checkpoint file or folder", "none.pth"),
        ),
        ({"teacher.kind": "timm", "teacher.name": "vit_small_patch32_224"}, 2, ("patches of 32 px", "at most 16 px")),
    ],
    ids=lambda value: value.get("teacher.name", value["teacher.kind"]) if isinstance(value, dict) else None,
)
def test_bad_input(settings: dict[str, Any], code: int, says: tuple[str, ...], runs: Runs, tmp_path: Path) -> None:
    runs.base |= settings
    said = runs(code)
    assert [part for part in says if part not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_gets_the_choices(runs: Runs) -> None:
    runs.base["teacher.kind"] = "dino"
    with pytest.raises(AssertionError, match=r"(?s)exit 2\n.*'dino'.*'clip',\s*'timm',\s*'pixels',\s*'hog'"):
        runs()
