"""What the tests of mvp_kernels share: devices, shapes, fresh inputs, and how far a result may be from float64's.

Where there is no GPU, Triton's interpreter runs the kernels on the CPU (see conftest.py). Where there is one they are
compiled, and the tests' forms on the CPU are left out.

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import registry
from mvp_kernels.arguments import EPS
from mvp_kernels.launch import Launch
from mvp_kernels.operators import cosine_loss, guided_loss, masked_gather, patchify, score, token_norm

GPU = pytest.mark.gpu
_CPU = [] if torch.cuda.is_available() else ["cpu"]
DEVICES = pytest.mark.parametrize("device", [*_CPU, pytest.param("cuda", marks=GPU)])
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
KINDS = ["l2", "layernorm", "none"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPERATORS = (cosine_loss, guided_loss, masked_gather, patchify, token_norm)  # the modules; importing them adds the ops

# Relative; for 16 bits this much of a float32 result, which is then rounded.
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


class Shape(NamedTuple):
    """Sizes of a case."""

    images: int
    tokens: int
    taken: int
    width: int


SHAPES = [
    Shape(3, 9, 5, 1),
    Shape(3, 9, 4, 7),
    Shape(256, 3, 2, 7),
    Shape(2, 197, 76, 64),
    Shape(1, 197, 197, 384),
    Shape(2, 33, 20, 512),
    Shape(1, 50, 49, 768),
    Shape(1, 20, 1, 1024),
    Shape(2, 9, 6, 1280),
    Shape(1, 8, 5, 4096),
    Shape(0, 5, 3, 8),
    Shape(3, 5, 0, 8),
    Shape(1, 1, 1, 1),
]
# The interpreter needs milliseconds a program, and some kernels a program an image: many images in one type alone.
CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}")
        for shape in SHAPES
        for dtype in FLOATS
        if shape.images < 256 or dtype == torch.float16
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
