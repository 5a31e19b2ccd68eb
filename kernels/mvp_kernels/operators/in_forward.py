"""The losses in eager mode: the gradient is written in the forward pass, and looked at again in the backward pass.

The forward pass writes it for the upstream gradient that the caller expects. The backward pass launches the kernel once
more: where the upstream gradient that came is that one, which the device alone decides, its programs end at once; where
it differs the gradient is computed again from predictions and targets and written over. So any upstream gradient is
right and rounded once. A graph that is gone through again computes into new memory, for the first gradient is given
away.

A compiler can't be told of a gradient that may be written over; for it, the losses are the pure operators of
`cosine_loss.py` and `guided_loss.py`, whose backward pass computes the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvp_kernels.operator import differentiable_once, on_its_device
from mvp_kernels.operators.score import Gradients, Rule, score, score_again


class ScoreInForward(torch.autograd.Function):
    """(rule, pred_MD, target, index_BM, weight_M, upstream, want_pred, want_target) -> loss."""

    @staticmethod
    @on_its_device
    def forward(
        ctx: Any,
        rule: Rule,
        pred_MD: Tensor,
        target: Tensor,
        index_BM: Tensor | None,
        weight_M: Tensor | None,
        upstream: float,
        want_pred: bool,
        want_target: bool,
    ) -> Tensor:
        loss, gradients = score(rule, pred_MD, target, index_BM, weight_M, upstream, want_pred, want_target)
        if want_pred or want_target:
            ctx.rule, ctx.gradients, ctx.prepared_for = rule, gradients, upstream
            ctx.save_for_backward(pred_MD, target, index_BM, weight_M)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pred_MD, target, index_BM, weight_M = ctx.saved_tensors
        gradients, prepared_for = ctx.gradients, ctx.prepared_for
        # What is returned belongs to the caller: kept here, a second pass would write over it.
        ctx.gradients, ctx.prepared_for = Gradients(gradients.total_G), None
        if prepared_for is None:
            gradients = gradients._replace(
                pred=pred_MD.new_empty(pred_MD.shape) if ctx.needs_input_grad[1] else None,
                target=target.new_empty(target.shape) if ctx.needs_input_grad[2] else None,
            )
        score_again(ctx.rule, upstream, pred_MD, target, index_BM, weight_M, gradients, prepared_for)
        return None, gradients.pred, gradients.target, *(None,) * 5
