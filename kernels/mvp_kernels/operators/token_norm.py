"""token_norm in Triton: each token over its channels, statistics in float32.

    l2          y = x / max(|x|, eps)
                dx = (g - y (y . g)) / |x|   where |x| >= eps, else g / eps
    layernorm   c = x - mean(x), s = 1 / sqrt(mean(c^2) + eps), y = s c            (arXiv 1607.06450, no affine part)
                dx = s (g - mean(g) - y mean(y g))

The gradient needs x alone: its statistics are computed again, which costs no memory traffic. Forward reads x and writes
y; backward reads x and g and writes dx.

Shape legend: M tokens, R of them in a program's tile, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvp_kernels.launch import block_of, launch_of, programs_of
from mvp_kernels.operator import Operator
from mvp_kernels.operators.rows import TRITON_TYPES, as_rows, at_least, row_sum, square_root, wide_of


@triton.jit
def token_norm_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    tokens,
    width,
    x_stride,
    grad_stride,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y, or dx where BACKWARD."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK)
    inside_RD = (row_R < tokens)[:, None] & (column_D < width)[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * x_stride + column_D[None, :], mask=inside_RD, other=0.0).to(WIDE)
    if BACKWARD:
        g_RD = tl.load(grad_ptr + row_R[:, None] * grad_stride + column_D[None, :], mask=inside_RD, other=0.0).to(WIDE)
    if KIND == "layernorm":
        mean_R = row_sum(x_RD) / width
        x_RD = tl.where(inside_RD, x_RD - mean_R[:, None], 0.0)
        scale_R = 1.0 / square_root(row_sum(x_RD * x_RD) / width + EPS)
        out_RD = x_RD * scale_R[:, None]
        if BACKWARD:
            mean_g_R = row_sum(g_RD) / width
            mean_yg_R = row_sum(out_RD * g_RD) / width
            out_RD = (g_RD - mean_g_R[:, None] - out_RD * mean_yg_R[:, None]) * scale_R[:, None]
    else:
        length_R = square_root(row_sum(x_RD * x_RD))
        scale_R = 1.0 / at_least(length_R, EPS)
        out_RD = x_RD * scale_R[:, None]
        if BACKWARD:
            # Below eps the length is a constant, and y only g's shape.
            along_R = tl.where(length_R < EPS, 0.0, row_sum(out_RD * g_RD))
            out_RD = (g_RD - out_RD * along_R[:, None]) * scale_R[:, None]
    out_ptrs = out_ptr + row_R[:, None] * width + column_D[None, :]
    tl.store(out_ptrs, out_RD.to(out_ptr.dtype.element_ty), mask=inside_RD)


def _launch(x: Tensor, grad: Tensor | None, kind: str, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x_MD, grad_MD = as_rows(x), None if grad is None else as_rows(grad)
    tokens, width = x_MD.shape
    rows, warps = launch_of("token_norm" if grad is None else "token_norm_backward", width, x.dtype, x.device)
    token_norm_kernel[(programs_of(tokens, rows),)](
        x_MD,
        grad_MD,
        out,
        tokens,
        width,
        x_MD.stride(0),
        0 if grad_MD is None else grad_MD.stride(0),
        KIND=kind,
        EPS=eps,
        BACKWARD=grad is not None,
        ROWS=rows,
        BLOCK=block_of(width),
        WIDE=TRITON_TYPES[wide_of(x)],
        num_warps=warps,
    )
    return out


def _forward(x: Tensor, kind: str, eps: float) -> Tensor:
    return _launch(x, None, kind, eps)


def _backward_forward(grad: Tensor, x: Tensor, kind: str, eps: float) -> Tensor:
    return _launch(x, grad, kind, eps)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return token_norm_backward_op(grad, *ctx.saved_tensors, ctx.kind, ctx.eps), None, None


token_norm_op = Operator(
    "token_norm",
    "(Tensor x, str kind, float eps) -> Tensor",
    _forward,
    lambda x, kind, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    _setup,
    _backward,
)
token_norm_backward_op = Operator(
    "token_norm_backward",
    "(Tensor grad, Tensor x, str kind, float eps) -> Tensor",
    _backward_forward,
    lambda grad, x, kind, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)


def token_norm(x_MD: Tensor, kind: str, eps: float) -> Tensor:
    """See `mvp_kernels.token_norm`."""
    if kind == "none":
        return x_MD
    out: Tensor = token_norm_op(x_MD, kind, eps)
    return out
