"""cosine_loss in Triton: 1 - cos of each prediction and its target, their (weighted) mean, and both gradients.

Formulas and kernels are in `score_kernels.py`, the eager path in `in_forward.py`. Reads
predictions and targets once, and writes the gradient of those that want one.

Shape legend: M tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvp_kernels.operator import Operator, traced
from mvp_kernels.operators.in_forward import ScoreInForward
from mvp_kernels.operators.score import Gradients, Rule, empty_losses, score, score_again


def _rule(mean: bool, eps: float) -> Rule:
    return Rule("cosine_loss", "none", mean, eps)


def _forward(pred: Tensor, target: Tensor, weight: Tensor | None, mean: bool, eps: float) -> tuple[Tensor, Tensor]:
    loss, gradients = score(_rule(mean, eps), pred, target, None, weight)
    return loss, gradients.total_G


def _gradient(
    upstream: Tensor, pred: Tensor, target: Tensor, weight: Tensor | None, total: Tensor, mean: bool, eps: float
) -> tuple[Tensor, Tensor]:
    grads = _fake_gradient(upstream, pred, target)
    score_again(_rule(mean, eps), upstream, pred, target, None, weight, Gradients(total, *grads))
    return grads


def _fake_gradient(upstream: Tensor, pred: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return pred.new_empty(pred.shape), target.new_empty(target.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    pred, target, weight, ctx.mean, ctx.eps = inputs
    _, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(pred, target, weight, total)


def _backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *cosine_loss_backward_op(upstream, *ctx.saved_tensors, ctx.mean, ctx.eps), None, None, None


cosine_loss_op = Operator(
    "cosine_loss",
    "(Tensor pred, Tensor target, Tensor? weight, bool mean, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda pred, target, weight, mean, eps: empty_losses(_rule(mean, eps), pred, target, None, weight),
    _setup,
    _backward,
)
cosine_loss_backward_op = Operator(
    "cosine_loss_backward",
    "(Tensor upstream, Tensor pred, Tensor target, Tensor? weight, Tensor total, bool mean, float eps)"
    " -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)


def cosine_loss(
    pred_MD: Tensor, target_MD: Tensor, weight_M: Tensor | None, reduction: str, eps: float, upstream: float
) -> Tensor:
    """See `mvp_kernels.cosine_loss`."""
    shape, mean = pred_MD.shape[:-1], reduction == "mean"
    tokens_by_width = (shape.numel(), pred_MD.shape[-1])  # by name: -1 is ambiguous where there is no token
    pred, target = pred_MD.reshape(tokens_by_width), target_MD.reshape(tokens_by_width)
    weight = None if weight_M is None else weight_M.reshape(-1)
    if traced(pred, target, weight):
        loss: Tensor = cosine_loss_op(pred, target, weight, mean, eps)[0]
    else:
        wanted = (torch.is_grad_enabled() and t.requires_grad for t in (pred, target))
        loss = ScoreInForward.apply(_rule(mean, eps), pred, target, None, weight, upstream, *wanted)
    return loss if mean else loss.reshape(shape)
