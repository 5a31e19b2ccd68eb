"""relpos_attention and relpos_bias against the formula in float64: output and every gradient, each branch, each edge.

The reference here is neither implementation: softmax of a whole matrix of scores, written out.

Shape legend: B images, H heads, M queries, N keys, D channels of a head, R rows of the table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from timm.models.beit import gen_relative_position_index
from torch import Tensor

import mvp_kernels
from mvp_kernels.launch import Launch, default_launch
from mvp_kernels.operators import attention_launch
from mvp_kernels.operators.attention_tiles import Cut, cut
from mvp_kernels.operators.relpos_bias import sorted_pairs
from tests.kernel_cases import DEVICES, IMPLS, surroundings

__all__ = ["surroundings"]

# Of the largest value. In 16 bits probabilities and their gradients are rounded too, as by every flash attention;
# Triton's interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7 if torch.cuda.is_available() else 2.0**-6,
}


class Size(NamedTuple):
    """Of a case; `rows` of a tile, None for the default's."""

    images: int
    heads: int
    tokens: int
    width: int
    rows: int | None = None

    def __str__(self) -> str:
        return "x".join(str(n) for n in self if n is not None)


SIZES = [
    (Size(2, 2, 1, 8), torch.float32),
    (Size(1, 1, 2, 1), torch.float32),
    (Size(1, 2, 16, 16, 16), torch.float32),  # whole tiles alone
    (Size(1, 1, 32, 16, 16), torch.float32),
    (Size(2, 1, 33, 24, 16), torch.float32),  # both kinds of tile, channels that are masked
    (Size(1, 2, 40, 32), torch.float64),
    (Size(2, 1, 37, 80, 32), torch.float16),
    (Size(1, 1, 65, 64), torch.bfloat16),
    (Size(1, 1, 17, 128), torch.bfloat16),
    (Size(1, 1, 197, 64), torch.bfloat16),  # what it is made for
    (Size(1, 1, 65, 32), torch.float32),
]
CASES = pytest.mark.parametrize(("size", "dtype"), SIZES, ids=lambda x: str(x).removeprefix("torch."))


class Given(NamedTuple):
    """Inputs of a call; the bias is (H, N, N) or none."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    query_index: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [x for x in self[:4] if x is not None]


def exact(given: Given, scale: float) -> Tensor:
    """The formula, as it stands."""
    q, k, v, bias, query_index_BM = given
    s_BHMN = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if bias is not None:
        rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        rows = rows if query_index_BM is None else query_index_BM.clamp_min(0)
        s_BHMN = s_BHMN + torch.stack([bias[:, row] for row in rows])
    out = torch.einsum("bhmn,bhnd->bhmd", s_BHMN.softmax(-1), v)
    if query_index_BM is not None:
        out = out.masked_fill((query_index_BM < 0)[:, None, :, None], 0)
    return out


def make(size: Size, dtype: torch.dtype, device: str, bias: float | None = 1.0, taken: int | None = None) -> Given:
    """Random inputs as slices of a projection's output; `bias` is its size, `taken` how many queries of an image."""
    qkv = torch.randn(size.images, size.tokens, 3, size.heads, size.width, device=device).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias_HNN = None if bias is None else bias * torch.randn(size.heads, size.tokens, size.tokens, device=device)
    index = None
    if taken is not None:
        index = torch.stack([torch.randperm(size.tokens)[:taken] for _ in range(size.images)]).to(device)
        index[torch.rand(index.shape, device=device) < 0.2] = -1
        q = q[:, :, :taken]
    return Given(q, k, v, None if bias_HNN is None else bias_HNN.to(dtype), index)


def outcome(given: Given, upstream: Tensor, impl: str, scale: float) -> list[Tensor]:
    """Output and gradients, by an implementation of the package."""
    given = Given(*(x if x is None or not x.is_floating_point() else x.detach().requires_grad_() for x in given))
    mvp_kernels.reset_record()
    out = mvp_kernels.relpos_attention(*given[:4], scale=scale, query_index_BM=given.query_index, impl=impl)
    assert mvp_kernels.record() == {"relpos_attention": impl}
    return [out.detach(), *torch.autograd.grad(out, given.leaves(), upstream)]


