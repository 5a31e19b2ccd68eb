"""Exports loaded by transformers itself: every weight finds its place, the features are timm's and the student's."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BeitBackbone,
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
)

from mvp_fast.config.schema import StudentConfig
from mvp_fast.errors import EnvironmentProblem
from mvp_fast.export.hf_format import hf_config, hf_preprocessor, hf_state, write_hf
from mvp_fast.export.timm_format import timm_fingerprint, timm_model, write_timm
from tests.export_cases import SIZE, SMALL, pixels_of, trained

REPO = Path(__file__).resolve().parents[1]
PARTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load(folder: Path, kind: Any = BeitModel) -> Any:
    """By transformers, with no weight missing, too many or of another shape."""
    model, report = kind.from_pretrained(str(folder), output_loading_info=True)
    assert {part: list(report.get(part, [])) for part in PARTS} == {part: [] for part in PARTS}
    return model.eval()


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        (SMALL, SIZE),
        (SMALL, 32),
        (replace(SMALL, layer_scale=0.0), SIZE),
        (replace(SMALL, name="beit_base_patch16_224", depth=1, heads=2), 48),
        (StudentConfig(depth=2), 224),
    ],
    ids=["small", "32px", "no-layer-scale", "beit", "wide"],
)
@torch.no_grad()
def test_features_are_the_students_and_timms(config: StudentConfig, image_size: int, tmp_path: Path) -> None:
    student = trained(config, image_size)
    model = load(write_hf(student, tmp_path / "hf"))
    theirs = timm.create_model(f"local-dir:{write_timm(student, tmp_path / 'timm')}", pretrained=True).eval()
    images, x = pixels_of(student)
    output = model(x, output_hidden_states=True)
    tokens = theirs.forward_features(x)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(output.last_hidden_state, tokens, **near)
    torch.testing.assert_close(output.pooler_output, theirs.forward_head(tokens, pre_logits=True), **near)
    # The student's own tokens are normed, the model's are not.
    normed = student.encode(student.patches(images))
    torch.testing.assert_close(model.pooler.layernorm(output.last_hidden_state), normed, **near)
    assert (output.last_hidden_state - normed).abs().max() > 0.1
    assert len(output.hidden_states) == len(student.blocks) + 1
    assert output.last_hidden_state.shape == (2, 1 + student.grid[0] ** 2, student.width)


def test_the_same_in_float64_with_gradients(tmp_path: Path) -> None:
    """What is left in float32 is rounding: no term is missing, neither forward nor backward."""
    student = trained()
    model = load(write_hf(student, tmp_path / "hf")).double()
    theirs = timm_model(student).eval().double()
    x = pixels_of(student)[1].double()
    results = []
    for network in (lambda x: model(x).pooler_output, theirs):
        given = x.clone().requires_grad_()
        pooled = network(given)
        pooled.square().sum().backward()
        results.append((pooled.detach(), given.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-11)


def test_the_names_are_those_that_are_published(tmp_path: Path) -> None:
    """As in microsoft/beit-base-patch16-224-pt22k: versions 4 and 5 of transformers both read them."""
    out = write_hf(trained(), tmp_path / "hf")
    with safe_open(out / "model.safetensors", "pt") as file:
        names, kind = set(file.keys()), file.metadata()
        table = file.get_tensor("encoder.relative_position_bias.relative_position_bias_table")
    assert kind == {"format": "pt"}
    assert table.shape == (7 * 7 + 3, 4)
    block = {name.removeprefix("encoder.layer.1.") for name in names if name.startswith("encoder.layer.1.")}
    kinds = {"weight", "bias"}
    assert block == {
        "lambda_1",
        "lambda_2",
        *(f"layernorm_{place}.{kind}" for place in ("before", "after") for kind in kinds),
        *(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
        *(f"attention.attention.{part}.bias" for part in ("query", "value")),
        *(f"{part}.dense.{kind}" for part in ("attention.output", "intermediate", "output") for kind in kinds),
    }
    assert {name for name in names if not name.startswith("encoder.layer.")} == {
        "embeddings.cls_token",
        *(f"embeddings.patch_embeddings.projection.{kind}" for kind in kinds),
        "encoder.relative_position_bias.relative_position_bias_table",
        *(f"pooler.layernorm.{kind}" for kind in kinds),
    }


def test_config_json(tmp_path: Path) -> None:
    student = trained(replace(SMALL, depth=6, layer_scale=0.25))
    out = write_hf(student, tmp_path / "hf")
    written = json.loads((out / "config.json").read_text())
    config = AutoConfig.from_pretrained(str(out))
    assert type(config) is BeitConfig
    others = {"architectures": ["BeitModel"], "model_type": "beit", "torch_dtype": "float32"}
    assert {name: written[name] for name in others} == others
    assert {name: getattr(config, name) for name in written.keys() - others} == {
        name: value for name, value in written.items() if name not in others
    }
    want = {
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.25,
        "image_size": 64,
        "patch_size": 16,
        "use_shared_relative_position_bias": True,
        "use_relative_position_bias": False,
        "use_mean_pooling": True,
        "drop_path_rate": 0.0,
        "out_indices": [2, 3, 4, 6],
    }
    assert {name: written[name] for name in want} == want
    assert type(AutoModel.from_pretrained(str(out))) is BeitModel
    for depth, stages in ((1, [1]), (2, [1, 2]), (12, [4, 6, 8, 12]), (24, [8, 12, 16, 24])):
        with torch.device("meta"):
            deep = timm.create_model("beit_base_patch16_224", embed_dim=12, depth=depth, num_classes=0)
        assert hf_config(deep)["out_indices"] == stages


@torch.no_grad()
def test_as_a_backbone_it_yields_the_blocks_tokens(tmp_path: Path) -> None:
    student = trained(replace(SMALL, depth=6))
    # The pooler has no place in a backbone, so that two weights are left over; the table must not be.
    model, report = BeitBackbone.from_pretrained(str(write_hf(student, tmp_path / "hf")), output_loading_info=True)
    assert not report["missing_keys"]
    x = pixels_of(student)[1]
    maps = model.eval()(x).feature_maps
    found = timm_model(student).eval().forward_intermediates(x, indices=[1, 2, 3, 5], intermediates_only=True)
    for ours, reference in zip(maps, found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_of_k_classes(tmp_path: Path) -> None:
    student = trained()
    out = write_hf(student, tmp_path / "hf", num_classes=7, seed=3)
    model = load(out, BeitForImageClassification)
    x = pixels_of(student)[1]
    torch.testing.assert_close(model(x).logits, timm_model(student, 7, seed=3).eval()(x), rtol=0, atol=1e-5)
    assert (model.config.num_labels, model.config.id2label[6]) == (7, "LABEL_6")
    without, report = BeitModel.from_pretrained(str(out), output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(without.eval()(x).pooler_output, timm_model(student).eval()(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fine_tuned_model_has_a_table_in_each_block(tmp_path: Path) -> None:
    """timm's model after fine-tuning: the tables differ, and so does the head from a fresh one."""
    model = timm_model(trained(), num_classes=5).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config = BeitConfig(**hf_config(model))
    assert (config.use_relative_position_bias, config.use_shared_relative_position_bias) == (True, False)
    theirs = BeitForImageClassification.from_pretrained(None, config=config, state_dict=hf_state(model)).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-5)


