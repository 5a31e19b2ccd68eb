"""The teacher's linear layers in FP8, on the CPU, where the same numbers are multiplied in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.fp8 import GREATEST, Fp8Linear, quantise, quantise_linears
from mvp_fast.models.teachers.tower import TowerTeacher
from tests.conftest import TINY, Launcher, arguments, losses


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_rows_are_rounded_to_eight_bits(size: float) -> None:
    """Three bits of a significand: half a unit of the last is a sixteenth of the number, subnormals aside."""
    rows_TK = torch.randn(7, 33) * size
    values_TK, scale_T1 = quantise(rows_TK)
    assert values_TK.dtype == torch.float8_e4m3fn
    found_TK = values_TK.double() * scale_T1.double()
    if size > 1e-12:
        assert ((values_TK.float().abs().amax(1)) == GREATEST).all()
        floor_T1 = scale_T1.double() * 2.0**-6  # the least normal number
        error = (found_TK - rows_TK.double()).abs() / torch.maximum(rows_TK.double().abs(), floor_T1)
        assert error.max() <= 1 / 16 + 1e-6
    assert (quantise(torch.zeros(2, 16))[0].float() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_of_the_rounded(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(48, 32, bias=bias)
    x = torch.randn(3, 5, 48, dtype=dtype)
    x[0, 0], x[1, 1, 0] = 0, 100.0  # nothing, and an outlier, which costs its own token alone
    layer = Fp8Linear(linear.weight, linear.bias)
    pairs = quantise(linear.weight.detach()), quantise(x.flatten(0, 1))
    weight_NK, rows_TK = (values.double() * scale.double() for values, scale in pairs)
    expected = (rows_TK @ weight_NK.T).unflatten(0, (3, 5))
    if bias:
        expected = expected + linear.bias.detach().double()
    found = layer(x)
    assert found.dtype == dtype
    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=rounding * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(layer(x, 8, 24), found[..., 8:24], atol=1e-6, rtol=1e-3)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None).detach()
    quiet = torch.ones(3, 5, dtype=torch.bool)
    quiet[1, 1] = False
    assert (found.double() - exact)[quiet].norm() < 0.05 * exact[quiet].norm()


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_a_towers_features_stay_near(kind: str) -> None:
    name = {"clip": "ViT-S-16", "timm": "vit_tiny_patch16_224"}[kind]
    teacher = build_teacher(
        TeacherConfig(name=name, pretrained="random", kind=kind),  # type: ignore[arg-type]
        grid=(4, 4),
        image_size=64,
        cls=True,
    ).lower(torch.bfloat16)
    assert isinstance(teacher, TowerTeacher)
    patches_BNP = teacher.patches(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    index_BM = torch.tensor([[0, 3, 16], [0, 1, 2]])
    before: Tensor = teacher(patches_BNP, index_BM)
    assert quantise_linears(teacher.blocks) == 4 * 12
    assert not any(isinstance(module, nn.Linear) for block in teacher.blocks for module in block.modules())
    after = teacher(patches_BNP, index_BM)
    assert after.dtype == before.dtype
    assert not torch.equal(after, before)
    assert nn.functional.cosine_similarity(after.float(), before.float(), dim=-1).min() > 0.98


def settings(scenes: Path, run: Path, **others: Any) -> list[str]:
    named = {"data.index": scenes, "run.dir": run, "train.steps": 2, "teacher.fp8": True, **others}
    return arguments({**TINY, **named})


def test_a_run_says_what_it_costs(launcher: Launcher, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = launcher.run("train", *settings(scenes, run, **{"teacher.precision": "bf16"})).out
    (line,) = (line for line in shown.splitlines() if line.startswith("teacher "))
    mean = float(line.partition("cosine to bf16 features ")[2].partition(",")[0])
    assert 0.98 < mean < 1
    assert len(losses(run)) == 2


def test_what_can_not_be_in_fp8(launcher: Launcher, scenes: Path, tmp_path: Path) -> None:
    told = launcher.run("train", *settings(scenes, tmp_path / "run"), code=2).err
    assert "computes in float32" in told
    pixels = {"teacher.kind": "pixels", "objective.cls": False}
    assert "has none" in launcher.run("train", *settings(scenes, tmp_path / "run", **pixels), code=2).err
    with pytest.raises(ConfigError, match="multiples of 16"):
        quantise_linears([nn.Sequential(nn.Linear(16, 24))])
