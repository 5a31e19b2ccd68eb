"""The reference operations of mvp_kernels against loops in plain Python and numpy, in value and in gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvp_kernels
from mvp_kernels import Normalization, cosine_loss, guided_loss, masked_gather, patchify, token_norm

KINDS = ["l2", "layernorm", "none"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def only_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the environment asks for; `auto` takes it on the CPU."""
    monkeypatch.delenv("MVP_KERNELS", raising=False)
    mvp_kernels.reset_record()
    yield
    assert set(mvp_kernels.record().values()) == {"reference"}
    mvp_kernels.reset_record()


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in each run; pytest shows the seed where a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"numpy seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def ragged_index(rng: np.random.Generator, images: int, tokens: int, taken: int) -> Tensor:
    """Random tokens with repetitions, and some padding anywhere."""
    index = rng.integers(0, tokens, (images, taken))
    index[rng.random((images, taken)) < 0.2] = -1
    return torch.from_numpy(index)


def slow_norm(row: np.ndarray, kind: str, eps: float) -> np.ndarray:
    row = row.astype(np.float64)
    if kind == "l2":
        return row / max(math.sqrt(sum(v * v for v in row)), eps)
    if kind == "layernorm":
        mean = sum(row) / len(row)
        return (row - mean) / math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + eps)
    return row


def slow_cosine(p: np.ndarray, t: np.ndarray, eps: float) -> float:
    p, t = p.astype(np.float64), t.astype(np.float64)
    return 1 - float(p @ t) / (max(math.sqrt(p @ p), eps) * max(math.sqrt(t @ t), eps))


# ---- masked_gather


@pytest.mark.parametrize(("images", "tokens", "taken", "width"), [(1, 1, 1, 1), (3, 7, 5, 13), (2, 50, 80, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_masked_gather(rng, images, tokens, taken, width, dtype) -> None:
    x, index = torch.randn(images, tokens, width).to(dtype), ragged_index(rng, images, tokens, taken)
    out = masked_gather(x, index)
    assert out.dtype == dtype
    for b, m in itertools.product(range(images), range(taken)):
        i = int(index[b, m])
        torch.testing.assert_close(out[b, m], x[b, i] if i >= 0 else torch.zeros(width, dtype=dtype), rtol=0, atol=0)


def test_masked_gather_gradient_adds_repeated_tokens_up_and_skips_padding(rng) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 1, -1], [0, 2, 0]])
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    masked_gather(x, index).backward(upstream)
    want = torch.zeros_like(x)
    for b, m in itertools.product(range(2), range(3)):
        if index[b, m] >= 0:
            want[b, index[b, m]] += upstream[b, m]
    torch.testing.assert_close(x.grad, want)
    assert torch.autograd.gradcheck(lambda x: masked_gather(x, index), (x,))


def test_masked_gather_padding_hides_nan(rng) -> None:
    x = torch.full((1, 2, 3), torch.nan, requires_grad=True)
    out = masked_gather(x, torch.tensor([[-1, -1]]))
    out.sum().backward()
    assert (out == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 0, 3, 2), (2, 4, 3, 0)])
def test_masked_gather_of_nothing(shape) -> None:
    images, tokens, taken, width = shape
    index = torch.full((images, taken), -1 if tokens == 0 else 0)
    out = masked_gather(torch.ones(images, tokens, width), index)
    assert out.shape == (images, taken, width)
    assert (out == (0 if tokens == 0 else 1)).all()


# ---- token_norm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 1), (3, 17), (2, 3, 512)])
def test_token_norm(rng, kind, dtype, shape) -> None:
    x = (3 * torch.randn(shape) + 1).to(dtype)
    eps = float(rng.choice([1e-6, 1e-2]))
    out = token_norm(x, kind, eps)
    assert out.dtype == dtype
    rows = x.double().numpy().reshape(-1, shape[-1])
    want = torch.from_numpy(np.stack([slow_norm(row, kind, eps) for row in rows]).reshape(shape))
    # float32 arithmetic, then one rounding to the type.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_token_norm_gradient(rng, kind) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_norm(x, kind), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_token_norm_of_zeros_and_constants(kind) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = token_norm(x, kind)
    out.sum().backward()
    assert (out == 0).all()
    assert torch.isfinite(x.grad).all()
    if kind == "layernorm":
        assert (token_norm(torch.full((1, 8), 7.0), kind) == 0).all()


