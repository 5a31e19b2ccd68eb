"""The operations against their references in float64: values and gradients, every type, many shapes.

Both implementations are held to the same precision. How each behaves at its edges is in the files beside this one.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours, P values of a patch.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import Normalization, reference
from mvp_kernels.arguments import EPS
from mvp_kernels.operators import score
from tests.kernel_cases import (
    CASES,
    DEVICES,
    FLOATS,
    IMPLS,
    KINDS,
    Shape,
    assert_near,
    distinct_index,
    gradient_size,
    small_tiles,
    surroundings,
    wide,
)

__all__ = ["surroundings"]

ALL_TOTALS = score.TOTALS  # as it is outside of tests


def as_float64(x: Tensor) -> Tensor:
    """A float64 leaf of the same values."""
    return x.detach().double().requires_grad_()


@DEVICES
@IMPLS
@CASES
def test_masked_gather(device: str, impl: str, shape: Shape, dtype: torch.dtype) -> None:
    """Copies, so exact; what nobody took has a gradient of zero."""
    x_BND = torch.randn(shape.images, shape.tokens, shape.width, device=device, dtype=dtype, requires_grad=True)
    index_BM = distinct_index(shape, device)
    out_BMD = mvp_kernels.masked_gather(x_BND, index_BM, impl=impl)
    assert mvp_kernels.record() == {"masked_gather": impl}
    assert out_BMD.is_contiguous()
    upstream_BMD = torch.randn_like(out_BMD)
    (grad_BND,) = torch.autograd.grad(out_BMD, x_BND, upstream_BMD)

    b, m = (index_BM >= 0).nonzero(as_tuple=True)
    want_BMD, want_BND = torch.zeros_like(out_BMD), torch.zeros_like(x_BND)
    want_BMD[b, m] = x_BND.detach()[b, index_BM[b, m]]
    want_BND[b, index_BM[b, m]] = upstream_BMD[b, m]
    torch.testing.assert_close(out_BMD, want_BMD, rtol=0, atol=0)
    torch.testing.assert_close(grad_BND, want_BND, rtol=0, atol=0)


def check_token_norm(impl: str, kind: str, x_MD: Tensor, eps: float = EPS) -> None:
    """Value and gradient are within precision."""
    x_MD = x_MD.detach().requires_grad_()
    out_MD = mvp_kernels.token_norm(x_MD, kind, eps, impl=impl)
    upstream_MD = torch.randn_like(out_MD)
    (grad_MD,) = torch.autograd.grad(out_MD, x_MD, upstream_MD)
    assert mvp_kernels.record() == {"token_norm": impl}

    x64_MD = as_float64(x_MD)
    want_MD = reference.token_norm(x64_MD, kind, eps)
    (want_grad_MD,) = torch.autograd.grad(want_MD, x64_MD, upstream_MD.double())
    if kind == "l2":
        scale_M1 = 1 / x64_MD.norm(dim=-1, keepdim=True).clamp_min(eps)
    else:
        centred_MD = x64_MD - x64_MD.mean(-1, keepdim=True)
        scale_M1 = 1 / (centred_MD.square().mean(-1, keepdim=True) + eps).sqrt()
    # The mean is subtracted from the token, and the part along the token from the gradient.
    assert_near(out_MD, want_MD, None if kind == "l2" else x64_MD.abs().amax(-1, keepdim=True) * scale_M1)
    assert_near(grad_MD, want_grad_MD, upstream_MD.double().abs().amax(-1, keepdim=True) * scale_M1)


@DEVICES
@IMPLS
@pytest.mark.parametrize("kind", ["l2", "layernorm"])
@CASES
def test_token_norm(device: str, impl: str, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    check_token_norm(impl, kind, torch.randn(shape.images, shape.taken, shape.width, device=device).to(dtype) + 0.5)


def check_cosine_loss(
    impl: str, pred: Tensor, target: Tensor, weight: Tensor | None, precision: torch.dtype | None = None
) -> None:
    """Value and both gradients are within precision, of each token and in the mean."""
    pred, target = pred.detach().requires_grad_(), target.detach().requires_grad_()
    pred64, target64 = as_float64(pred), as_float64(target)
    weight64 = torch.ones(pred.shape[:-1], device=pred.device).double() if weight is None else weight.double()
    for reduction in ("mean", "none"):
        loss = mvp_kernels.cosine_loss(pred, target, weight, reduction, impl=impl)
        upstream = torch.randn_like(loss)
        grads = torch.autograd.grad(loss, (pred, target), upstream)
        assert mvp_kernels.record() == {"cosine_loss": impl}
        assert loss.dtype == torch.promote_types(wide(pred.dtype), wide(target.dtype))

        want = reference.cosine_loss(pred64, target64, None if weight is None else weight64, reduction)
        want_grads = torch.autograd.grad(want, (pred64, target64), upstream.double())
        # 1 - cos is a difference too: of numbers up to 1, times the token's weight.
        assert_near(loss, want, weight64 if reduction == "none" else torch.ones_like(want))
        factor = upstream.double() * weight64
        if reduction == "mean":
            total = weight64.sum()
            factor = factor / total.masked_fill(total == 0, 1)
        assert_near(grads[0], want_grads[0], gradient_size(pred64, target64, factor))
        assert_near(grads[1], want_grads[1], gradient_size(target64, pred64, factor))


@DEVICES
@IMPLS
@pytest.mark.parametrize("weighted", [False, True])
@CASES
def test_cosine_loss(device: str, impl: str, weighted: bool, shape: Shape, dtype: torch.dtype) -> None:
    pred, target = torch.randn(2, shape.images, shape.taken, shape.width, device=device).to(dtype)
    weight = None
    if weighted:
        weight = torch.rand(shape.images, shape.taken, device=device)
        weight[torch.rand_like(weight) < 0.2] = 0
    check_cosine_loss(impl, pred, target, weight)


# Triton's interpreter can't turn bfloat16 into float64, nor back.
PAIRS = [
    pair
    for pair in itertools.permutations(FLOATS, 2)
    if torch.cuda.is_available() or set(pair) != {torch.bfloat16, torch.float64}
]


@DEVICES
@pytest.mark.parametrize(("pred_dtype", "target_dtype"), PAIRS)
def test_losses_of_different_types(device: str, pred_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """A student in bfloat16 against a teacher in float16; each gradient has its own tensor's type."""
    shape = Shape(2, 9, 5, 24)
    pred = torch.randn(2, 5, 24, device=device).to(pred_dtype)
    check_cosine_loss("triton", pred, torch.randn(2, 5, 24, device=device).to(target_dtype), None)
    mvp_kernels.reset_record()
    target = torch.randn(2, 9, 24, device=device).to(target_dtype)
    check_guided_loss("triton", pred, target, distinct_index(shape, device), "layernorm")


