"""patchify in Triton: uint8 crops to the patch matrices of one or two models, in one read.

    out[b, n, c p^2 + i p + j] = image[b, p row(n) + i, p column(n) + j, c] * (1 / (255 std_c)) - mean_c / std_c

A program takes a few patches, a colour at a time: it reads p^2 bytes of each, which lie three apart where the colours
of a pixel are side by side (the cache serves the other two colours from the same lines), and writes p^2 values that
are contiguous. Both results come from the same registers. Any strides will do, so that NHWC and NCHW are one kernel.

Shape legend: B images, N patches, P = C * p * p values a patch, R patches of a program's tile, Q = p * p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvp_kernels.arguments import Normalization
from mvp_kernels.launch import block_of, launch_of, programs_of
from mvp_kernels.operator import Operator
from mvp_kernels.operators.rows import TRITON_TYPES

AT_ONCE = 2  # results a pass


@triton.jit
def patchify_kernel(
    images_ptr,
    first_ptr,
    second_ptr,
    patches,
    grid_rows,
    grid_columns,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    PATCH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIRST_WIDE: tl.constexpr,
    SECOND_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One or two of out_BNP, flattened to (B * N, P). FIRST and SECOND hold a factor and an offset for each colour."""
    COLOURS: tl.constexpr = len(FIRST) // 2
    VALUES: tl.constexpr = PATCH * PATCH
    number_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # divided as int32: in int64 that is a subroutine
    patch_R = number_R.to(tl.int64)
    value_Q = tl.arange(0, BLOCK)
    inside_RQ = (patch_R < patches)[:, None] & (value_Q < VALUES)[None, :]
    of_image_R = number_R % (grid_rows * grid_columns)
    top_R, left_R = of_image_R // grid_columns * PATCH, of_image_R % grid_columns * PATCH
    image_R = (number_R // (grid_rows * grid_columns)).to(tl.int64)
    corner_R = image_R * stride_b + top_R * stride_h + left_R * stride_w
    pixel_Q = value_Q // PATCH * stride_h + value_Q % PATCH * stride_w
    source_RQ = corner_R[:, None] + pixel_Q[None, :]
    out_RQ = patch_R[:, None] * (COLOURS * VALUES) + value_Q[None, :]
    for c in tl.static_range(COLOURS):
        x_RQ = tl.load(images_ptr + source_RQ + c * stride_c, mask=inside_RQ, other=0)
        first_RQ = x_RQ.to(FIRST_WIDE) * FIRST[2 * c] + FIRST[2 * c + 1]
        tl.store(first_ptr + out_RQ + c * VALUES, first_RQ.to(first_ptr.dtype.element_ty), mask=inside_RQ)
        if len(SECOND) > 0:
            second_RQ = x_RQ.to(SECOND_WIDE) * SECOND[2 * c] + SECOND[2 * c + 1]
            tl.store(second_ptr + out_RQ + c * VALUES, second_RQ.to(second_ptr.dtype.element_ty), mask=inside_RQ)


def _constants(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """Factor and offset of each colour, one after the other."""
    return tuple(n for m, s in zip(mean, std, strict=True) for n in (1.0 / (255.0 * s), -m / s))


def _forward(
    images_BHWC: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtypes: Sequence[str]
) -> list[Tensor]:
    images, height, width, colours = images_BHWC.shape
    rows, columns = height // patch, width // patch
    constants = [
        _constants(mean[k * colours : (k + 1) * colours], std[k * colours : (k + 1) * colours])
        for k in range(len(dtypes))
    ]
    outs = _fake(images_BHWC, patch, mean, std, dtypes)
    if images_BHWC.numel() == 0 or not outs:
        return outs
    tile, warps = launch_of("patchify", patch * patch, outs[0].dtype, images_BHWC.device)
    for first in range(0, len(outs), AT_ONCE):
        these = slice(first, first + AT_ONCE)
        (out, *more), (factors, *more_factors) = outs[these], constants[these]
        patchify_kernel[(programs_of(images * rows * columns, tile),)](
            images_BHWC,
            out,
            more[0] if more else None,
            images * rows * columns,
            rows,
            columns,
            *images_BHWC.stride(),
            PATCH=patch,
            FIRST=factors,
            SECOND=more_factors[0] if more else (),
            FIRST_WIDE=_wide(out),
            SECOND_WIDE=_wide(more[0]) if more else None,
            ROWS=tile,
            BLOCK=block_of(patch * patch),
            num_warps=warps,
        )
    return outs


def _wide(out: Tensor) -> tl.dtype:
    return TRITON_TYPES[torch.float64 if out.dtype == torch.float64 else torch.float32]


def _fake(
    images_BHWC: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtypes: Sequence[str]
) -> list[Tensor]:
    images, height, width, colours = images_BHWC.shape
    shape = (images, (height // patch) * (width // patch), colours * patch * patch)
    return [torch.empty(shape, dtype=getattr(torch, name), device=images_BHWC.device) for name in dtypes]


patchify_op = Operator(
    "patchify",
    "(Tensor images, SymInt patch, float[] mean, float[] std, str[] dtypes) -> Tensor[]",
    _forward,
    _fake,
)


def patchify(images_BHWC: Tensor, patch: int, normalizations: Sequence[Normalization]) -> list[Tensor]:
    """See `mvp_kernels.patchify`."""
    mean = [value for normalization in normalizations for value in normalization.mean]
    std = [value for normalization in normalizations for value in normalization.std]
    dtypes = [str(normalization.dtype).removeprefix("torch.") for normalization in normalizations]
    out: list[Tensor] = patchify_op(images_BHWC, patch, mean, std, dtypes)
    return out