def test_token_norm_statistics_are_float32() -> None:
    """The squares of 65504 overflow float16, and 4096 bfloat16 ones can't be summed in bfloat16."""
    x = torch.full((1, 64), 65504.0, dtype=torch.float16)
    torch.testing.assert_close(token_norm(x), torch.full((1, 64), 0.125, dtype=torch.float16))
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    torch.testing.assert_close(token_norm(ones), torch.full((1, 4096), 1 / 64, dtype=torch.bfloat16), rtol=0, atol=0)


# ---- cosine_loss


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 5, 512)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_cosine_loss(rng, shape, dtype) -> None:
    pred, target = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    pairs = zip(
        pred.double().numpy().reshape(-1, shape[-1]), target.double().numpy().reshape(-1, shape[-1]), strict=True
    )
    want = torch.tensor([slow_cosine(p, t, 1e-6) for p, t in pairs], dtype=torch.float64).reshape(shape[:-1])
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 1e-6}
    tokens = cosine_loss(pred, target, reduction="none")
    assert tokens.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(tokens.double(), want, **exact)
    torch.testing.assert_close(cosine_loss(pred, target).double(), want.mean(), **exact)
    torch.testing.assert_close(tokens, 1 - F.cosine_similarity(pred.to(tokens.dtype), target.to(tokens.dtype), -1))


def test_cosine_loss_weights(rng) -> None:
    pred, target, weight = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.rand(3, 4)
    weight[1, 2] = 0
    pred[1, 2] = torch.inf  # weight 0: takes no part, whatever it holds
    pred.requires_grad_()
    losses = {
        (b, m): slow_cosine(pred[b, m].detach().numpy(), target[b, m].numpy(), 1e-6)
        for b, m in itertools.product(range(3), range(4))
        if (b, m) != (1, 2)
    }
    total = sum(weight[token].item() * loss for token, loss in losses.items())
    loss = cosine_loss(pred, target, weight)
    loss.backward()
    assert loss.item() == pytest.approx(total / weight.sum().item(), rel=1e-5)
    assert cosine_loss(pred, target, weight, "none")[1, 2] == 0
    assert torch.isfinite(pred.grad).all()
    assert (pred.grad[1, 2] == 0).all()


def test_cosine_loss_over_no_token_is_zero() -> None:
    pred = torch.randn(0, 4, requires_grad=True)
    loss = cosine_loss(pred, torch.randn(0, 4))
    loss.backward()
    assert loss == 0
    pred = torch.randn(3, 4, requires_grad=True)
    loss = cosine_loss(pred, torch.randn(3, 4), torch.zeros(3))
    loss.backward()
    assert loss == 0
    assert (pred.grad == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_cosine_loss_gradient(rng, weighted) -> None:
    pred, target = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(3, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda p, t: cosine_loss(p, t, weight), (pred, target))
    assert torch.autograd.gradgradcheck(lambda p, t: cosine_loss(p, t, weight), (pred, target))


def test_cosine_gradient_is_the_formula(rng) -> None:
    """d(1 - cos)/dp = -(t / |t| - cos p / |p|) / |p|."""
    pred, target = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), torch.randn(6, 9, dtype=torch.float64)
    cosine_loss(pred, target).backward()
    length = pred.detach().norm(dim=1, keepdim=True)
    p, t = pred.detach() / length, F.normalize(target)
    torch.testing.assert_close(pred.grad, -(t - (p * t).sum(1, keepdim=True) * p) / length / 6)


@pytest.mark.parametrize("pred_scale", [0.0, 1e-30, 1e-7, 1.0, 1e15])
@pytest.mark.parametrize("target_scale", [0.0, 1e-30, 1.0, 1e15])
def test_cosine_loss_extremes(rng, pred_scale, target_scale) -> None:
    pred = (pred_scale * torch.randn(4, 32)).requires_grad_()
    target = target_scale * torch.randn(4, 32)
    loss = cosine_loss(pred, target, reduction="none")
    loss.sum().backward()
    assert torch.isfinite(pred.grad).all()
    want = [slow_cosine(p, t, 1e-6) for p, t in zip(pred.detach().numpy(), target.numpy(), strict=True)]
    torch.testing.assert_close(loss.double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-5)
    if pred_scale == 0 or target_scale == 0:
        assert (loss == 1).all()