def test_what_transformers_has_no_place_for_is_refused() -> None:
    model = timm.create_model("beit_base_patch16_224", embed_dim=12, depth=1, num_classes=0, use_abs_pos_emb=True)
    with pytest.raises(ValueError, match="no place for pos_embed"):
        hf_state(model)


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "beit_base_patch16_224"])
@torch.no_grad()
def test_the_image_processor_does_what_timm_does(name: str, tmp_path: Path) -> None:
    side = 224  # at which the margins that are cut off are even: where they are odd, the two round differently
    student = trained(replace(SMALL, name=name, depth=1), side)
    out = write_hf(student, tmp_path / "hf")
    theirs = timm.create_model(f"local-dir:{write_timm(student, tmp_path / 'timm')}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
    rng = np.random.default_rng()
    image = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize(
        (300, 200), Image.Resampling.BICUBIC
    )
    want = transform(image)[None]
    for backend, distance in (("pil", 1e-5), ("torchvision", 2 / 255 / 0.22)):
        processor = AutoImageProcessor.from_pretrained(str(out), backend=backend)
        found = processor(image, return_tensors="pt")["pixel_values"]
        assert found.shape == (1, 3, side, side)
        torch.testing.assert_close(found, want, rtol=0, atol=distance)
    output = load(out)(found)
    torch.testing.assert_close(output.pooler_output, theirs(found), rtol=0, atol=1e-5)
    # A grey image becomes one of three colours.
    assert processor(image.convert("L"), return_tensors="pt")["pixel_values"].shape == (1, 3, side, side)
    settings = hf_preprocessor(theirs)
    assert settings["size"] == {"shortest_edge": 248}  # 224 / 0.9
    assert (tuple(settings["image_mean"]), tuple(settings["image_std"])) == (student.mean, student.std)


def test_both_formats_are_of_one_network() -> None:
    student = trained()
    assert timm_fingerprint(timm_model(student)) == timm_fingerprint(timm_model(student, num_classes=4))
    other = trained()
    assert timm_fingerprint(timm_model(student)) != timm_fingerprint(timm_model(other))


def test_writing_again_and_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_hf(trained(), tmp_path / "hf", card="# a card\n")
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == files
    assert before["README.md"] == b"# a card\n"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)  # the weights are written by then, the rest is not
        with pytest.raises(EnvironmentProblem, match="could not be written: No space left on device"):
            write_hf(trained(), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    second = trained()
    load(write_hf(second, out))
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_transformers_is_not_imported() -> None:
    """It is for the tests alone."""
    for path in (REPO / "mvp_fast").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "transformers"], path
