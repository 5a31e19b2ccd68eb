"""Launches the attention kernels: how tokens are cut into tiles, and images into slices.

The kernels are in `attention_forward`, `attention_query_gradient` and `attention_key_gradient`.

Shape legend: B images, H heads, M queries, N keys, D channels of a head, S slices of the images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvp_kernels.launch import LEAST_TILE, block_of, launch_of, programs_of
from mvp_kernels.operators.attention_forward import attention_kernel
from mvp_kernels.operators.attention_key_gradient import key_gradient_kernel
from mvp_kernels.operators.attention_query_gradient import bias_gradient_kernel, query_gradient_kernel
from mvp_kernels.operators.attention_tiles import Cut, cut
from mvp_kernels.operators.relpos_bias import sum_of_slices
from mvp_kernels.operators.rows import TRITON_TYPES, side_by_side, wide_of

SLICES = 16  # of the images, at most: programs enough for a large GPU, with partial sums of 30 MB for 12 heads of 197
FORWARD, DQ, DBIAS, DKV = (f"relpos_attention{part}" for part in ("", "_query", "_bias", "_key"))


class Heads(NamedTuple):
    """q, k and v, (B, H, tokens, D), and what else decides the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    query_index: Tensor | None
    scale: float

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.q.numel() == 0

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        width = self.q.shape[-1]
        return {
            "SCALE": self.scale,
            "WIDTH": width,
            "BLOCK": max(LEAST_TILE, block_of(width)),
            "WIDE": TRITON_TYPES[wide_of(self.q)],
        }

    def tiles(self, op: str) -> tuple[Cut, Cut, dict[str, int]]:
        """How queries and keys are cut for a kernel, and its launch parameters, all as the kernel wants them."""
        launch = launch_of(op, self.q.shape[-1], self.q.dtype, self.q.device)
        rows = keys = max(LEAST_TILE, launch.rows)
        if op == DBIAS:  # whose rows are the bias's
            by_query = by_key = cut(self.k.shape[2], rows)
        else:
            by_query, by_key = cut(self.q.shape[2], rows), cut(self.k.shape[2], keys)
        named = {"ROWS": rows, "QUERY_TILES": by_query.whole, "QUERY_TAIL": by_query.tail}
        named |= {"KEYS": keys, "KEY_TILES": by_key.whole, "KEY_TAIL": by_key.tail}
        named |= {"num_warps": launch.warps, "num_stages": 2}
        return by_query, by_key, named


def attend(heads: Heads, out: Tensor, lse: Tensor) -> None:
    """Writes out (B, H, M, D) and lse (B, H, M)."""
    if heads.empty:
        return
    by_query, _, tiles = heads.tiles(FORWARD)
    images, count, queries, _ = heads.q.shape
    attention_kernel[(images, by_query.tiles, count)](
        heads.q,
        heads.k,
        heads.v,
        heads.bias,
        heads.query_index,
        out,
        lse,
        *(_strides(x) for x in (heads.q, heads.k, heads.v)),
        _bias_strides(heads.bias),
        _strides(out),
        count,
        queries,
        heads.k.shape[2],
        **tiles,
        **heads.constants(),
    )


def attend_backward(
    heads: Heads, grad: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, want_bias: bool
) -> Tensor:
    """Writes dq, dk and dv; returns dbias (H, N, N), or nothing where it is not wanted."""
    if heads.empty:
        dk.zero_(), dv.zero_()
        return empty_bias_gradient(heads.q, heads.bias, want_bias).zero_()
    delta = torch.empty_like(lse)
    _query_gradient(heads, grad, out, lse, delta, dq)
    _key_gradient(heads, grad, lse, delta, dk, dv)
    if not want_bias:
        return empty_bias_gradient(heads.q, heads.bias, False)
    assert heads.bias is not None
    return sum_of_slices(_bias_gradient(heads, grad, lse, delta), heads.bias.dtype)