def test_cosine_loss_bounds(rng) -> None:
    x = torch.randn(5, 64)
    torch.testing.assert_close(cosine_loss(x, 3 * x), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_loss(x, -x), torch.tensor(2.0), atol=1e-6, rtol=0)


def test_autocast_keeps_float32() -> None:
    pred, target = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = guided_loss(pred, target, kind="layernorm")
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, guided_loss(pred, target, kind="layernorm"), rtol=0, atol=0)


# ---- guided_loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("images", "tokens", "taken", "width"), [(1, 1, 1, 2), (3, 7, 5, 13), (2, 197, 76, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_guided_loss(rng, kind, images, tokens, taken, width, dtype) -> None:
    pred, target = torch.randn(images, taken, width).to(dtype), (torch.randn(images, tokens, width) + 0.5).to(dtype)
    index = ragged_index(rng, images, tokens, taken)
    index[0, 0] = 0
    want = [
        slow_cosine(pred[b, m].double().numpy(), slow_norm(target[b, index[b, m]].double().numpy(), kind, 1e-6), 1e-6)
        for b, m in itertools.product(range(images), range(taken))
        if index[b, m] >= 0
    ]
    loss = guided_loss(pred, target, index, kind)
    assert loss.item() == pytest.approx(sum(want) / len(want), abs=1e-12 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(guided_loss(pred.flatten(0, 1), target, index, kind), loss, rtol=0, atol=0)
    tokens_BM = guided_loss(pred, target, index, kind, "none")
    torch.testing.assert_close(tokens_BM[index >= 0].mean(), loss)
    assert (tokens_BM[index < 0] == 0).all()
    if (index >= 0).all():
        gathered = masked_gather(target, index)
        torch.testing.assert_close(guided_loss(pred, gathered, None, kind), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_guided_loss_without_an_index(rng, kind) -> None:
    pred, target = torch.randn(3, 5, 8), torch.randn(3, 9, 8)
    index = torch.from_numpy(rng.integers(0, 9, (3, 5)))
    loss = guided_loss(pred, target, index, kind)
    torch.testing.assert_close(guided_loss(pred, masked_gather(target, index), None, kind), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_guided_loss_gradient(rng, kind) -> None:
    pred, target = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    index = torch.tensor([[0, 5, -1, 2], [3, 3, 1, -1]])
    assert torch.autograd.gradcheck(lambda p, t: guided_loss(p, t, index, kind), (pred, target))
    pred.grad = None
    guided_loss(pred, target, index, kind).backward()
    assert (pred.grad[index < 0] == 0).all()
    assert (pred.grad[index >= 0] != 0).any(-1).all()


def test_guided_loss_l2_and_none_agree_and_layernorm_does_not(rng) -> None:
    pred, target = torch.randn(1, 4, 16), torch.randn(1, 4, 16) + 2
    torch.testing.assert_close(guided_loss(pred, target, kind="l2"), guided_loss(pred, target, kind="none"))
    assert (guided_loss(pred, target, kind="l2") - guided_loss(pred, target, kind="layernorm")).abs() > 1e-3


# ---- patchify


@pytest.mark.parametrize(("height", "width", "patch"), [(1, 1, 1), (6, 9, 3), (32, 16, 16), (28, 42, 14)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_patchify(rng, height, width, patch, dtype) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8))
    mean, std = rng.uniform(0, 1, 3).tolist(), rng.uniform(0.1, 1, 3).tolist()
    (out,) = patchify(images, patch, [Normalization(mean, std, dtype)])
    assert out.dtype == dtype
    assert out.is_contiguous()
    want = np.empty((2, (height // patch) * (width // patch), 3 * patch * patch))
    for b, y, x, c in itertools.product(range(2), range(height), range(width), range(3)):
        n = (y // patch) * (width // patch) + x // patch
        p = c * patch * patch + (y % patch) * patch + x % patch
        want[b, n, p] = (int(images[b, y, x, c]) / 255 - mean[c]) / std[c]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), torch.from_numpy(want), rtol=tolerance, atol=tolerance)


def test_patchify_then_linear_is_the_convolution(rng) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (3, 32, 48, 3), dtype=np.uint8))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    conv = torch.nn.Conv2d(3, 5, 8, stride=8, dtype=torch.float64)
    x = (images.double() / 255 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    want = conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    (patches,) = patchify(images, 8, [Normalization(mean, std, torch.float64)])
    out = F.linear(patches, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(out, want)
