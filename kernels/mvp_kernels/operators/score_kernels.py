"""The kernels of both losses: 1 - cos of each prediction and its target, with the gradient in the same pass.

For a prediction p and a target t, with n(v) = max(|v|, eps) and weight w, the loss of a token and its gradient are

    1 - c,  c = p.t / (n(p) n(t))
    dp = -f (t / n(t) - [|p| >= eps] c p / n(p)) / n(p)         f = upstream w / sum of w   (upstream w per token)

and the same for dt with p and t exchanged. A target may be gathered by an index first, and normalised: l2 divides by
n(t), layernorm subtracts the mean and divides by sqrt(var + eps). Neither needs a second look at the target: the
cosine does not see a factor, which only decides where eps takes hold.

One kernel does it all. A forward pass reads p and t once and can write the gradient for a known upstream gradient in
the same pass. A backward pass writes the gradient for the upstream gradient that came; told which one has been
prepared for, it passes over the tokens for which the two are the same.

Sums are deterministic: one partial sum a program, added up by one program in a fixed order. `score.py` launches them.

Shape legend: B images, N tokens, M tokens in the loss, R of them in a program's tile, D channels, G partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mvp_kernels.operators.rows import at_least, row_sum, square_root


@triton.jit(do_not_specialize=["tokens"])
def total_kernel(
    index_ptr, weight_ptr, total_ptr, tokens, STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """total_G: the sum of a stretch of the weights, or how many of a stretch of the index take a token."""
    sum_S = tl.zeros([BLOCK], WIDE)
    for step in range(STEPS):
        place_S = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        if index_ptr is not None:
            sum_S += (tl.load(index_ptr + place_S, mask=place_S < tokens, other=-1) != -1).to(WIDE)
        else:
            sum_S += tl.load(weight_ptr + place_S, mask=place_S < tokens, other=0).to(WIDE)
    tl.store(total_ptr + tl.program_id(0), tl.sum(sum_S, axis=0))


@triton.jit
def weight_sum(total_ptr, tokens, TOTALS: tl.constexpr, WIDE: tl.constexpr):
    """The sum of all weights, 1 where it is 0; without weights, the number of tokens."""
    total = tokens.to(WIDE) if total_ptr is None else tl.sum(tl.load(total_ptr + tl.arange(0, TOTALS)), axis=0)
    return tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["tokens", "partials"])
def mean_kernel(
    partial_ptr,
    total_ptr,
    loss_ptr,
    tokens,
    partials,
    STEPS: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The mean from its partial sums, by one program."""
    sum_S = tl.zeros([BLOCK], WIDE)
    for step in range(STEPS):
        place_S = step * BLOCK + tl.arange(0, BLOCK)
        sum_S += tl.load(partial_ptr + place_S, mask=place_S < partials, other=0.0)
    tl.store(loss_ptr, tl.sum(sum_S, axis=0) / weight_sum(total_ptr, tokens, TOTALS, WIDE))


