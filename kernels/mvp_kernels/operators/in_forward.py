"""The losses in eager mode: the gradient is written in the forward pass, and looked at again in the backward pass.

The forward pass writes it for the upstream gradient that the caller expects, and what it was written for beside it, a
number a token (`held`). The backward pass launches the kernel once more; where the upstream gradient that came is the
one that is held, which the device alone decides, its programs end at once. Where it differs the gradient is computed
again from predictions and targets and written over, so that any upstream gradient is right and rounded once, and the
graph may be gone through any number of times.

A compiler can't be told of a gradient that may be written over; for it, the losses are the pure operators of
`cosine_loss.py` and `guided_loss.py`, whose backward pass computes the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvp_kernels.operators.score import Rule, score, score_again


class ScoreInForward(torch.autograd.Function):
    """(rule, pred_MD, target, index_BM, weight_M, upstream, want_pred, want_target) -> loss."""

    @staticmethod
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
        scores = score(rule, pred_MD, target, index_BM, weight_M, upstream, want_pred, want_target)
        if want_pred or want_target:
            ctx.rule, ctx.scores = rule, scores._replace(loss=None)
            ctx.save_for_backward(pred_MD, target, index_BM, weight_M)
        return scores.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        score_again(ctx.rule, upstream, *ctx.saved_tensors, ctx.scores)
        return None, ctx.scores.grad_pred, ctx.scores.grad_target, *(None,) * 5