def check_guided_loss(impl: str, pred: Tensor, target: Tensor, index: Tensor | None, kind: str) -> None:
    """Value and the predictions' gradient are within precision, of each token and in the mean."""
    pred = pred.detach().requires_grad_()
    pred64, target64 = as_float64(pred), target.double()
    normed64, weight64 = target64, torch.ones(pred.shape[:-1], device=pred.device).double()
    if index is not None:
        normed64, weight64 = reference.masked_gather(target64, index), (index >= 0).double()
    normed64 = reference.token_norm(normed64, kind)
    for reduction in ("mean", "none"):
        loss = mvp_kernels.guided_loss(pred, target, index, kind, reduction, impl=impl)
        upstream = torch.randn_like(loss)
        (grad,) = torch.autograd.grad(loss, pred, upstream)
        assert mvp_kernels.record() == {"guided_loss": impl}
        assert loss.dtype == torch.promote_types(wide(pred.dtype), wide(target.dtype))

        want = reference.guided_loss(pred64, target64, index, kind, reduction)
        (want_grad,) = torch.autograd.grad(want, pred64, upstream.double())
        assert_near(loss, want, torch.ones_like(want))
        factor = upstream.double() * weight64
        if reduction == "mean":
            factor = factor / max(weight64.sum().item(), 1)
        assert_near(grad, want_grad, gradient_size(pred64, normed64, factor))