@triton.jit(do_not_specialize=["tokens"])
def score_kernel(
    pred_ptr,
    target_ptr,
    index_ptr,
    weight_ptr,
    total_ptr,
    upstream_ptr,
    loss_ptr,
    grad_pred_ptr,
    grad_target_ptr,
    tokens,
    tokens_an_image,
    target_tokens,
    width,
    pred_stride,
    target_stride_b,
    target_stride_n,
    prepared_for,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    MEAN: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOTALS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Forward: loss (a sum a program where MEAN, else a number a token) and gradients. Backward: gradients.

    prepared_for is the upstream gradient to prepare for; in a backward pass the one that was prepared for, or None.
    """
    number_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # divided as int32: in int64 that is a subroutine
    row_R = number_R.to(tl.int64)
    column_D = tl.arange(0, BLOCK)
    wanted_R = row_R < tokens
    if BACKWARD:
        upstream_R = tl.load(upstream_ptr + row_R * (0 if MEAN else 1), mask=wanted_R, other=0.0).to(WIDE)
        if prepared_for is not None:
            wanted_R = wanted_R & (upstream_R != tl.zeros([ROWS], WIDE) + prepared_for)
            if tl.max(wanted_R.to(tl.int32), axis=0) == 0:
                return
    else:
        upstream_R = tl.zeros([ROWS], WIDE) + prepared_for

    # Which target, and whether the token takes part.
    weight_R = tl.full([ROWS], 1.0, WIDE)
    found_R = wanted_R
    target_R = row_R * target_stride_n
    if index_ptr is not None:
        index_R = tl.load(index_ptr + row_R, mask=wanted_R, other=-1)
        found_R = (index_R >= 0) & (index_R < target_tokens)
        weight_R = (index_R != -1).to(WIDE)
        target_R = (number_R // tokens_an_image).to(tl.int64) * target_stride_b + index_R * target_stride_n
    if weight_ptr is not None:
        weight_R = tl.load(weight_ptr + row_R, mask=wanted_R, other=0).to(WIDE)
    taken_R = wanted_R & (weight_R != 0)
    found_R = found_R & taken_R
    taken_RD = taken_R[:, None] & (column_D < width)[None, :]
    found_RD = found_R[:, None] & (column_D < width)[None, :]

    p_RD = tl.load(pred_ptr + row_R[:, None] * pred_stride + column_D[None, :], mask=taken_RD, other=0.0).to(WIDE)
    t_RD = tl.load(target_ptr + target_R[:, None] + column_D[None, :], mask=found_RD, other=0.0).to(WIDE)
    if KIND == "layernorm":
        t_RD = tl.where(found_RD, t_RD - (row_sum(t_RD) / width)[:, None], 0.0)
    length_p_R = square_root(row_sum(p_RD * p_RD))
    square_t_R = row_sum(t_RD * t_RD)
    length_t_R = square_root(square_t_R)
    inverse_p_R = 1.0 / at_least(length_p_R, EPS)
    if KIND == "layernorm":
        inverse_t_R = 1.0 / square_root(square_t_R / width + EPS)
    else:
        inverse_t_R = 1.0 / at_least(length_t_R, EPS)
    if KIND != "none":  # the length of the normalised target is held to eps once more
        inverse_t_R = inverse_t_R / at_least(length_t_R * inverse_t_R, EPS)
    # An index out of range makes NaN of its token, in the loss and in the gradient. A token that takes no part is zeros
    # throughout, so that no value of a tile has to be chosen one by one.
    inverse_t_R = tl.where(taken_R, tl.where(found_R, inverse_t_R, float("nan")), 0.0)
    inverse_p_R = tl.where(taken_R, inverse_p_R, 0.0)
    cos_R = row_sum(p_RD * t_RD) * inverse_p_R * inverse_t_R

    if not BACKWARD:
        loss_R = tl.where(taken_R, (1.0 - cos_R) * weight_R, 0.0)
        if MEAN:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(loss_R, axis=0))
        else:
            tl.store(loss_ptr + row_R, loss_R, mask=wanted_R)
    factor_R = tl.where(taken_R, upstream_R * weight_R, 0.0)
    if MEAN:
        factor_R = factor_R / weight_sum(total_ptr, tokens, TOTALS, WIDE)
    inside_RD = wanted_R[:, None] & (column_D < width)[None, :]
    out_RD = row_R[:, None] * width + column_D[None, :]
    if grad_pred_ptr is not None:
        along_R = tl.where(length_p_R < EPS, 0.0, cos_R * inverse_p_R)
        g_RD = (p_RD * along_R[:, None] - t_RD * inverse_t_R[:, None]) * (factor_R * inverse_p_R)[:, None]
        tl.store(grad_pred_ptr + out_RD, g_RD.to(grad_pred_ptr.dtype.element_ty), mask=inside_RD)
    if grad_target_ptr is not None:
        along_R = tl.where(length_t_R < EPS, 0.0, cos_R * inverse_t_R)
        g_RD = (t_RD * along_R[:, None] - p_RD * inverse_p_R[:, None]) * (factor_R * inverse_t_R)[:, None]
        tl.store(grad_target_ptr + out_RD, g_RD.to(grad_target_ptr.dtype.element_ty), mask=inside_RD)