def wanted(given: Given, upstream: Tensor, scale: float) -> list[Tensor]:
    """The same in float64."""
    given = Given(*(x if x is None or not x.is_floating_point() else x.detach().double() for x in given))
    for x in given.leaves():
        x.requires_grad_()
    out = exact(given, scale)
    return [out.detach(), *torch.autograd.grad(out, given.leaves(), upstream.double())]


# A float32 score of 50 is itself rounded by up to 2e-6, and so is the sum's logarithm: torch's own is no nearer.
EXTREME = 8e-6


def near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Within tolerance of the largest value, or of 1, the inputs' size: a gradient may be nothing but rounding."""
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for name, x, y in zip(("out", "q", "k", "v", "bias"), got, want, strict=False):
        assert x.dtype == dtype
        size = max(y.abs().max().item(), 1.0)
        error = (x.double() - y).abs().max().item()
        assert error <= tolerance * size, f"{name} is off by {error / size:.2g} of its largest value"


def check(given: Given, impl: str, dtype: torch.dtype, tolerance: float | None = None) -> None:
    scale = 0.7 / math.sqrt(given.q.shape[-1])
    upstream = torch.randn(given.q.shape, device=given.q.device).to(dtype)
    near(outcome(given, upstream, impl, scale), wanted(given, upstream, scale), dtype, tolerance)


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Set the rows of a tile."""

    def rows(count: int | None) -> None:
        if count is not None:
            monkeypatch.setattr(attention_launch, "launch_of", lambda *_: Launch(count, 4))

    return rows


@DEVICES
@CASES
@pytest.mark.parametrize("bias", [None, 1.0], ids=["plain", "bias"])
def test_values_and_gradients(device: str, size: Size, dtype: torch.dtype, bias: float | None, tile) -> None:  # type: ignore[no-untyped-def]
    tile(size.rows)
    check(make(size, dtype, device, bias), "triton", dtype)


@DEVICES
@pytest.mark.parametrize("bias", [None, 1.0, 50.0], ids=["plain", "bias", "extreme"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference(device: str, dtype: torch.dtype, bias: float | None) -> None:
    for taken in (None, 4):
        tolerance = EXTREME if bias == 50.0 and dtype == torch.float32 else None
        check(make(Size(2, 2, 9, 8), dtype, device, bias, taken), "reference", dtype, tolerance)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "taken"), [(33, 20), (17, 1)])
@pytest.mark.parametrize("bias", [None, 1.0], ids=["plain", "bias"])
def test_queries_of_their_own(  # type: ignore[no-untyped-def]
    device: str, bias: float | None, tokens: int, taken: int, dtype: torch.dtype, tile
) -> None:
    """Some queries are padding: zeros, and no gradient for or by them."""
    tile(16)
    given = make(Size(2, 1, tokens, 8), dtype, device, bias, taken)
    check(given, "triton", dtype)


@DEVICES
def test_what_padding_holds_is_not_seen(device: str) -> None:
    """NaN in padded queries and their upstream gradients."""
    given = make(Size(2, 2, 20, 8), torch.float32, device, 1.0, 6)
    assert given.query_index is not None
    given.query_index[0, 1] = -1
    padded = (given.query_index < 0)[:, None, :, None]
    upstream = torch.randn(given.q.shape, device=device)
    clean = outcome(given, upstream, "triton", 0.3)
    dirty = given._replace(q=given.q.masked_fill(padded, math.nan))
    for x, y in zip(outcome(dirty, upstream.masked_fill(padded, math.nan), "triton", 0.3), clean, strict=True):
        assert torch.equal(x, y)
    for x in clean[:2]:
        assert (x.masked_select(padded.expand_as(x)) == 0).all()


@DEVICES
@pytest.mark.parametrize("rows", [16, 32])
def test_extremes(device: str, rows: int, tile) -> None:  # type: ignore[no-untyped-def]
    """Biases of +-50, equal rows, scores in the hundreds, a bias that hides keys."""
    tile(rows)
    size, dtype = Size(2, 1, 35, 16), torch.float32
    given = make(size, dtype, device, 0.0)
    assert given.bias is not None
    signs = 50 * (2 * torch.randint(0, 2, given.bias.shape, device=device) - 1).float()
    check(given._replace(bias=signs), "triton", dtype, EXTREME)
    check(given._replace(bias=signs[:, :1].expand_as(signs)), "triton", dtype, EXTREME)
    check(given._replace(q=given.q[:, :, :1].expand_as(given.q), k=torch.zeros_like(given.k)), "triton", dtype)
    check(given._replace(bias=None, k=given.k[:, :, :1].expand_as(given.k)), "triton", dtype)
    hidden = signs.clone()
    hidden[:, 3, :32] = -math.inf  # all of the first tiles
    hidden[:, 5, 7:] = -math.inf
    upstream = torch.randn_like(given.q)
    near(outcome(given._replace(bias=hidden), upstream, "triton", 0.2),
         wanted(given._replace(bias=hidden), upstream, 0.2), dtype, EXTREME)  # fmt: skip
    sharp = given._replace(q=4 * given.q, k=4 * given.k)
    got, want = (outcome(sharp, upstream, "triton", 1.0)[0], wanted(sharp, upstream, 1.0)[0])
    assert (got.double() - want).abs().max() < 1e-4 * want.abs().max()


@DEVICES
def test_strides(device: str) -> None:
    """Any strides; the result as the next projection wants it."""
    given = make(Size(2, 3, 18, 8), torch.float32, device)
    upstream = torch.randn(2, 3, 18, 8, device=device)
    want = outcome(given, upstream, "triton", 0.4)
    for x in want[:1]:
        assert x.transpose(1, 2).is_contiguous()
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in given[:3]]
    wide = torch.zeros(3, 18, 50, device=device)
    wide[:, :, :18] = given.bias
    others = Given(turned[0], given.k.contiguous(), turned[2], wide[:, :, :18])
    for x, y in zip(outcome(others, upstream.transpose(-1, -2).contiguous().transpose(-1, -2), "triton", 0.4),
                    want, strict=True):  # fmt: skip
        assert torch.equal(x, y) or device == "cuda"
        torch.testing.assert_close(x, y)
    same = Given(given.q, given.k[:1].expand_as(given.k), given.v[:, :1].expand_as(given.v), given.bias)
    check(same, "triton", torch.float32)


@DEVICES
@pytest.mark.parametrize("bias", [None, 1.0], ids=["plain", "bias"])
def test_packed_is_the_same(device: str, bias: float | None) -> None:
    """The gradient is one tensor, with each part in its place."""
    size = Size(2, 2, 20, 8)
    given = make(size, torch.float32, device, bias)
    upstream = torch.randn(2, 2, 20, 8, device=device)
    out, dq, dk, dv, *dbias = outcome(given, upstream, "triton", 8**-0.5)
    qkv = torch.stack([x.transpose(1, 2) for x in given[:3]], 2).requires_grad_()
    bias_HNN = None if given.bias is None else given.bias.requires_grad_()
    packed = mvp_kernels.relpos_attention_qkv(qkv, bias_HNN, impl="triton")
    assert packed.is_contiguous()
    leaves = [qkv] if bias_HNN is None else [qkv, bias_HNN]
    grads = torch.autograd.grad(packed, leaves, upstream.transpose(1, 2))
    assert mvp_kernels.last_used("relpos_attention_qkv") == "triton"
    torch.testing.assert_close(packed.transpose(1, 2), out)
    torch.testing.assert_close(grads[0], torch.stack([x.transpose(1, 2) for x in (dq, dk, dv)], 2))
    for x, y in zip(grads[1:], dbias, strict=True):
        torch.testing.assert_close(x, y)


@DEVICES
@IMPLS
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int16])
def test_a_table(device: str, impl: str, index_dtype: torch.dtype) -> None:
    """timm's index of a grid: the bias, and the gradient of the table by way of attention."""
    index_NN = gen_relative_position_index((4, 5)).to(device, index_dtype)
    table_RH = torch.randn(7 * 9 + 3, 2, device=device, requires_grad=True)
    bias = mvp_kernels.relpos_bias(table_RH, index_NN, impl=impl)
    assert torch.equal(bias, table_RH[index_NN.long()].permute(2, 0, 1))
    given = make(Size(3, 2, 21, 8), torch.float32, device, None)
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = mvp_kernels.relpos_attention(*leaves, table_RH, index_NN, impl=impl)
    used = {"relpos_bias": impl, "relpos_attention": impl}
    assert mvp_kernels.record() == used
    upstream = torch.randn_like(out)
    got = [out.detach(), *torch.autograd.grad(out, [*leaves, table_RH], upstream)]
    wide = [x.detach().double().requires_grad_() for x in (*leaves, table_RH)]
    want = exact(Given(*wide[:3], wide[3][index_NN.long()].permute(2, 0, 1)), 8**-0.5)
    near(got, [want.detach(), *torch.autograd.grad(want, wide, upstream.double())], torch.float32)


