"""What the tests of mvp_kernels share: devices, shapes, fresh inputs, and how far a result may be from float64's.

Where there is no GPU, Triton's interpreter runs the kernels on the CPU (see conftest.py). Where there is one they are
compiled, and the tests' forms on the CPU are left out.

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import registry
from mvp_kernels.arguments import EPS
from mvp_kernels.launch import Launch
from mvp_kernels.operators import cosine_loss, guided_loss, masked_gather, patchify, relpos_attention, score, token_norm

GPU = pytest.mark.gpu
_CPU = [] if torch.cuda.is_available() else ["cpu"]
DEVICES = pytest.mark.parametrize("device", [*_CPU, pytest.param("cuda", marks=GPU)])
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
CPU_IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"] if _CPU else ["reference"])
KINDS = ["l2", "layernorm", "none"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATORS = (cosine_loss, guided_loss, masked_gather, patchify, relpos_attention, token_norm)  # importing adds the ops

# Relative; for 16 bits this much of a float32 result, which is then rounded.
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


class Shape(NamedTuple):
    """Sizes of a case."""

    images: int
    tokens: int
    taken: int
    width: int


_LARGE, _SMALL = [torch.float32], FLOATS  # the interpreter takes its time over many programs and many values
SHAPES = {
    Shape(3, 9, 5, 1): _SMALL,
    Shape(3, 9, 4, 7): _SMALL,
    Shape(256, 3, 2, 7): [torch.float16],
    Shape(2, 197, 76, 64): _SMALL,
    Shape(1, 197, 197, 384): [torch.bfloat16],
    Shape(2, 33, 20, 512): _LARGE,
    Shape(1, 50, 49, 768): _LARGE,
    Shape(1, 20, 1, 1024): _LARGE,
    Shape(2, 9, 6, 1280): _LARGE,
    Shape(1, 8, 5, 4096): _SMALL,
    Shape(0, 5, 3, 8): _LARGE,
    Shape(3, 5, 0, 8): _SMALL,
    Shape(1, 1, 1, 1): _LARGE,
}
CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}")
        for shape, dtypes in SHAPES.items()
        for dtype in dtypes
    ],
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh numbers in each run (a failure shows the seed), no request by the environment, an empty record.

    To be imported by name; the registry is as it was afterwards.
    """
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other over tensors this small
    for name in ("MVP_KERNELS", "MVP_KERNELS_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(registry, "_registered", {op: dict(found) for op, found in registry._registered.items()})
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    if _CPU:
        monkeypatch.setattr(score, "TOTALS", 4)  # programs that sum up the weights of every loss: 64 take a while
    mvp_kernels.reset_record()
    yield
    mvp_kernels.reset_record()
    torch.set_num_threads(threads)


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Kernels that work on `rows` rows a program, and sum in short steps, so that small inputs take many of both."""
    for module in (*OPERATORS, score):
        monkeypatch.setattr(module, "launch_of", lambda *_: Launch(rows, 1), raising=False)
    monkeypatch.setattr(score, "SUM_BLOCK", 4)


def distinct_index(shape: Shape, device: str, padding: float | None = None) -> Tensor:
    """index_BM: distinct tokens in any order; a fifth is padding (or this share), and one of several images all of it.

    Where as many are taken as there are, all are.
    """
    images, tokens, taken, _ = shape
    if padding is None:
        padding = 0.0 if taken == tokens else 0.2
    index_BM = torch.rand(images, tokens).argsort(1)[:, :taken].contiguous()
    index_BM[torch.rand(images, taken) < padding] = -1
    if padding and images > 1:
        index_BM[0] = -1
    return index_BM.to(device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of a loss of tokens of this type."""
    return torch.promote_types(dtype, torch.float32)


def assert_near(actual: Tensor, want: Tensor, size: Tensor | None = None) -> None:
    """`actual` is the float64 result `want` to the precision of its type.

    That is 1e-6 (float64: 1e-12) of `size`, and for 16 bits one rounding. What isn't finite, or overflows in the
    type, is the same.

    Args:
        size: what the precision is relative to, broadcast to `want`; left out, each value itself. Where a value is a
            difference of larger ones, the size of those: all of them may cancel, and what is left is rounding.
    """
    assert want.dtype == torch.float64
    assert actual.shape == want.shape
    actual, want = actual.detach(), want.detach()
    rounded = want.to(actual.dtype)
    finite = torch.isfinite(rounded)
    torch.testing.assert_close(actual[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True)
    size = want.abs() if size is None else size.detach().expand_as(want)
    allowed = PRECISION[actual.dtype] * size
    if actual.dtype.itemsize == 2:
        # Half the distance to a neighbour; Triton's interpreter cuts bfloat16 off instead of rounding it.
        cut_off = actual.dtype == torch.bfloat16 and actual.device.type == "cpu"
        allowed = allowed + spacing(want, actual.dtype) * (1.0 if cut_off else 0.5)
    excess = torch.where(finite, (actual.double() - want).abs() - allowed, 0.0)
    wrong = ~(excess <= 0)
    if wrong.any():
        at = tuple(int(i) for i in excess.nan_to_num(torch.inf).flatten().argmax().cpu().unsqueeze(0))
        worst = {"got": actual.flatten()[at].item(), "want": want.flatten()[at].item()}
        raise AssertionError(f"{int(wrong.sum())} of {want.numel()} are off; {worst}, allowed {allowed.flatten()[at]}")


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor], exact: bool = True) -> None:
    """Bit for bit, and at least one of them.

    Not `exact`: results of kernels that are compiled apart, for other strides or other arguments. They may add up in
    another order, so that on a GPU they are only close.
    """
    assert left
    for a, b in zip(left, right, strict=True):
        bits = exact or a.device.type == "cpu"
        tolerance = 0.0 if bits else 1e-2 if a.dtype.itemsize == 2 else 1e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours of `dtype` around the float64 numbers `x`."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    _, exponent = torch.frexp(x)
    distance = torch.ldexp(torch.full_like(x, info.eps), exponent - 1)
    return torch.where(x == 0, least, distance.clamp_min(least))


