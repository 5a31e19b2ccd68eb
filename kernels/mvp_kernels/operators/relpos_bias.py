"""relpos_bias in Triton: a table of biases by relative position, spread out to all pairs of tokens, and back.

    bias[h, n, m] = table[index[n, m], h]
    dtable[r, h]  = sum of dbias[h, n, m] over the pairs with index[n, m] = r

Rows of the bias start at multiples of 16 values, so that attention reads them in vectors. The sums are deterministic:
pairs are sorted by their row of the table once for an index (a stable sort, remembered as long as the index lives and
stays as it is), and each row's pairs are added up by one program in that order.

Shape legend: N tokens, H heads, R rows of the table, S slices of the images, P pairs of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvp_kernels.launch import block_of, interpreted, programs_of
from mvp_kernels.operator import Operator
from mvp_kernels.operators.rows import TRITON_TYPES, wide_of

ALIGNED = 16  # values that a row of the bias is a multiple of
PAIRS = 1024  # of a program that goes over the bias once
ROWS, STEP = 4, 32  # rows of the table of a program, and pairs of each at a time


@triton.jit
def spread_kernel(
    table_ptr, index_ptr, bias_ptr, tokens, pitch, table_rows, table_stride_r, table_stride_h, BLOCK: tl.constexpr
):
    """bias_HNN with rows `pitch` apart, what is between them left alone; stretch and head along the grid's axes."""
    place_P = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_P, column_P = place_P // pitch, place_P % pitch
    inside_P = (row_P < tokens) & (column_P < tokens)
    index_P = tl.load(index_ptr + row_P * tokens + column_P, mask=inside_P, other=-1).to(tl.int64)
    found_P = (index_P >= 0) & (index_P < table_rows)
    at_P = table_ptr + index_P * table_stride_r + tl.program_id(1) * table_stride_h
    bias_P = tl.load(at_P, mask=found_P, other=0.0)
    # A row that the table has not is NaN, as in masked_gather.
    nan_P = tl.full([BLOCK], float("nan"), tl.float32).to(bias_P.dtype)
    bias_P = tl.where(inside_P & (found_P == 0), nan_P, bias_P)
    tl.store(bias_ptr + tl.program_id(1).to(tl.int64) * tokens * pitch + place_P, bias_P, mask=inside_P)


