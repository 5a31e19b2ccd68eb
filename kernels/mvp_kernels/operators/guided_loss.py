"""guided_loss in Triton: masked_gather of the targets, token_norm of them and cosine_loss, in one pass.

    loss[b, m] = 1 - cos(pred[b, m], norm(target[b, index[b, m]]))            the loss of MVP, arXiv 2203.05175

Formulas and kernels are in `score_kernels.py`, the eager path in `in_forward.py`. Reads
each prediction and each target in the loss once and writes the predictions' gradient; gathered and normalised targets
never exist in memory. Targets are constants: where one wants a gradient, the three operations run one after the other.

Shape legend: B images, N tokens, M tokens in the loss, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvp_kernels.operator import Operator, traced
from mvp_kernels.operators.cosine_loss import cosine_loss
from mvp_kernels.operators.in_forward import ScoreInForward
from mvp_kernels.operators.masked_gather import masked_gather
from mvp_kernels.operators.score import Gradients, Rule, empty_losses, score, score_again
from mvp_kernels.operators.token_norm import token_norm


def _rule(kind: str, mean: bool, eps: float) -> Rule:
    return Rule("guided_loss", kind, mean, eps)


def _forward(
    pred: Tensor, target: Tensor, index: Tensor | None, kind: str, mean: bool, eps: float
) -> tuple[Tensor, Tensor]:
    loss, gradients = score(_rule(kind, mean, eps), pred, target, index, None)
    return loss, gradients.total_G


def _gradient(
    upstream: Tensor,
    pred: Tensor,
    target: Tensor,
    index: Tensor | None,
    total: Tensor,
    kind: str,
    mean: bool,
    eps: float,
) -> Tensor:
    grad = _fake_gradient(upstream, pred)
    score_again(_rule(kind, mean, eps), upstream, pred, target, index, None, Gradients(total, grad))
    return grad


def _fake_gradient(upstream: Tensor, pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    pred, target, index, ctx.kind, ctx.mean, ctx.eps = inputs
    _, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(pred, target, index, total)


def _backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grad = guided_loss_backward_op(upstream, *ctx.saved_tensors, ctx.kind, ctx.mean, ctx.eps)
    return grad, *(None,) * 5


guided_loss_op = Operator(
    "guided_loss",
    "(Tensor pred, Tensor target, Tensor? index, str kind, bool mean, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda pred, target, index, kind, mean, eps: empty_losses(_rule(kind, mean, eps), pred, target, index, None),
    _setup,
    _backward,
)
guided_loss_backward_op = Operator(
    "guided_loss_backward",
    "(Tensor upstream, Tensor pred, Tensor target, Tensor? index, Tensor total, str kind, bool mean, float eps)"
    " -> Tensor",
    _gradient,
    _fake_gradient,
)


def guided_loss(
    pred_BMD: Tensor,
    target_BND: Tensor,
    index_BM: Tensor | None,
    kind: str,
    reduction: str,
    eps: float,
    upstream: float,
) -> Tensor:
    """See `mvp_kernels.guided_loss`."""
    if torch.is_grad_enabled() and target_BND.requires_grad:
        return _one_by_one(pred_BMD, target_BND, index_BM, kind, reduction, eps, upstream)
    shape, mean = pred_BMD.shape[:-1], reduction == "mean"
    tokens_by_width = (shape.numel(), pred_BMD.shape[-1])  # by name: -1 is ambiguous where there is no token
    pred = pred_BMD.reshape(tokens_by_width)
    target = target_BND.reshape(tokens_by_width) if index_BM is None else target_BND
    if traced(pred, target, index_BM):
        loss: Tensor = guided_loss_op(pred, target, index_BM, kind, mean, eps)[0]
    else:
        wanted = torch.is_grad_enabled() and pred.requires_grad
        loss = ScoreInForward.apply(_rule(kind, mean, eps), pred, target, index_BM, None, upstream, wanted, False)
    return loss if mean else loss.reshape(shape)


def _one_by_one(
    pred_BMD: Tensor,
    target_BND: Tensor,
    index_BM: Tensor | None,
    kind: str,
    reduction: str,
    eps: float,
    upstream: float,
) -> Tensor:
    weight_BM = None
    if index_BM is not None:
        target_BND, weight_BM = masked_gather(target_BND, index_BM), index_BM >= 0
    # Widened first, as in the reference: a rounded target would have another gradient.
    wide = torch.promote_types(target_BND.dtype, torch.float32)
    target_BND = token_norm(target_BND.to(wide), kind, eps)
    return cosine_loss(pred_BMD, target_BND, weight_BM, reduction, eps, upstream)