def _query_gradient(heads: Heads, grad: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    """Writes delta and dq."""
    images, count, queries, _ = heads.q.shape
    by_query, _, tiles = heads.tiles(DQ)
    query_gradient_kernel[(images, by_query.tiles, count)](
        (heads.q, heads.k, heads.v, out, grad, heads.query_index, lse, delta, dq),
        tuple(_strides(x) for x in (heads.q, heads.k, heads.v, out, grad, dq)),
        heads.bias,
        _bias_strides(heads.bias),
        count,
        queries,
        heads.k.shape[2],
        INDEXED=heads.query_index is not None,
        **tiles,
        **heads.constants(),
    )


def _bias_gradient(heads: Heads, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The bias's partial sums by themselves."""
    images, count, queries, _ = heads.q.shape
    keys = heads.k.shape[2]
    by_row, by_key, tiles = heads.tiles(DBIAS)
    each = _images_a_program(images)
    slices = programs_of(images, each)
    partial = _partial(slices, heads)
    inverse = None if heads.query_index is None else _inverse(heads.query_index, keys)
    bias_gradient_kernel[(by_key.tiles, by_row.tiles, slices * count)](
        (heads.q, heads.k, heads.v, grad, inverse, lse, delta),
        tuple(_strides(x) for x in (heads.q, heads.k, heads.v, grad)),
        heads.bias,
        _bias_strides(heads.bias),
        partial,
        images,
        count,
        queries,
        keys,
        IMAGES=each,
        RAGGED=images % each != 0,
        INDEXED=inverse is not None,
        **tiles,
        **heads.constants(),
    )
    return partial


def _key_gradient(heads: Heads, grad: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dk and dv."""
    images, count, queries, _ = heads.q.shape
    _, by_key, tiles = heads.tiles(DKV)
    tensors = (heads.k, heads.v, heads.q, grad, dk, dv)
    key_gradient_kernel[(images, by_key.tiles, count)](
        tensors,
        tuple(_strides(x) for x in tensors),
        heads.bias,
        _bias_strides(heads.bias),
        heads.query_index,
        lse,
        delta,
        count,
        queries,
        heads.k.shape[2],
        **tiles,
        **heads.constants(),
    )


def _images_a_program(images: int) -> int:
    """A power of two, so that few batch sizes have kernels of their own."""
    return block_of(programs_of(images, SLICES))


def _partial(slices: int, heads: Heads) -> Tensor:
    keys = heads.k.shape[2]
    return torch.empty((slices, heads.q.shape[1], keys, keys), dtype=wide_of(heads.q), device=heads.q.device)


def _inverse(query_index_BM: Tensor, keys: int) -> Tensor:
    """(B, N): which query each token is, -1 where it is none."""
    images, queries = query_index_BM.shape
    inside_BM = (query_index_BM >= 0) & (query_index_BM < keys)
    place_BM = query_index_BM.where(inside_BM, keys)  # what is none goes to a place behind all
    number_BM = torch.arange(queries, device=place_BM.device).expand_as(place_BM)
    inverse = place_BM.new_full((images, keys + 1), -1)
    return inverse.scatter_(1, place_BM, number_BM)[:, :keys].contiguous()


def _strides(x_BHND: Tensor) -> tuple[int, int, int]:
    return x_BHND.stride()[:3]  # type: ignore[return-value]


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.stride(0), bias.stride(1))


def within_reach(x: Tensor) -> Tensor:
    """A tensor with the values of its last dimension side by side, and rows that an offset of 32 bits reaches."""
    x = side_by_side(x)
    return x if x.shape[-2] * x.stride(-2) < 1 << 31 else x.contiguous()


def heads_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_index: Tensor | None, scale: float) -> Heads:
    if bias is not None:
        bias = within_reach(bias)
    if query_index is not None:
        query_index = query_index.contiguous()
    return Heads(within_reach(q), within_reach(k), within_reach(v), bias, query_index, scale)


def like_projection(q: Tensor) -> Tensor:
    """(B, H, M, D) with the heads of a token side by side, as the layer that comes next wants them."""
    images, count, tokens, width = q.shape
    return q.new_empty(images, tokens, count, width).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=wide_of(q))


def empty_bias_gradient(q: Tensor, bias: Tensor | None, want_bias: bool) -> Tensor:
    return bias.new_empty(bias.shape) if want_bias and bias is not None else q.new_empty(0)
