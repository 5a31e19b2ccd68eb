"""What the kernels over rows of tokens share.

Shape legend: R tokens of a program's tile, D channels (padded to a power of two in a tile).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32}


@triton.jit
def row_sum(x_RD):
    """Sum of each token's channels."""
    return tl.sum(x_RD, axis=1)


@triton.jit
def square_root(x_R):
    """Correctly rounded; Triton's plain square root of float32 is approximate."""
    return tl.sqrt(x_R) if x_R.dtype == tl.float64 else tl.sqrt_rn(x_R)


@triton.jit
def at_least(length_R, eps):
    """The length, or `eps` where it is shorter; NaN stays NaN."""
    return tl.where(length_R < eps, eps, length_R)


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (M, D) with the channels of a token side by side; a copy only where that can't be a view."""
    return side_by_side(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def side_by_side(x: Tensor) -> Tensor:
    """The tensor with the channels of a token side by side, its other strides whatever they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def wide_of(*tensors: Tensor) -> torch.dtype:
    """The type that is computed in: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
