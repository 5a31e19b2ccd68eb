"""masked_gather in Triton: the tokens in the loss out of a batch, and their gradient back into it.

    out[b, m] = x[b, index[b, m]]                     0 where the index is -1
    dx[b, n]  = g[b, m] where index[b, m] = n         0 where no m has it

Forward copies M rows an image. Backward goes over the N rows of the result: each finds its m in the index and copies
g's row or writes zeros, so that the dense gradient is written once, in one pass, without atomics and without clearing
it before. A token must be taken at most once a row of the index. An index out of range gives a row of NaN.

Shape legend: B images, N tokens, M tokens taken, R rows of a program's tile, D channels, K a stretch of the index.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvp_kernels.launch import block_of, launch_of, programs_of
from mvp_kernels.operator import Operator
from mvp_kernels.operators.rows import side_by_side


@triton.jit
def gather_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    rows,
    taken,
    tokens,
    width,
    x_stride_b,
    x_stride_n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_BMD, flattened to (B * M, D)."""
    number_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # divided as int32: in int64 that is a subroutine
    row_R = number_R.to(tl.int64)
    column_D = tl.arange(0, BLOCK)
    index_R = tl.load(index_ptr + row_R, mask=row_R < rows, other=-1)
    found_R = (index_R >= 0) & (index_R < tokens)
    inside_RD = (row_R < rows)[:, None] & (column_D < width)[None, :]
    source_R = (number_R // taken).to(tl.int64) * x_stride_b + index_R * x_stride_n
    x_RD = tl.load(x_ptr + source_R[:, None] + column_D[None, :], mask=found_R[:, None] & inside_RD, other=0.0)
    out_RD = out_ptr + row_R[:, None] * width + column_D[None, :]
    # Two stores of rows apart: a choice for each value would be most of what a copy computes.
    wrong_R1 = ((index_R < -1) | (index_R >= tokens))[:, None]
    tl.store(out_RD, x_RD, mask=inside_RD & ~wrong_R1)
    nan_RD = tl.full([ROWS, BLOCK], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_RD, nan_RD, mask=inside_RD & wrong_R1)


@triton.jit
def scatter_kernel(
    grad_ptr,
    index_ptr,
    out_ptr,
    taken,
    tokens,
    width,
    grad_stride_b,
    grad_stride_m,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """dx_BND, one image along the grid's first axis and a tile of its tokens along the second."""
    image = tl.program_id(0).to(tl.int64)
    token_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK)
    place_R = tl.full([ROWS], -1, tl.int32)  # which m took this token
    for stretch in range(STRETCHES):
        m_K = stretch * STRETCH + tl.arange(0, STRETCH)
        index_K = tl.load(index_ptr + image * taken + m_K, mask=m_K < taken, other=-1)
        known_K = (index_K >= 0) & (index_K < tokens)  # what is out of range must not wrap around to a token
        index_K = tl.where(known_K, index_K, -1).to(tl.int32)
        taken_RK = index_K[None, :] == token_R[:, None]
        place_R = tl.maximum(place_R, tl.max(tl.where(taken_RK, m_K[None, :], -1), axis=1))
    inside_RD = (token_R < tokens)[:, None] & (column_D < width)[None, :]
    source_R = image * grad_stride_b + place_R.to(tl.int64) * grad_stride_m
    g_RD = tl.load(
        grad_ptr + source_R[:, None] + column_D[None, :], mask=(place_R >= 0)[:, None] & inside_RD, other=0.0
    )
    out_R = (image * tokens + token_R) * width
    tl.store(out_ptr + out_R[:, None] + column_D[None, :], g_RD, mask=inside_RD)


def _forward(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    (images, tokens, width), taken = x_BND.shape, index_BM.shape[1]
    out_BMD = torch.empty((images, taken, width), dtype=x_BND.dtype, device=x_BND.device)
    if out_BMD.numel() == 0:
        return out_BMD
    x_BND = side_by_side(x_BND)
    rows, warps = launch_of("masked_gather", width, x_BND.dtype, x_BND.device)
    gather_kernel[(programs_of(images * taken, rows),)](
        x_BND,
        index_BM.contiguous(),
        out_BMD,
        images * taken,
        taken,
        tokens,
        width,
        x_BND.stride(0),
        x_BND.stride(1),
        ROWS=rows,
        BLOCK=block_of(width),
        num_warps=warps,
    )
    return out_BMD


def _scatter(grad_BMD: Tensor, index_BM: Tensor, tokens: int) -> Tensor:
    images, taken, width = grad_BMD.shape
    out_BND = torch.empty((images, tokens, width), dtype=grad_BMD.dtype, device=grad_BMD.device)
    if out_BND.numel() == 0:
        return out_BND
    grad_BMD = side_by_side(grad_BMD)
    rows, warps = launch_of("masked_gather_backward", width, grad_BMD.dtype, grad_BMD.device)
    rows = min(rows, block_of(tokens))
    stretch = min(128, block_of(max(taken, 1)))
    scatter_kernel[(images, programs_of(tokens, rows))](
        grad_BMD,
        index_BM.contiguous(),
        out_BND,
        taken,
        tokens,
        width,
        grad_BMD.stride(0),
        grad_BMD.stride(1),
        ROWS=rows,
        BLOCK=block_of(width),
        STRETCH=stretch,
        STRETCHES=programs_of(taken, stretch),
        num_warps=warps,
    )
    return out_BND


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x_BND, index_BM = inputs
    ctx.tokens = x_BND.shape[1]
    ctx.save_for_backward(index_BM)


def _backward(ctx: Any, grad_BMD: Tensor) -> tuple[Tensor, None]:
    return masked_scatter_op(grad_BMD, *ctx.saved_tensors, ctx.tokens), None


def _fake(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    return x_BND.new_empty(x_BND.shape[0], index_BM.shape[1], x_BND.shape[2])


def _fake_scatter(grad_BMD: Tensor, index_BM: Tensor, tokens: int) -> Tensor:
    return grad_BMD.new_empty(grad_BMD.shape[0], tokens, grad_BMD.shape[2])


masked_gather_op = Operator("masked_gather", "(Tensor x, Tensor index) -> Tensor", _forward, _fake, _setup, _backward)
masked_scatter_op = Operator(
    "masked_gather_backward", "(Tensor grad, Tensor index, SymInt tokens) -> Tensor", _scatter, _fake_scatter
)


def masked_gather(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """See `mvp_kernels.masked_gather`."""
    out: Tensor = masked_gather_op(x_BND, index_BM)
    return out