@DEVICES
@IMPLS
@pytest.mark.parametrize("kind", KINDS)
@CASES
def test_guided_loss(device: str, impl: str, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    images, tokens, taken, width = shape
    pred = torch.randn(images, taken, width, device=device).to(dtype)
    target = (torch.randn(images, tokens, width, device=device) + 0.5).to(dtype)
    check_guided_loss(impl, pred, target, distinct_index(shape, device), kind)


@DEVICES
@IMPLS
@pytest.mark.parametrize("kind", KINDS)
def test_guided_loss_without_an_index(device: str, impl: str, kind: str) -> None:
    pred, target = torch.randn(2, 3, 17, 24, device=device)
    check_guided_loss(impl, pred, target + 0.5, None, kind)


@DEVICES
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), *((4, dtype) for dtype in FLOATS)])
def test_many_programs(device: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the rows don't fill, and sums of sums."""
    small_tiles(monkeypatch, rows)
    shape = Shape(2, 5, 5, 13)
    x, target = torch.randn(2, *shape[:2], shape.width, device=device).to(dtype)
    index = distinct_index(shape, device, padding=0.2)
    for kind in ("l2", "layernorm"):
        check_token_norm("triton", kind, x)
        mvp_kernels.reset_record()
    check_cosine_loss("triton", x, target, torch.rand(2, 5, device=device))
    mvp_kernels.reset_record()
    check_guided_loss("triton", x, target, index, "layernorm")
    mvp_kernels.reset_record()
    test_masked_gather(device, "triton", shape, dtype)


@DEVICES
@pytest.mark.parametrize("tokens", [1, 50, 333])
def test_sums_of_weights(device: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many programs as outside of tests, and in several steps each."""
    monkeypatch.setattr(score, "TOTALS", ALL_TOTALS)
    monkeypatch.setattr(score, "SUM_BLOCK", 4)
    pred, target = torch.randn(2, tokens, 2, device=device)
    weight = torch.rand(tokens, device=device)
    want = reference.cosine_loss(pred.double(), target.double(), weight.double())
    assert_near(mvp_kernels.cosine_loss(pred, target, weight, impl="triton"), want)
    index = torch.arange(tokens, device=device)[None]
    index[0, ::3] = -1
    want = reference.guided_loss(pred[None].double(), target[None].double(), index)
    assert_near(mvp_kernels.guided_loss(pred[None], target[None], index, impl="triton"), want, torch.ones_like(want))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # by the interpreter
@DEVICES
@IMPLS
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_huge_and_tiny_tokens(device: str, impl: str, dtype: torch.dtype) -> None:
    """Zeros, squares beyond float16, lengths below eps; in 16 bits some gradients overflow, as they must."""
    x_MD = torch.randn(5, 64, device=device) * torch.tensor([0, 1e4, 1e-8, 1e-3, 1.0], device=device)[:, None]
    y_MD = torch.randn(5, 64, device=device)[:, None] * torch.tensor([1.0, 1e4, 0, 1e-8], device=device)[:, None]
    x_MKD = x_MD.to(dtype)[:, None].expand(-1, 4, -1)
    y_MKD = y_MD.to(dtype)
    for kind in ("l2", "layernorm"):
        check_token_norm(impl, kind, x_MD.to(dtype))
        mvp_kernels.reset_record()
    check_cosine_loss(impl, x_MKD, y_MKD, None)
    mvp_kernels.reset_record()
    for kind in KINDS:
        check_guided_loss(impl, x_MKD, y_MKD, None, kind)


@DEVICES
@IMPLS
@pytest.mark.parametrize("dtypes", [[d] for d in FLOATS] + [[torch.bfloat16, torch.float16], FLOATS[:3]])
@pytest.mark.parametrize(
    ("patch", "colours", "rows", "columns"), [(1, 3, 3, 5), (2, 4, 3, 2), (14, 1, 2, 3), (16, 3, 14, 14), (32, 3, 2, 1)]
)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_patchify(
    device: str, impl: str, layout: str, patch: int, colours: int, rows: int, columns: int, dtypes: list[torch.dtype]
) -> None:
    images_BHWC = torch.randint(0, 256, (2, rows * patch, columns * patch, colours), dtype=torch.uint8, device=device)
    images_BHWC[0, 0, 0], images_BHWC[1, -1, -1] = 0, 255
    stats = torch.rand(len(dtypes), 2, colours, dtype=torch.float64) + 0.1
    normalizations = [
        Normalization(tuple(mean), tuple(std), dtype) for (mean, std), dtype in zip(stats.tolist(), dtypes, strict=True)
    ]
    images = images_BHWC if layout == "NHWC" else images_BHWC.permute(0, 3, 1, 2).contiguous()
    outs = mvp_kernels.patchify(images, patch, normalizations, layout, impl=impl)
    assert mvp_kernels.record() == {"patchify": impl}
    assert [out.dtype for out in outs] == dtypes
    # A patch at a time, and the colours apart: another way than either implementation's.
    for out_BNP, (mean, std) in zip(outs, stats.to(device), strict=True):
        assert out_BNP.is_contiguous()
        x_BHWC = (images_BHWC.double() / 255 - mean) / std
        cut = [
            x_BHWC[:, row : row + patch, column : column + patch].permute(0, 3, 1, 2).flatten(1)
            for row in range(0, rows * patch, patch)
            for column in range(0, columns * patch, patch)
        ]
        # Near the mean, a difference of larger numbers: x / (255 std) up to 1 / std, and mean / std.
        size_P = ((1 + mean) / std).repeat_interleave(patch * patch)
        assert_near(out_BNP, torch.stack(cut, 1), size_P)
