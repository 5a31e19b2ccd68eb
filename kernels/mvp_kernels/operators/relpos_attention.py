"""relpos_attention in Triton: softmax(q k^T scale + bias) v, with a bias shared by all images, or with none.

Two operators: one takes q, k and v apart, with any strides, the other the projection's output as it is, and writes its
gradient as one tensor too, so that nothing is put together afterwards. Formulas and kernels are in `attention_forward`,
`attention_query_gradient` and `attention_key_gradient`, the launches in `attention_launch`.

Shape legend: B images, H heads, M queries, N keys, D channels of a head; 3 is q, k, v.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvp_kernels.operator import Operator
from mvp_kernels.operators.attention_launch import (
    attend,
    attend_backward,
    empty_bias_gradient,
    empty_lse,
    heads_of,
    like_projection,
    within_reach,
)
from mvp_kernels.operators.relpos_bias import relpos_bias
from mvp_kernels.operators.rows import side_by_side, wide_of

# ---- q, k and v apart


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_index: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _fake(q)
    attend(heads_of(q, k, v, bias, query_index, scale), out, lse)
    return out, lse


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_projection(q), empty_lse(q)


def _gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = like_projection(q), like_projection(k), like_projection(v)
    heads = heads_of(q, k, v, bias, query_index, scale)
    dbias = attend_backward(heads, within_reach(grad), within_reach(out), lse, dq, dk, dv, want_bias)
    return dq, dk, dv, dbias


def _fake_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like_projection(q), like_projection(k), like_projection(v), empty_bias_gradient(q, bias, others[-1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, bias, query_index, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, bias, query_index, out, lse)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    want_bias = ctx.needs_input_grad[3]
    *grads, dbias = relpos_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, want_bias)
    return *grads, dbias if want_bias else None, None, None


relpos_attention_op = Operator(
    "relpos_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? query_index, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup,
    _backward,
)
relpos_attention_backward_op = Operator(
    "relpos_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? query_index, Tensor out, Tensor lse,"
    " float scale, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)


def relpos_attention(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None,
    index_NN: Tensor | None,
    scale: float,
    query_index_BM: Tensor | None,
) -> Tensor:
    """See `mvp_kernels.relpos_attention`."""
    if bias is not None and index_NN is not None:
        bias = relpos_bias(bias, index_NN)
    out_BHMD: Tensor = relpos_attention_op(q_BHMD, k_BHND, v_BHND, bias, query_index_BM, scale)[0]
    return out_BHMD


# ---- q, k and v as the projection wrote them


def _apart(qkv_BN3HD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _forward_packed(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _fake_packed(qkv)
    attend(heads_of(*_apart(qkv), bias, None, scale), out.transpose(1, 2), lse)
    return out, lse


def _fake_packed(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    images, tokens, _three, count, width = qkv.shape
    lse = qkv.new_empty(images, count, tokens, dtype=wide_of(qkv))
    return qkv.new_empty(images, tokens, count, width), lse


def _gradient_packed(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    dqkv = qkv.new_empty(qkv.shape)
    grad, out = side_by_side(grad).transpose(1, 2), side_by_side(out).transpose(1, 2)
    dbias = attend_backward(heads_of(*_apart(qkv), bias, None, scale), grad, out, lse, *_apart(dqkv), want_bias)
    return dqkv, dbias


def _fake_gradient_packed(grad: Tensor, qkv: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), empty_bias_gradient(qkv, bias, others[-1])


def _setup_packed(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, bias, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, bias, out, lse)


def _backward_packed(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    want_bias = ctx.needs_input_grad[1]
    dqkv, dbias = relpos_attention_qkv_backward_op(grad, *ctx.saved_tensors, ctx.scale, want_bias)
    return dqkv, dbias if want_bias else None, None


relpos_attention_qkv_op = Operator(
    "relpos_attention_qkv",
    "(Tensor qkv, Tensor? bias, float scale) -> (Tensor, Tensor)",
    _forward_packed,
    _fake_packed,
    _setup_packed,
    _backward_packed,
)
relpos_attention_qkv_backward_op = Operator(
    "relpos_attention_qkv_backward",
    "(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, float scale, bool want_bias) -> (Tensor, Tensor)",
    _gradient_packed,
    _fake_gradient_packed,
)


def relpos_attention_qkv(qkv_BN3HD: Tensor, bias: Tensor | None, index_NN: Tensor | None, scale: float) -> Tensor:
    """See `mvp_kernels.relpos_attention_qkv`."""
    if bias is not None and index_NN is not None:
        bias = relpos_bias(bias, index_NN)
    out_BNHD: Tensor = relpos_attention_qkv_op(qkv_BN3HD, bias, scale)[0]
    return out_BNHD