@DEVICES
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("taken", [None, 7])
def test_slices_of_the_images(  # type: ignore[no-untyped-def]
    device: str, taken: int | None, slices: int, monkeypatch: pytest.MonkeyPatch, tile
) -> None:
    """Three images: programs that go over several, the last over fewer. The same bits in every run."""
    tile(16)
    monkeypatch.setattr(attention_launch, "SLICES", slices)
    given = make(Size(3, 1, 17, 8), torch.float32, device, 1.0, taken)
    check(given, "triton", torch.float32)
    upstream = torch.randn(given.q.shape, device=device)
    first, again = (outcome(given, upstream, "triton", 0.4) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_an_image_is_as_it_is_alone() -> None:
    given = make(Size(3, 2, 19, 8), torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    together = mvp_kernels.relpos_attention(*given[:4], impl="triton")
    alone = mvp_kernels.relpos_attention(*(x[1:2] for x in given[:3]), given.bias, impl="triton")  # type: ignore[index]
    assert torch.equal(together[1:2], alone)


def test_sorted_pairs_are_remembered_until_the_index_changes() -> None:
    index = torch.randint(0, 5, (6, 6))
    order, starts = sorted_pairs(index, 5)
    assert sorted_pairs(index, 5)[0] is order
    assert torch.equal(starts.diff(), index.flatten().bincount(minlength=5))
    assert torch.equal(index.flatten()[order.long()], index.flatten().sort().values)
    index[0, 0] = (index[0, 0] + 1) % 5
    order, _ = sorted_pairs(index, 5)
    assert torch.equal(index.flatten()[order.long()], index.flatten().sort().values)


@DEVICES
@IMPLS
def test_nothing_to_do(device: str, impl: str) -> None:
    """No image, or no query."""
    for images, queries in ((0, 4), (2, 0)):
        q = torch.randn(images, 2, queries, 8, device=device, requires_grad=True)
        k, v = (torch.randn(images, 2, 4, 8, device=device, requires_grad=True) for _ in range(2))
        bias = torch.randn(2, 4, 4, device=device, requires_grad=True)
        index = torch.zeros(images, queries, dtype=torch.int64, device=device)
        out = mvp_kernels.relpos_attention(q, k, v, bias, query_index_BM=index, impl=impl)
        assert out.shape == q.shape
        for x, grad in zip((q, k, v, bias), torch.autograd.grad(out.sum(), (q, k, v, bias)), strict=True):
            assert grad.shape == x.shape
            assert (grad == 0).all()


@pytest.mark.parametrize(
    ("tokens", "rows", "want"),
    [
        (197, 64, Cut(3, 16)),
        (197, 32, Cut(6, 16)),
        (257, 64, Cut(4, 16)),
        (577, 64, Cut(9, 16)),
        (1025, 64, Cut(16, 16)),
        (1, 64, Cut(0, 16)),
        (64, 64, Cut(1, 0)),
        (100, 64, Cut(1, 64)),
        (90, 64, Cut(1, 32)),
    ],
)
def test_tiles(tokens: int, rows: int, want: Cut) -> None:
    assert cut(tokens, rows) == want
    assert want.whole * rows + want.tail >= tokens
    assert default_launch("relpos_attention", 64, 2).rows == 64


def bad_calls() -> list[tuple[str, type[Exception], dict[str, object]]]:
    bias, index = torch.zeros(2, 4, 4), torch.zeros(4, 4, dtype=torch.int64)
    return [
        (r"want q \(B, H, M, D\)", ValueError, {"k": torch.zeros(1, 2, 4, 9)}),
        ("differ in type", TypeError, {"k": torch.zeros(1, 2, 4, 8, dtype=torch.float16)}),
        ("floating type", TypeError, {"q": torch.zeros(1, 2, 4, 8, dtype=torch.int64)}),
        ("no key at all", ValueError, {"k": torch.zeros(1, 2, 0, 8), "v": torch.zeros(1, 2, 0, 8)}),
        (r"want a bias \(2, 4, 4\)", ValueError, {"bias": torch.zeros(1, 4, 4)}),
        ("an index without a table", ValueError, {"index_NN": index}),
        (r"want a table \(R, 2\)", ValueError, {"bias": torch.zeros(3, 5), "index_NN": index}),
        ("want a table", ValueError, {"bias": bias, "index_NN": index}),
        ("int64, int32 or int16", TypeError, {"bias": torch.zeros(3, 2), "index_NN": index.float()}),
        ("3 queries for 4 keys", ValueError, {"q": torch.zeros(1, 2, 3, 8), "bias": bias}),
        ("want a token for each query", ValueError, {"query_index_BM": torch.zeros(1, 3, dtype=torch.int64)}),
        ("the range is -1", IndexError, {"query_index_BM": torch.full((1, 4), 4)}),
    ]


@IMPLS
@pytest.mark.parametrize(("message", "kind", "changed"), bad_calls(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit(impl: str, message: str, kind: type[Exception], changed: dict[str, object]) -> None:
    x = torch.zeros(1, 2, 4, 8)
    named = {"q": x, "k": x, "v": x, "bias": None, "index_NN": None, "query_index_BM": None} | changed
    q, k, v = (named.pop(name) for name in "qkv")
    with pytest.raises(kind, match=message):
        mvp_kernels.relpos_attention(q, k, v, **named, impl=impl)  # type: ignore[arg-type]
    assert mvp_kernels.record() == {}


def test_heads_too_wide_and_no_three() -> None:
    x = torch.zeros(1, 1, 2, 129)
    with pytest.raises(ValueError, match="1 to 128 channels here, not 129"):
        mvp_kernels.relpos_attention(x, x, x)
    with pytest.raises(ValueError, match=r"want qkv \(B, N, 3, H, D\)"):
        mvp_kernels.relpos_attention_qkv(torch.zeros(1, 2, 2, 1, 8))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
@DEVICES
@IMPLS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_image_and_head(device: str, impl: str, value: float, which: str) -> None:
    """A query spoils its own row; a key or a value spoils its head of its image, and nothing else."""
    given = make(Size(2, 2, 21, 16, 16), torch.float32, device)
    upstream = torch.randn(2, 2, 21, 16, device=device)
    clean = outcome(given, upstream, impl, 0.3)
    bad_BHND = getattr(given, which).clone()
    bad_BHND[1, 0, 3, 5] = value
    found = outcome(given._replace(**{which: bad_BHND}), upstream, impl, 0.3)
    for name, got, was in zip(("out", "q", "k", "v"), found, clean, strict=False):
        others = torch.ones(2, 2, 21, dtype=torch.bool, device=device)
        others[1, 0] = False
        torch.testing.assert_close(got[others], was[others], rtol=0, atol=0)
        if which == "q" and name in ("out", "q"):
            others[1, 0] = torch.arange(21, device=device) != 3
            torch.testing.assert_close(got[others], was[others], rtol=0, atol=0)
        if math.isnan(value) and which != "v":  # a key of infinity may be one that a query passes over
            assert got[1, 0, 3].isnan().all(), name
    if which == "v":  # in one channel alone
        assert found[0][1, 0, :, :5].isfinite().all()
        assert not found[0][1, 0, :, 5].isfinite().any()