def gradient_size(x_MD: Tensor, other_MD: Tensor, factor_M: Tensor) -> Tensor:
    """(M, 1): the size of the two terms whose difference is the gradient of factor (1 - cos(x, other)) for x.

    A gradient stands at a right angle to its token, so that there is nothing left of a token of one channel, or of two
    tokens of the same direction.
    """
    length_M1 = x_MD.norm(dim=-1, keepdim=True).clamp_min(EPS)
    other_M1 = other_MD.norm(dim=-1, keepdim=True).clamp_min(EPS)
    terms_M1 = (x_MD.abs() / length_M1 + other_MD.abs() / other_M1).amax(-1, keepdim=True)
    return terms_M1 * factor_M[..., None].abs() / length_M1


class Call(NamedTuple):
    """An operation with its inputs: `run(*inputs)`. Those inputs that require a gradient get one."""

    op: str
    run: Callable[..., Tensor | list[Tensor]]
    inputs: tuple[Tensor, ...]

    def outcome(self, run: Callable[..., Tensor | list[Tensor]] | None = None) -> list[Tensor]:
        """Results and gradients, for upstream gradients that are the same in each call."""
        results = (run or self.run)(*self.inputs)
        results = [results] if isinstance(results, Tensor) else list(results)
        leaves = [x for x in self.inputs if x.requires_grad]
        if not leaves:
            return results
        counts = [torch.ones_like(r, dtype=torch.float32).flatten().cumsum(0).reshape(r.shape) for r in results]
        upstream = [(3 * c / max(c.numel(), 2) - 1).to(r.dtype) for c, r in zip(counts, results, strict=True)]
        return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, upstream))


