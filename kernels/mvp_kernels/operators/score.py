"""The losses of predictions and targets, and their gradients: launches of `score_kernels.py`.

Shape legend: B images, N tokens, M tokens in the loss, D channels, G partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mvp_kernels.launch import Launch, block_of, launch_of, programs_of
from mvp_kernels.operators.rows import TRITON_TYPES, as_rows, side_by_side, wide_of
from mvp_kernels.operators.score_kernels import mean_kernel, score_kernel, total_kernel

TOTALS = 64  # partial sums of the weights
SUM_BLOCK = 8192


class Rule(NamedTuple):
    """What is computed.

    Attributes:
        op: whose launch parameters are used.
        kind: normalisation of the target: l2, layernorm or none.
        mean: the (weighted) mean, or a number for each token.
        eps: least length.
    """

    op: str
    kind: str
    mean: bool
    eps: float


class Gradients(NamedTuple):
    """What a pass writes beside the loss; None is what was not asked for.

    Attributes:
        total_G: partial sums of the weights; empty where all weigh 1 or no mean is taken.
        pred, target: (M, D), each of its tensor's type.
    """

    total_G: Tensor
    pred: Tensor | None = None
    target: Tensor | None = None


def score(
    rule: Rule,
    pred_MD: Tensor,
    target: Tensor,
    index_BM: Tensor | None,
    weight_M: Tensor | None,
    upstream: float = 1.0,
    want_pred: bool = False,
    want_target: bool = False,
) -> tuple[Tensor, Gradients]:
    """Losses and, where wanted, gradients for an upstream gradient.

    Args:
        target: (B, N, D), or (M, D) where there is no index.

    Returns:
        The loss, () where the mean is asked for, else (M,): float32, or float64 where an input is. And the gradients.
    """
    loss, total_G = empty_losses(rule, pred_MD, target, index_BM, weight_M)
    tokens, wide = pred_MD.shape[0], loss.dtype
    gradients = Gradients(
        total_G,
        pred_MD.new_empty(pred_MD.shape) if want_pred else None,
        target.new_empty(target.shape) if want_target else None,
    )
    if tokens == 0:
        loss.zero_()
        total_G.zero_()
        return loss, gradients
    if total_G.numel():
        _sum_weights(total_G, index_BM, weight_M, tokens)
    launch = launch_of(rule.op, pred_MD.shape[1], pred_MD.dtype, pred_MD.device)
    if not rule.mean:
        _run(launch, rule, pred_MD, target, index_BM, weight_M, gradients, loss, None, upstream)
        return loss, gradients
    programs = programs_of(tokens, launch.rows)
    partial = loss.new_empty(programs)
    _run(launch, rule, pred_MD, target, index_BM, weight_M, gradients, partial, None, upstream)
    block = min(SUM_BLOCK, block_of(programs))
    mean_kernel[(1,)](
        partial,
        _or_none(total_G),
        loss,
        tokens,
        programs,
        STEPS=programs_of(programs, block),
        TOTALS=TOTALS,
        BLOCK=block,
        WIDE=TRITON_TYPES[wide],
        num_warps=8,
    )
    return loss, gradients


def score_again(
    rule: Rule,
    upstream: Tensor,
    pred_MD: Tensor,
    target: Tensor,
    index_BM: Tensor | None,
    weight_M: Tensor | None,
    gradients: Gradients,
    prepared_for: float | None = None,
) -> None:
    """Write `gradients` for an upstream gradient, () or (M,), save where it is the one they were prepared for."""
    if pred_MD.shape[0]:
        launch = launch_of(rule.op, pred_MD.shape[1], pred_MD.dtype, pred_MD.device)
        _run(launch, rule, pred_MD, target, index_BM, weight_M, gradients, None, upstream.contiguous(), prepared_for)


def empty_losses(
    rule: Rule, pred_MD: Tensor, target: Tensor, index_BM: Tensor | None, weight_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`loss` and `total_G`, values undefined."""
    wide = wide_of(pred_MD, target)
    weighed = rule.mean and (index_BM is not None or weight_M is not None)
    loss = pred_MD.new_empty(() if rule.mean else (pred_MD.shape[0],), dtype=wide)
    return loss, pred_MD.new_empty(TOTALS if weighed else 0, dtype=wide)


def _sum_weights(total_G: Tensor, index_BM: Tensor | None, weight_M: Tensor | None, tokens: int) -> None:
    block = min(SUM_BLOCK, block_of(programs_of(tokens, TOTALS)))
    total_kernel[(TOTALS,)](
        _contiguous(index_BM),
        _contiguous(weight_M),
        total_G,
        tokens,
        STEPS=programs_of(tokens, TOTALS * block),
        BLOCK=block,
        WIDE=TRITON_TYPES[total_G.dtype],
    )


def _run(
    launch: Launch,
    rule: Rule,
    pred_MD: Tensor,
    target: Tensor,
    index_BM: Tensor | None,
    weight_M: Tensor | None,
    gradients: Gradients,
    loss: Tensor | None,
    upstream: Tensor | None,
    prepared_for: float | None,
) -> None:
    """A pass of `score_kernel`: backward where there is an upstream gradient."""
    pred_MD, (tokens, width) = as_rows(pred_MD), pred_MD.shape
    if index_BM is None:
        target = as_rows(target)
        stride_b, stride_n, target_tokens = 0, target.stride(0), 0
    else:
        target = side_by_side(target)
        stride_b, stride_n, target_tokens = target.stride(0), target.stride(1), target.shape[1]
    rows, warps = launch
    score_kernel[(programs_of(tokens, rows),)](
        pred_MD,
        target,
        _contiguous(index_BM),
        _contiguous(weight_M),
        _or_none(gradients.total_G),
        upstream,
        loss,
        gradients.pred,
        gradients.target,
        tokens,
        1 if index_BM is None else index_BM.shape[1],
        target_tokens,
        width,
        pred_MD.stride(0),
        stride_b,
        stride_n,
        prepared_for,
        KIND=rule.kind,
        EPS=rule.eps,
        MEAN=rule.mean,
        BACKWARD=upstream is not None,
        TOTALS=TOTALS,
        ROWS=rows,
        BLOCK=block_of(width),
        WIDE=TRITON_TYPES[wide_of(pred_MD, target)],
        num_warps=warps,
    )


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