@triton.jit
def table_gradient_kernel(
    grad_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    pairs,
    table_rows,
    heads,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dtable_RH from contiguous dbias_HNN; rows of the table and head along the grid's axes."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin_R = tl.load(starts_ptr + row_R, mask=row_R < table_rows, other=0)
    count_R = tl.load(starts_ptr + row_R + 1, mask=row_R < table_rows, other=0) - begin_R
    most = tl.max(count_R, axis=0)
    grad_ptr += tl.program_id(1).to(tl.int64) * pairs
    sum_RP = tl.zeros([ROWS, STEP], WIDE)
    done = most - most
    while done < most:
        step_P = done + tl.arange(0, STEP)
        wanted_RP = step_P[None, :] < count_R[:, None]
        pair_RP = tl.load(order_ptr + begin_R[:, None] + step_P[None, :], mask=wanted_RP, other=0)
        sum_RP += tl.load(grad_ptr + pair_RP, mask=wanted_RP, other=0.0).to(WIDE)
        done += STEP
    tl.store(out_ptr + row_R * heads + tl.program_id(1), tl.sum(sum_RP, axis=1), mask=row_R < table_rows)


@triton.jit(do_not_specialize=["values"])
def slice_sum_kernel(partial_ptr, out_ptr, values, SLICES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The sum of S slices of `values` each, from the first to the last."""
    place_P = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_P = tl.zeros([BLOCK], WIDE)
    for part in range(SLICES):
        sum_P += tl.load(partial_ptr + part * values + place_P, mask=place_P < values, other=0.0)
    tl.store(out_ptr + place_P, sum_P, mask=place_P < values)


def sum_of_slices(partial_SHNN: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias_HNN."""
    out_HNN = torch.empty(partial_SHNN.shape[1:], dtype=dtype, device=partial_SHNN.device)
    block = 1 << 16 if interpreted() else PAIRS
    slice_sum_kernel[(programs_of(out_HNN.numel(), block),)](
        partial_SHNN,
        out_HNN,
        out_HNN.numel(),
        SLICES=partial_SHNN.shape[0],
        BLOCK=block,
        WIDE=TRITON_TYPES[partial_SHNN.dtype],
    )
    return out_HNN


def _forward(table: Tensor, index: Tensor) -> Tensor:
    bias = _fake(table, index)
    tokens, heads = index.shape[0], table.shape[1]
    if bias.numel() == 0:
        return bias
    block, pitch = 1 << 16 if interpreted() else PAIRS, bias.stride(1)
    spread_kernel[(programs_of(tokens * pitch, block), heads)](
        table, index.contiguous(), bias, tokens, pitch, table.shape[0], table.stride(0), table.stride(1), BLOCK=block
    )
    return bias


def _fake(table: Tensor, index: Tensor) -> Tensor:
    tokens, heads = index.shape[0], table.shape[1]
    pitch = (tokens + ALIGNED - 1) // ALIGNED * ALIGNED
    return table.new_empty_strided((heads, tokens, tokens), (tokens * pitch, pitch, 1))


def sorted_pairs(index: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Pairs (n N + m) by their row of the table, and R + 1 places where each row's begin; int32.

    Remembered for an index that lives on, save while a CUDA graph is captured: what is computed then exists in replays.
    """
    version = -1 if index.is_inference() else index._version
    known = getattr(index, "_mvp_kernels_sorted", None)
    if known is not None and known[:2] == (version, table_rows) and known[2].device == index.device:
        return known[2], known[3]
    flat = index.reshape(-1)
    values, order = torch.sort(flat, stable=True)
    rows = torch.arange(table_rows + 1, device=index.device, dtype=index.dtype)
    starts = torch.searchsorted(values, rows, out_int32=True)
    order = order.to(torch.int32)
    capturing = index.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if version >= 0 and not capturing:
        index._mvp_kernels_sorted = (version, table_rows, order, starts)  # type: ignore[attr-defined]
    return order, starts


def _gradient(grad: Tensor, index: Tensor, table_rows: int) -> Tensor:
    heads, tokens = grad.shape[:2]
    out = torch.empty((table_rows, heads), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    order, starts = sorted_pairs(index, table_rows)
    rows = block_of(table_rows) if interpreted() else ROWS
    table_gradient_kernel[(programs_of(table_rows, rows), heads)](
        grad.contiguous(),
        order,
        starts,
        out,
        tokens * tokens,
        table_rows,
        heads,
        ROWS=rows,
        STEP=STEP,
        WIDE=TRITON_TYPES[wide_of(grad)],
    )
    return out


def _fake_gradient(grad: Tensor, index: Tensor, table_rows: int) -> Tensor:
    return grad.new_empty(table_rows, grad.shape[0])


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    table, index = inputs
    ctx.table_rows = table.shape[0]
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return relpos_bias_backward_op(grad, *ctx.saved_tensors, ctx.table_rows), None


relpos_bias_op = Operator("relpos_bias", "(Tensor table, Tensor index) -> Tensor", _forward, _fake, _setup, _backward)
relpos_bias_backward_op = Operator(
    "relpos_bias_backward", "(Tensor grad, Tensor index, SymInt table_rows) -> Tensor", _gradient, _fake_gradient
)


def relpos_bias(table_RH: Tensor, index_NN: Tensor) -> Tensor:
    """See `mvp_kernels.relpos_bias`."""
    out: Tensor = relpos_bias_op(table_RH, index_NN)
    return out
