"""timm's BEiT attention by mvp_kernels: outputs and gradients of timm's own forward pass, by the path asked for.

Shape legend: B images, N tokens, H heads.
"""

from __future__ import annotations

import pytest
import torch
from timm.models.beit import Attention, RelativePositionBias
from torch import Tensor, nn

import mvp_kernels
from mvp_fast.models.attention import attention, shared_bias
from tests.kernel_cases import surroundings

__all__ = ["surroundings"]

OPS = ("relpos_attention_qkv", "relpos_bias")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
Run = tuple[Tensor, tuple[Tensor, ...]]


def modules(dtype: torch.dtype, **options: object) -> tuple[Attention, RelativePositionBias]:
    """With weights whose every part matters."""
    parts = Attention(24, num_heads=3, qkv_bias=True, **options), RelativePositionBias((3, 4), num_heads=3)
    with torch.no_grad():
        for module in parts:
            for parameter in module.parameters():
                parameter.normal_(std=0.5)
    return parts[0].to(dtype), parts[1].to(dtype)


def outcome(parts: tuple[nn.Module, nn.Module], x: Tensor, impl: str | None) -> Run:
    """Output, and the gradients of x and of every parameter; impl None is timm's own forward pass."""
    x = x.clone().requires_grad_()
    module, bias = parts
    torch.manual_seed(3)  # for dropout
    out = module(x, shared_rel_pos_bias=bias()) if impl is None else attention(module, x, shared_bias(bias, impl), impl)
    leaves = [x, *module.parameters(), *bias.parameters()]
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out.detach(), torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)


def assert_same(got: Run, want: Run, dtype: torch.dtype) -> None:
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            size = y.abs().max().clamp_min(1)
            assert (x - y).abs().max() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize(
    ("impl", "dtype"), [("reference", torch.float64), ("auto", torch.float64), ("triton", torch.float32)]
)
def test_as_timms(impl: str, dtype: torch.dtype) -> None:
    if torch.cuda.is_available() and impl == "triton":
        pytest.skip("the kernels are compiled: not for the CPU")
    parts, x = modules(dtype), torch.randn(2, 13, 24, dtype=dtype)
    want = outcome(parts, x, None)
    got = outcome(parts, x, impl)
    assert mvp_kernels.record() == dict.fromkeys(OPS, "triton" if impl == "triton" else "reference")
    assert_same(got, want, dtype)
    assert (got[1][-1] != 0).all(), "the table has no gradient"


def test_dropout_of_attention_stays_with_timm() -> None:
    """While training; without it the weights are not dropped, and the kernels run."""
    parts, x = modules(torch.float64, attn_drop=0.4), torch.randn(2, 13, 24, dtype=torch.float64)
    assert_same(outcome(parts, x, "auto"), outcome(parts, x, None), torch.float64)
    assert mvp_kernels.record() == {"relpos_bias": "reference"}
    parts[0].eval()
    assert_same(outcome(parts, x, "auto"), outcome(parts, x, None), torch.float64)
    assert mvp_kernels.last_used("relpos_attention_qkv") == "reference"


def test_a_blocks_own_table_stays_with_timm() -> None:
    parts, x = modules(torch.float64, window_size=(3, 4)), torch.randn(1, 13, 24, dtype=torch.float64)
    assert_same(outcome(parts, x, "auto"), outcome(parts, x, None), torch.float64)
    assert mvp_kernels.last_used("relpos_attention_qkv") is None


def test_dropout_of_the_projection_is_kept() -> None:
    parts, x = modules(torch.float64, proj_drop=0.5), torch.randn(1, 13, 24, dtype=torch.float64)
    assert_same(outcome(parts, x, "auto"), outcome(parts, x, None), torch.float64)
    assert (outcome(parts, x, "auto")[0] == 0).any()
