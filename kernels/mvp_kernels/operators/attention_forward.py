"""The forward kernel of attention with a relative position bias.

    s = q k^T scale + bias,  m = max over keys of s,  lse = m + log sum exp(s - m),  out = exp(s - lse) v

The softmax is exact, running over tiles of keys (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, 2205.14135):
the scores never exist in memory. A program has a tile of queries of one head of one image. Images are the fastest axis
of the grid: programs that run side by side then have another image each, and read the same tile of the bias.

Shape legend: B images, H heads, M queries, N keys; R queries of a tile, K keys of a tile, D channels of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mvp_kernels.operators.attention_tiles import dot, head_of, query_rows, read_tokens, scores, write_tokens


@triton.jit
def attend_keys(
    q_RD,
    k,
    v,
    bias,
    bias_row_R,
    kept_R,
    max_R,
    sum_R,
    out_RD,
    start,
    keys,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Take a tile of keys in: the running maximum, sum and output."""
    key_K = start + tl.arange(0, KEYS)
    k_KD = read_tokens(k, key_K, key_K < keys, TAIL, WIDTH, BLOCK)
    s_RK = scores(q_RD, k_KD, bias, bias_row_R, kept_R, key_K, keys, BIAS, SCALE, MASKED, TAIL, WIDE)
    new_max_R = tl.maximum(max_R, tl.max(s_RK, axis=1), propagate_nan=tl.PropagateNan.ALL)
    # A bias of -inf may hide all keys so far: -inf less -inf would be NaN.
    base_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R) if BIAS else new_max_R
    p_RK = tl.exp(s_RK - base_R[:, None])
    factor_R = tl.exp(max_R - base_R)
    v_KD = read_tokens(v, key_K, key_K < keys, TAIL, WIDTH, BLOCK)
    out_RD = dot(p_RK.to(v_KD.dtype), v_KD, out_RD * factor_R[:, None], WIDE)
    return new_max_R, sum_R * factor_R + tl.sum(p_RK, axis=1), out_RD


@triton.jit
def attend(
    q,
    k,
    v,
    bias,
    out,
    query_index_ptr,
    lse_ptr,
    start,
    queries,
    keys,
    ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of queries against all keys. PARTIAL: it reaches past the last query."""
    row_R = start + tl.arange(0, ROWS)
    inside_R = row_R < queries
    INDEXED: tl.constexpr = query_index_ptr is not None
    MASKED: tl.constexpr = PARTIAL or INDEXED
    bias_row_R, kept_R = query_rows(query_index_ptr, row_R, queries, keys)
    q_RD = read_tokens(q, row_R, kept_R, MASKED, WIDTH, BLOCK)
    max_R = tl.full([ROWS], float("-inf"), WIDE)
    sum_R = tl.zeros([ROWS], WIDE)
    out_RD = tl.zeros([ROWS, BLOCK], WIDE)
    for tile in range(KEY_TILES):
        max_R, sum_R, out_RD = attend_keys(
            q_RD, k, v, bias, bias_row_R, kept_R, max_R, sum_R, out_RD, tile * KEYS, keys,
            KEYS, BIAS, SCALE, MASKED, False, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    if KEY_TAIL > 0:
        max_R, sum_R, out_RD = attend_keys(
            q_RD, k, v, bias, bias_row_R, kept_R, max_R, sum_R, out_RD, KEY_TILES * KEYS, keys,
            KEY_TAIL, BIAS, SCALE, MASKED, True, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    out_RD = out_RD / sum_R[:, None]
    lse_R = max_R + tl.log(sum_R)
    if INDEXED:  # padding: zeros, and an infinite lse, by which the backward pass knows it; out of range: NaN
        wrong_R = (bias_row_R < -1) | (bias_row_R >= keys)
        out_RD = tl.where(kept_R[:, None], out_RD, tl.where(wrong_R, float("nan"), 0.0)[:, None])
        lse_R = tl.where(kept_R, lse_R, tl.where(wrong_R, float("nan"), float("inf")))
    write_tokens(out_RD, out, row_R, inside_R, PARTIAL, WIDTH, BLOCK)
    tl.store(lse_ptr + row_R, lse_R, mask=inside_R)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    query_index_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    heads,
    queries,
    keys,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out_BMHD and lse_BHM; image, tile of queries and head along the grid's axes."""
    image, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q, k = head_of(q_ptr, q_strides, image, head), head_of(k_ptr, k_strides, image, head)
    v, out = head_of(v_ptr, v_strides, image, head), head_of(out_ptr, out_strides, image, head)
    BIAS: tl.constexpr = bias_ptr is not None
    bias = (bias_ptr + head.to(tl.int64) * bias_strides[0], bias_strides[1]) if BIAS else k
    lse_ptr += (image.to(tl.int64) * heads + head) * queries
    if query_index_ptr is not None:
        query_index_ptr += image.to(tl.int64) * queries
    if tile < QUERY_TILES:
        attend(
            q, k, v, bias, out, query_index_ptr, lse_ptr, tile * ROWS, queries, keys,
            ROWS, False, KEYS, KEY_TILES, KEY_TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    elif QUERY_TAIL > 0:
        attend(
            q, k, v, bias, out, query_index_ptr, lse_ptr, QUERY_TILES * ROWS, queries, keys,
            QUERY_TAIL, True, KEYS, KEY_TILES, KEY_TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
