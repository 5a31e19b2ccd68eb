"""What the attention kernels share: tiles of tokens, of scores and of their gradient.

A head's tokens are a pair (pointer to the first, distance of two tokens), so that q, k and v are read where the
projection wrote them, and a bias likewise, (pointer to the first row, distance of two rows).

Numbers of tokens are cut into whole tiles and one shorter tile for the rest (`Cut`): 197 into 3 of 64 and 1 of 16, 208
in all, where tiles of one size would make 256. Whole tiles carry no masks.

Shape legend: R queries of a tile, K keys of a tile, D channels of a head (padded to a power of two in a tile).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mvp_kernels.launch import LEAST_TILE, block_of, interpreted

INTERPRETED = tl.constexpr(interpreted())  # as Triton itself takes it in: when a kernel is defined


class Cut(NamedTuple):
    """A number of tokens as whole tiles and the rows of one more, shorter tile: 0 where there is no rest."""

    whole: int
    tail: int

    @property
    def tiles(self) -> int:
        """All of them."""
        return self.whole + (self.tail > 0)


def cut(tokens: int, rows: int) -> Cut:
    """Cut `tokens` into tiles of `rows`, a power of two of 16 or more; the rest gets the least power of two."""
    whole, rest = divmod(tokens, rows)
    return Cut(whole, max(LEAST_TILE, block_of(rest)) if rest else 0)


@triton.jit
def dot(a, b, sum, WIDE: tl.constexpr):
    """sum + a b (or a b, where sum is None): float32 is not cut down to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # whose bits the interpreter would multiply
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def head_of(ptr, strides, image, head):
    """The tokens of a head of an image: (pointer, distance of two tokens)."""
    return ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1], strides[2]


@triton.jit
def tokens_at(tokens, row_R, BLOCK: tl.constexpr):
    """Where the channels of the tokens `row_R` are."""
    return tokens[0] + (row_R[:, None] * tokens[1] + tl.arange(0, BLOCK)[None, :])


@triton.jit
def read_tokens(tokens, row_R, kept_R, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of tokens, zeros in place of those that are not kept."""
    at_RD = tokens_at(tokens, row_R, BLOCK)
    column_D = tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(at_RD, mask=kept_R[:, None] & (column_D < WIDTH)[None, :], other=0.0)
    elif WIDTH != BLOCK:
        return tl.load(at_RD, mask=(column_D < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at_RD)


@triton.jit
def write_tokens(x_RD, tokens, row_R, kept_R, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of tokens, without those that are not kept."""
    at_RD = tokens_at(tokens, row_R, BLOCK)
    x_RD = x_RD.to(tokens[0].dtype.element_ty)
    column_D = tl.arange(0, BLOCK)
    if MASKED:
        tl.store(at_RD, x_RD, mask=kept_R[:, None] & (column_D < WIDTH)[None, :])
    elif WIDTH != BLOCK:
        tl.store(at_RD, x_RD, mask=(column_D < WIDTH)[None, :])
    else:
        tl.store(at_RD, x_RD)


@triton.jit
def read_numbers(ptr, row_R, kept_R, other: tl.constexpr, MASKED: tl.constexpr):
    """A number a query."""
    return tl.load(ptr + row_R, mask=kept_R, other=other) if MASKED else tl.load(ptr + row_R)


@triton.jit
def query_rows(query_index_ptr, row_R, queries, keys):
    """Of a tile of queries: the rows of the bias, and which are queries at all (no padding, none past the last)."""
    inside_R = row_R < queries
    if query_index_ptr is None:
        return row_R, inside_R
    else:
        bias_row_R = tl.load(query_index_ptr + row_R, mask=inside_R, other=-1).to(tl.int32)
        return bias_row_R, (bias_row_R >= 0) & (bias_row_R < keys)


@triton.jit
def scores(
    q_RD,
    k_KD,
    bias,
    bias_row_R,
    kept_R,
    key_K,
    keys,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """q k^T scale + bias; -inf past the last key.

    MASKED: some queries are not kept. TAIL: some keys are past the last.
    """
    s_RK = dot(q_RD, tl.trans(k_KD), None, WIDE) * SCALE
    if BIAS:
        at_RK = bias[0] + (bias_row_R[:, None] * bias[1] + key_K[None, :])
        if MASKED:
            s_RK += tl.load(at_RK, mask=kept_R[:, None] & (key_K < keys)[None, :], other=0.0).to(WIDE)
        elif TAIL:
            s_RK += tl.load(at_RK, mask=(key_K < keys)[None, :], other=0.0).to(WIDE)
        else:
            s_RK += tl.load(at_RK).to(WIDE)
    if TAIL:
        s_RK = tl.where((key_K < keys)[None, :], s_RK, float("-inf"))
    return s_RK


@triton.jit
def score_gradient(
    q_RD,
    grad_RD,
    lse_R,
    delta_R,
    k_KD,
    v_KD,
    bias,
    bias_row_R,
    kept_R,
    key_K,
    keys,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The scores' gradient, p (g v^T - delta), with the probabilities computed again: 0 past the last key.

    Where lse is infinite, the query is none, and p is 0.
    """
    s_RK = scores(q_RD, k_KD, bias, bias_row_R, kept_R, key_K, keys, BIAS, SCALE, MASKED, TAIL, WIDE)
    p_RK = tl.exp(s_RK - lse_R[:, None])
    dp_RK = dot(grad_RD, tl.trans(v_KD), None, WIDE)
    return p_RK * (dp_RK - delta_R[:, None])
