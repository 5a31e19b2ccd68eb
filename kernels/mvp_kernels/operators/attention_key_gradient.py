"""The backward kernel of attention with a relative position bias that goes by keys: dk and dv.

Formulas are in `mvp_kernels.operators.attention_query_gradient`, which runs before: it writes delta.

Shape legend: B images, H heads, M queries, N keys; R queries of a tile, K keys of a tile, D channels of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mvp_kernels.operators.attention_tiles import dot, head_of, query_rows, read_numbers, read_tokens, write_tokens


@triton.jit
def key_step(
    k_KD,
    v_KD,
    dk_KD,
    dv_KD,
    key_K,
    q,
    grad,
    bias,
    query_index_ptr,
    lse_ptr,
    delta_ptr,
    start,
    queries,
    keys,
    ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Take a tile of queries in: dk (without scale) and dv so far. Keys are the rows here, so that no p is turned."""
    row_R = start + tl.arange(0, ROWS)
    MASKED: tl.constexpr = PARTIAL or query_index_ptr is not None
    bias_row_R, kept_R = query_rows(query_index_ptr, row_R, queries, keys)
    q_RD = read_tokens(q, row_R, kept_R, MASKED, WIDTH, BLOCK)
    grad_RD = read_tokens(grad, row_R, kept_R, MASKED, WIDTH, BLOCK)
    lse_R = read_numbers(lse_ptr, row_R, kept_R, float("inf"), MASKED)
    delta_R = read_numbers(delta_ptr, row_R, kept_R, 0.0, MASKED)
    s_KR = dot(k_KD, tl.trans(q_RD), None, WIDE) * SCALE
    if BIAS:
        at_KR = bias[0] + (bias_row_R[None, :] * bias[1] + key_K[:, None])
        if MASKED or TAIL:
            s_KR += tl.load(at_KR, mask=kept_R[None, :] & (key_K < keys)[:, None], other=0.0).to(WIDE)
        else:
            s_KR += tl.load(at_KR).to(WIDE)
    p_KR = tl.exp(s_KR - lse_R[None, :])
    dv_KD = dot(p_KR.to(grad_RD.dtype), grad_RD, dv_KD, WIDE)
    dp_KR = dot(v_KD, tl.trans(grad_RD), None, WIDE)
    ds_KR = p_KR * (dp_KR - delta_R[None, :])
    dk_KD = dot(ds_KR.to(q_RD.dtype), q_RD, dk_KD, WIDE)
    return dk_KD, dv_KD


@triton.jit
def key_gradient(
    k,
    v,
    q,
    grad,
    dk,
    dv,
    bias,
    query_index_ptr,
    lse_ptr,
    delta_ptr,
    start,
    queries,
    keys,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of keys against all queries. Rows past the last key are computed and not written."""
    key_K = start + tl.arange(0, KEYS)
    inside_K = key_K < keys
    k_KD = read_tokens(k, key_K, inside_K, TAIL, WIDTH, BLOCK)
    v_KD = read_tokens(v, key_K, inside_K, TAIL, WIDTH, BLOCK)
    dk_KD, dv_KD = tl.zeros([KEYS, BLOCK], WIDE), tl.zeros([KEYS, BLOCK], WIDE)
    for tile in range(QUERY_TILES):
        dk_KD, dv_KD = key_step(
            k_KD, v_KD, dk_KD, dv_KD, key_K, q, grad, bias, query_index_ptr, lse_ptr, delta_ptr, tile * ROWS,
            queries, keys, ROWS, False, TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    if QUERY_TAIL > 0:
        dk_KD, dv_KD = key_step(
            k_KD, v_KD, dk_KD, dv_KD, key_K, q, grad, bias, query_index_ptr, lse_ptr, delta_ptr, QUERY_TILES * ROWS,
            queries, keys, QUERY_TAIL, True, TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    write_tokens(dk_KD * SCALE, dk, key_K, inside_K, TAIL, WIDTH, BLOCK)
    write_tokens(dv_KD, dv, key_K, inside_K, TAIL, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["queries", "keys"])
def key_gradient_kernel(
    pointers,
    strides,
    bias_ptr,
    bias_strides,
    query_index_ptr,
    lse_ptr,
    delta_ptr,
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
    """dk and dv; image, tile of keys and head along the grid's axes."""
    image, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, v = head_of(pointers[0], strides[0], image, head), head_of(pointers[1], strides[1], image, head)
    q, grad = head_of(pointers[2], strides[2], image, head), head_of(pointers[3], strides[3], image, head)
    dk, dv = head_of(pointers[4], strides[4], image, head), head_of(pointers[5], strides[5], image, head)
    BIAS: tl.constexpr = bias_ptr is not None
    bias = (bias_ptr + head.to(tl.int64) * bias_strides[0], bias_strides[1]) if BIAS else k
    first = (image.to(tl.int64) * heads + head) * queries
    lse_ptr += first
    delta_ptr += first
    if query_index_ptr is not None:
        query_index_ptr += image.to(tl.int64) * queries
    if tile < KEY_TILES:
        key_gradient(
            k, v, q, grad, dk, dv, bias, query_index_ptr, lse_ptr, delta_ptr, tile * KEYS, queries, keys,
            KEYS, False, ROWS, QUERY_TILES, QUERY_TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    elif KEY_TAIL > 0:
        key_gradient(
            k, v, q, grad, dk, dv, bias, query_index_ptr, lse_ptr, delta_ptr, KEY_TILES * KEYS, queries, keys,
            KEY_TAIL, True, ROWS, QUERY_TILES, QUERY_TAIL, BIAS, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