def make_call(name: str, device: str, dtype: torch.dtype = torch.float32, impl: str = "triton") -> Call:
    """One of CALLS on fresh numbers; guided_loss and cosine_loss prepare for another upstream gradient than comes."""
    k = mvp_kernels
    index_BM = torch.tensor([[0, 3, -1, 6], [-1, -1, 2, 1], [6, 5, 4, 3]], device=device)
    pred_BMD, other_BMD = (torch.randn(2, 3, 4, 13, device=device) + 0.5).to(dtype)
    x_BND, weight_BM = torch.randn(3, 7, 13, device=device).to(dtype), torch.rand(3, 4, device=device)
    images_BHWC = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8, device=device)
    normalizations = [
        k.Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), dtype),
        k.Normalization((0.5,) * 3, (0.1,) * 3, dtype),
    ]

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    heads = torch.randn(3, 2, 2, 18, 5, device=device).to(dtype)  # q, k, v; images, heads, tokens, channels
    bias_HNN, table_RH = torch.randn(2, 18, 18, device=device).to(dtype), torch.randn(7, 2, device=device).to(dtype)
    query_BM = torch.tensor([[17, -1, 3], [0, 5, 9]], device=device)
    index_NN = torch.randint(0, 7, (18, 18), device=device)

    calls: dict[str, Call] = {
        "masked_gather": Call(
            "masked_gather", lambda x, index: k.masked_gather(x, index, impl=impl), (leaf(x_BND), index_BM)
        ),
        "token_norm l2": Call("token_norm", lambda x: k.token_norm(x, "l2", impl=impl), (leaf(x_BND),)),
        "token_norm layernorm": Call("token_norm", lambda x: k.token_norm(x, "layernorm", impl=impl), (leaf(x_BND),)),
        "cosine_loss mean": Call(
            "cosine_loss", lambda p, t: k.cosine_loss(p, t, impl=impl), (leaf(pred_BMD), leaf(other_BMD))
        ),
        "cosine_loss weighted": Call(
            "cosine_loss", lambda p, t, w: k.cosine_loss(p, t, w, impl=impl), (leaf(pred_BMD), other_BMD, weight_BM)
        ),
        "cosine_loss none": Call(
            "cosine_loss",
            lambda p, t, w: k.cosine_loss(p, t, w, "none", impl=impl),
            (pred_BMD, leaf(other_BMD), weight_BM),
        ),
        "guided_loss mean": Call(
            "guided_loss", lambda p, t, i: k.guided_loss(p, t, i, impl=impl), (leaf(pred_BMD), x_BND, index_BM)
        ),
        "guided_loss none": Call(
            "guided_loss",
            lambda p, t, i: k.guided_loss(p, t, i, "layernorm", "none", impl=impl),
            (leaf(pred_BMD), x_BND, index_BM),
        ),
        "guided_loss unindexed": Call(
            "guided_loss",
            lambda p, t: k.guided_loss(p, t, kind="layernorm", impl=impl),
            (leaf(pred_BMD), other_BMD),
        ),
        "guided_loss target": Call(
            "guided_loss",
            lambda p, t, i: k.guided_loss(p, t, i, "layernorm", impl=impl),
            (leaf(pred_BMD), leaf(x_BND), index_BM),
        ),
        "relpos_bias": Call("relpos_bias", lambda t, i: k.relpos_bias(t, i, impl=impl), (leaf(table_RH), index_NN)),
        "relpos_attention": Call(
            "relpos_attention",
            lambda q, key, v, b: k.relpos_attention(q, key, v, b, scale=0.7, impl=impl),
            (*map(leaf, heads), leaf(bias_HNN)),
        ),
        "relpos_attention plain": Call(
            "relpos_attention", lambda q, key, v: k.relpos_attention(q, key, v, impl=impl), tuple(map(leaf, heads))
        ),
        "relpos_attention pruned": Call(
            "relpos_attention",
            lambda q, key, v, b, i: k.relpos_attention(q, key, v, b, query_index_BM=i, impl=impl),
            (leaf(heads[0, :, :, :3]), leaf(heads[1]), leaf(heads[2]), leaf(bias_HNN), query_BM),
        ),
        "relpos_attention_qkv": Call(
            "relpos_attention_qkv",
            lambda qkv, b: k.relpos_attention_qkv(qkv, b, impl=impl),
            (leaf(heads.permute(1, 3, 0, 2, 4).contiguous()), leaf(bias_HNN)),
        ),
        "patchify": Call("patchify", lambda images: k.patchify(images, 4, normalizations, impl=impl), (images_BHWC,)),
    }
    return calls[name]


CALLS = [
    "masked_gather",
    "token_norm l2",
    "token_norm layernorm",
    "cosine_loss mean",
    "cosine_loss weighted",
    "cosine_loss none",
    "guided_loss mean",
    "guided_loss none",
    "guided_loss unindexed",
    "guided_loss target",
    "relpos_bias",
    "relpos_attention",
    "relpos_attention plain",
    "relpos_attention pruned",
    "relpos_attention_qkv",
    "patchify",
]
