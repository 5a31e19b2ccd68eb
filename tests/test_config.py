"""The configuration: strict reading, exact round trips, the nearest name for a misspelt one, ranges."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from mvp_fast.config.check import check_config
from mvp_fast.config.load import config_from_dict, config_to_yaml, load_config, parse_overrides, save_config
from mvp_fast.config.schema import Config, DataConfig, OptimConfig, TrainConfig
from mvp_fast.errors import ConfigError

REPO = Path(__file__).resolve().parents[1]


def changed() -> Config:
    """A configuration in which every kind of field differs from its default."""
    return Config(
        data=DataConfig(index="x", crop_scale=(0.08, 0.9), loader="torchvision"),
        optim=OptimConfig(lr=1e-5, betas=(0.9, 0.999)),
        train=TrainConfig(steps=7, precision="fp32"),
        seed=3,
    )


def test_yaml_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(changed(), path)
    assert load_config(path) == changed() != Config()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert config_from_dict(yaml.safe_load(config_to_yaml(Config())), source="test") == Config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {batchsize: 3}", "Did you mean `train.batch_size`?"),
        ("trian: {}", "Did you mean `train`?"),
        ("steps: 3", "Did you mean `train.steps`?"),
        ("student: {qwertyuiop: 3}", "`student` has: name, width"),
        ("train: {steps: 2.5}", "expected a whole number, got 2.5 @ config.train.steps"),
        ("train: {steps: true}", "expected a whole number, got True"),
        ("train: {precision: fp8}", "config.train.precision"),
        ("optim: {betas: [0.9]}", "config.optim.betas"),
        ("optim: {lr: fast}", "config.optim.lr"),
        ("run: {tensorboard: 'no'}", "expected true or false, got 'no'"),
        ("run: {dir: 3}", "expected text, got 3"),
        ("student: {width: wide}", "expected a whole number, got 'wide'"),
        ("train: 3", "`train` must be a mapping"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_yaml_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in caught.value.paragraph()


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_yaml_floats_without_a_dot() -> None:
    assert config_from_dict({"optim": {"lr": "1e-4"}}, source="test").optim.lr == 1e-4


def test_overrides() -> None:
    words = ["--run.dir", "r", "--seed", "4", "--train.batch-size", "64", "--run.tensorboard", "False"]
    words += [
        "--data.crop-scale",
        "0.1",
        "0.5",
        "--student.width",
        "192",
        "--resume",
        "auto",
        "--kernels.impl",
        "reference",
    ]
    config = parse_overrides(changed(), words, "test", "")
    assert (config.run.dir, config.seed, config.train.batch_size, config.run.tensorboard) == ("r", 4, 64, False)
    assert (config.data.crop_scale, config.student.width, config.resume) == ((0.1, 0.5), 192, "auto")
    assert config.data.loader == "torchvision", "what is not overridden stays"


def test_wrong_override_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_overrides(Config(), ["--train.batchsize", "64"], "test", "")
    assert caught.value.code == 2
    assert "--train.batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("train", "batch_size", 0),
        ("train", "accumulate", 3),
        ("train", "epochs", float("nan")),
        ("train", "ema_decay", 1.0),
        ("optim", "lr", -1.0),
        ("optim", "lr", float("inf")),
        ("optim", "betas", (0.9, 1.0)),
        ("data", "crop_scale", (0.5, 0.2)),
        ("data", "crop_ratio", (0.0, 1.0)),
        ("data", "flip", 1.5),
        ("mask", "min_aspect", 0.0),
        ("mask", "patches", -1),
        ("student", "heads", 0),
    ],
)
def test_ranges(section: str, field: str, value: object) -> None:
    part = dataclasses.replace(getattr(Config(), section), **{field: value})
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        check_config(dataclasses.replace(Config(), **{section: part}))
    check_config(Config())


def test_every_field_has_a_docstring() -> None:
    import ast

    tree = ast.parse((REPO / "mvp_fast/config/schema.py").read_text())
    for part in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        body = part.body
        for here, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign) and not ast.unparse(here.annotation).endswith("Config"):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{part.name}.{ast.unparse(here.target)}"


@pytest.mark.parametrize("name", ["demo", "vit_b16_in1k", "vit_l16_in1k"])
def test_shipped_configs_are_valid(name: str) -> None:
    check_config(load_config(REPO / "configs" / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "model", "layer_scale"),
    [("vit_b16_in1k", "beitv2_base_patch16_224", 0.1), ("vit_l16_in1k", "beitv2_large_patch16_224", 1e-5)],
)
def test_recipes_are_the_documented_ones(name: str, model: str, layer_scale: float) -> None:
    config = load_config(REPO / "configs" / f"{name}.yaml")
    assert (config.student.name, config.student.layer_scale) == (model, layer_scale)
    assert config.teacher.name == "ViT-B-16-quickgelu"  # OpenAI's weights were trained with the quick GELU
    assert config.teacher.pretrained == "openai"
    assert (config.train.epochs, config.train.batch_size, config.train.steps) == (300, 2048, 0)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.reference_batch_size) == (1.5e-3, 1e-5, 2048)
    assert (optim.betas, optim.weight_decay, optim.clip_grad) == ((0.9, 0.98), 0.05, 3.0)
    assert round(optim.warmup_fraction * config.train.epochs, 6) == 10
    assert (config.mask.patches, config.mask.min_block, config.mask.min_aspect) == (75, 16, 0.3)
    assert (config.data.crop_scale, config.data.image_size) == ((0.2, 1.0), 224)
    assert typing.get_args(typing.get_type_hints(DataConfig)["interpolation"])[0] == config.data.interpolation
