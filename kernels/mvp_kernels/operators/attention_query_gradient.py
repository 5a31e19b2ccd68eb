"""The backward kernels of attention with a relative position bias that go by queries: dq, and the bias's gradient.

With p = exp(s - lse) computed again from q, k and the bias, g the gradient of the output, and delta = sum over channels
of out g (Dao et al., FlashAttention, arXiv 2205.14135):

    ds = p (g v^T - delta)    dq = scale ds k    dk = scale ds^T q    dv = p^T g    dbias = sum over images of ds

query_gradient_kernel   dq and delta: a tile of queries of one image
bias_gradient_kernel    the sum of ds over a slice of the images, of a tile of the bias that stays in registers

There are no atomics: a program leaves the sum over its own images, S slices in all, which `slice_sum_kernel` of
`mvp_kernels.operators.relpos_bias` adds up in a fixed order. dk and dv are in `attention_key_gradient`.

Shape legend: B images, H heads, M queries, N keys, S slices of the images; R queries of a tile, K keys of a tile,
D channels of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mvp_kernels.operators.attention_tiles import (
    dot,
    head_of,
    query_rows,
    read_numbers,
    read_tokens,
    score_gradient,
    write_tokens,
)


@triton.jit
def query_step(
    q_RD,
    grad_RD,
    lse_R,
    delta_R,
    dq_RD,
    k,
    v,
    bias,
    bias_row_R,
    kept_R,
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
    """Take a tile of keys in: dq (without scale) so far."""
    key_K = start + tl.arange(0, KEYS)
    k_KD = read_tokens(k, key_K, key_K < keys, TAIL, WIDTH, BLOCK)
    v_KD = read_tokens(v, key_K, key_K < keys, TAIL, WIDTH, BLOCK)
    ds_RK = score_gradient(
        q_RD, grad_RD, lse_R, delta_R, k_KD, v_KD, bias, bias_row_R, kept_R, key_K, keys,
        BIAS, SCALE, MASKED, TAIL, WIDE,
    )  # fmt: skip
    return dot(ds_RK.to(k_KD.dtype), k_KD, dq_RD, WIDE)


@triton.jit
def query_gradient(
    pointers,
    strides,
    bias,
    start,
    heads,
    queries,
    keys,
    ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of queries against all keys. PARTIAL: it reaches past the last query."""
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, query_index_ptr, lse_ptr, delta_ptr, dq_ptr = pointers
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides = strides
    image, head = tl.program_id(0), tl.program_id(2)
    row_R = start + tl.arange(0, ROWS)
    inside_R = row_R < queries
    MASKED: tl.constexpr = PARTIAL or INDEXED
    bias_row_R, kept_R = row_R, inside_R
    if INDEXED:
        bias_row_R, kept_R = query_rows(query_index_ptr + image.to(tl.int64) * queries, row_R, queries, keys)
    first = (image.to(tl.int64) * heads + head) * queries
    k, v = head_of(k_ptr, k_strides, image, head), head_of(v_ptr, v_strides, image, head)
    q_RD = read_tokens(head_of(q_ptr, q_strides, image, head), row_R, kept_R, MASKED, WIDTH, BLOCK)
    grad_RD = read_tokens(head_of(grad_ptr, grad_strides, image, head), row_R, kept_R, MASKED, WIDTH, BLOCK)
    out_RD = read_tokens(head_of(out_ptr, out_strides, image, head), row_R, kept_R, MASKED, WIDTH, BLOCK)
    lse_R = read_numbers(lse_ptr + first, row_R, kept_R, float("inf"), MASKED)
    delta_R = tl.sum(out_RD.to(WIDE) * grad_RD.to(WIDE), axis=1)
    tl.store(delta_ptr + first + row_R, delta_R, mask=inside_R)
    dq_RD = tl.zeros([ROWS, BLOCK], WIDE)
    for tile in range(KEY_TILES):
        dq_RD = query_step(
            q_RD, grad_RD, lse_R, delta_R, dq_RD, k, v, bias, bias_row_R, kept_R, tile * KEYS, keys,
            KEYS, BIAS, SCALE, MASKED, False, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    if KEY_TAIL > 0:
        dq_RD = query_step(
            q_RD, grad_RD, lse_R, delta_R, dq_RD, k, v, bias, bias_row_R, kept_R, KEY_TILES * KEYS, keys,
            KEY_TAIL, BIAS, SCALE, MASKED, True, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    dq = head_of(dq_ptr, dq_strides, image, head)
    write_tokens(dq_RD * SCALE, dq, row_R, inside_R, PARTIAL, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["queries", "keys"])
def query_gradient_kernel(
    pointers,
    strides,
    bias_ptr,
    bias_strides,
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
    INDEXED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dq and delta; image, tile of queries and head along the grid's axes."""
    tile, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    BIAS: tl.constexpr = bias_ptr is not None
    bias = (bias_ptr + head * bias_strides[0], bias_strides[1]) if BIAS else (pointers[0], 0)
    if tile < QUERY_TILES:
        query_gradient(
            pointers, strides, bias, tile * ROWS, heads, queries, keys,
            ROWS, False, KEYS, KEY_TILES, KEY_TAIL, BIAS, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip
    elif QUERY_TAIL > 0:
        query_gradient(
            pointers, strides, bias, QUERY_TILES * ROWS, heads, queries, keys,
            QUERY_TAIL, True, KEYS, KEY_TILES, KEY_TAIL, BIAS, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
        )  # fmt: skip


@triton.jit
def bias_gradient(
    pointers,
    strides,
    bias,
    partial_ptr,
    row_start,
    key_start,
    images,
    heads,
    queries,
    keys,
    ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    IMAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    INDEXED: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of the bias, in IMAGES images one after the other. Its rows are tokens; `inverse` tells their queries."""
    q_ptr, k_ptr, v_ptr, grad_ptr, inverse_ptr, lse_ptr, delta_ptr = pointers
    q_strides, k_strides, v_strides, grad_strides = strides
    head = tl.program_id(2) % heads
    token_R, key_K = row_start + tl.arange(0, ROWS), key_start + tl.arange(0, KEYS)
    MASKED: tl.constexpr = PARTIAL or INDEXED or RAGGED
    sum_RK = tl.zeros([ROWS, KEYS], WIDE)
    for step in range(IMAGES):
        image = tl.program_id(2) // heads * IMAGES + step
        kept_R = token_R < keys
        if RAGGED:
            kept_R = kept_R & (image < images)
            image = tl.minimum(image, images - 1)
        row_R = token_R
        if INDEXED:
            row_R = tl.load(inverse_ptr + image.to(tl.int64) * keys + token_R, mask=kept_R, other=-1).to(tl.int32)
            kept_R = row_R >= 0
        first = (image.to(tl.int64) * heads + head) * queries
        q_RD = read_tokens(head_of(q_ptr, q_strides, image, head), row_R, kept_R, MASKED, WIDTH, BLOCK)
        grad_RD = read_tokens(head_of(grad_ptr, grad_strides, image, head), row_R, kept_R, MASKED, WIDTH, BLOCK)
        lse_R = read_numbers(lse_ptr + first, row_R, kept_R, float("inf"), MASKED)
        delta_R = read_numbers(delta_ptr + first, row_R, kept_R, 0.0, MASKED)
        k_KD = read_tokens(head_of(k_ptr, k_strides, image, head), key_K, key_K < keys, TAIL, WIDTH, BLOCK)
        v_KD = read_tokens(head_of(v_ptr, v_strides, image, head), key_K, key_K < keys, TAIL, WIDTH, BLOCK)
        sum_RK += score_gradient(
            q_RD, grad_RD, lse_R, delta_R, k_KD, v_KD, bias, token_R, kept_R, key_K, keys,
            True, SCALE, MASKED, TAIL, WIDE,
        )  # fmt: skip
    at_RK = partial_ptr + (token_R[:, None] * keys + key_K[None, :])
    tl.store(at_RK, sum_RK, mask=(token_R < keys)[:, None] & (key_K < keys)[None, :])


@triton.jit(do_not_specialize=["images", "queries", "keys"])
def bias_gradient_kernel(
    pointers,
    strides,
    bias_ptr,
    bias_strides,
    partial_ptr,
    images,
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
    IMAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    INDEXED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """partial_SHNN; tile of keys, tile of rows, and slice of images with head along the grid's axes."""
    column, tile, head = tl.program_id(0), tl.program_id(1), (tl.program_id(2) % heads).to(tl.int64)
    bias = (bias_ptr + head * bias_strides[0], bias_strides[1])
    partial_ptr += tl.program_id(2).to(tl.int64) * keys * keys
    if tile < QUERY_TILES:
        if column < KEY_TILES:
            bias_gradient(
                pointers, strides, bias, partial_ptr, tile * ROWS, column * KEYS, images, heads, queries, keys,
                ROWS, False, KEYS, False, IMAGES, RAGGED, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
            )  # fmt: skip
        elif KEY_TAIL > 0:
            bias_gradient(
                pointers, strides, bias, partial_ptr, tile * ROWS, column * KEYS, images, heads, queries, keys,
                ROWS, False, KEY_TAIL, True, IMAGES, RAGGED, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
            )  # fmt: skip
    elif QUERY_TAIL > 0:
        if column < KEY_TILES:
            bias_gradient(
                pointers, strides, bias, partial_ptr, tile * ROWS, column * KEYS, images, heads, queries, keys,
                QUERY_TAIL, True, KEYS, False, IMAGES, RAGGED, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
            )  # fmt: skip
        elif KEY_TAIL > 0:
            bias_gradient(
                pointers, strides, bias, partial_ptr, tile * ROWS, column * KEYS, images, heads, queries, keys,
                QUERY_TAIL, True, KEY_TAIL, True, IMAGES, RAGGED, INDEXED, SCALE, WIDTH, BLOCK, WIDE,
            )  # fmt: skip
