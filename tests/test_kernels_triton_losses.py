"""The losses in Triton: the gradient that the forward pass prepares, weights and padding, gradients of the target.

Shape legend: B images, N tokens, M tokens in the loss, D channels of a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import cosine_loss, guided_loss, reference
from mvp_kernels.operators import guided_loss as guided_operators
from tests.kernel_cases import (
    CALLS,
    DEVICES,
    FLOATS,
    IMPLS,
    KINDS,
    Shape,
    assert_near,
    assert_same,
    distinct_index,
    gradient_size,
    make_call,
    surroundings,
)

__all__ = ["surroundings"]

SHAPE = Shape(3, 9, 5, 24)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])
LOSSES = pytest.mark.parametrize("loss", ["cosine", "guided"])


class Inputs:
    """Predictions, targets and index; `loss(...)` of them, and the gradient that a float64 reference has."""

    def __init__(self, loss: str, device: str, reduction: str, dtype: torch.dtype = torch.float32) -> None:
        images, tokens, taken, width = SHAPE
        self.reduction = reduction
        self.pred = torch.randn(images, taken, width, device=device).to(dtype).requires_grad_()
        self.index = distinct_index(SHAPE, device) if loss == "guided" else None
        self.target = torch.randn(images, tokens if loss == "guided" else taken, width, device=device).to(dtype)
        self.weight = torch.ones(images, taken, device=device) if self.index is None else (self.index >= 0).float()

    def loss(self, pred: Tensor | None = None, **options: Any) -> Tensor:
        """By Triton unless `impl` is given."""
        given = {"reduction": self.reduction, "impl": "triton", **options}
        if self.index is None:
            return cosine_loss(self.pred if pred is None else pred, self.target, **given)
        return guided_loss(self.pred if pred is None else pred, self.target, self.index, "layernorm", **given)

    def check(self, grad: Tensor, upstream: Tensor) -> None:
        """`grad` is right for this upstream gradient."""
        pred = self.pred.detach().double().requires_grad_()
        target = self.target.double()
        if self.index is None:
            loss = reference.cosine_loss(pred, target, None, self.reduction)
        else:
            loss = reference.guided_loss(pred, target, self.index, "layernorm", self.reduction)
            target = reference.token_norm(reference.masked_gather(target, self.index), "layernorm")
        (want,) = torch.autograd.grad(loss, pred, upstream.double())
        factor = upstream.double() * self.weight.double()
        factor = factor / self.weight.sum() if self.reduction == "mean" else factor
        assert_near(grad, want, gradient_size(pred, target, factor))


def prepared(loss: Tensor) -> Tensor:
    """The gradient for the predictions as the forward pass left it."""
    node: Any = loss.grad_fn
    while not hasattr(node, "gradients"):
        node = node.next_functions[0][0]
    found: Tensor = node.gradients.pred
    return found


def upstream_of(kind: str, loss: Tensor) -> Tensor:
    """`expected` is what the forward pass prepares for unless told otherwise."""
    upstream = torch.ones_like(loss)
    if kind == "mixed":
        return torch.where(torch.rand_like(loss) < 0.5, upstream, torch.randn_like(loss))
    return {"expected": upstream, "other": 2 * torch.rand_like(loss) - 3, "zero": 0 * upstream}[kind]


@DEVICES
@LOSSES
@REDUCTIONS
@pytest.mark.parametrize("kind", ["expected", "other", "mixed", "zero"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_upstream_gradient(device: str, loss: str, reduction: str, kind: str, dtype: torch.dtype) -> None:
    """Right, and rounded once, whether it is the prepared one or computed again."""
    inputs = Inputs(loss, device, reduction, dtype)
    value = inputs.loss()
    upstream = upstream_of(kind, value)
    (grad,) = torch.autograd.grad(value, inputs.pred, upstream)
    inputs.check(grad, upstream)


@DEVICES
@LOSSES
def test_an_upstream_gradient_of_nan(device: str, loss: str) -> None:
    """It makes NaN of its token's gradient alone, or of all of them, save of tokens that take no part."""
    inputs = Inputs(loss, device, "none")
    value = inputs.loss()
    upstream = torch.ones_like(value)
    token = int(inputs.weight[1].argmax())
    (clean,) = torch.autograd.grad(value, inputs.pred, upstream, retain_graph=True)
    upstream[1, token] = torch.nan
    (grad,) = torch.autograd.grad(value, inputs.pred, upstream)
    assert grad[1, token].isnan().all()
    grad[1, token] = clean[1, token]
    assert torch.equal(grad, clean)

    inputs = Inputs(loss, device, "mean")
    value = inputs.loss()
    (grad,) = torch.autograd.grad(value, inputs.pred, torch.full_like(value, torch.nan))
    assert torch.equal(grad.isnan(), (inputs.weight != 0)[..., None].expand_as(grad))
    assert (grad[inputs.weight == 0] == 0).all()


@DEVICES
@LOSSES
@REDUCTIONS
@pytest.mark.parametrize("upstream", [0.25, 1 / 3])
def test_the_expected_upstream_gradient_may_be_told(device: str, loss: str, reduction: str, upstream: float) -> None:
    """To the bit what is computed again in the backward pass where something else was expected."""
    inputs = Inputs(loss, device, reduction)
    told, untold = inputs.loss(upstream=upstream), inputs.loss()
    assert torch.equal(told, untold)
    prepared(told).fill_(7)
    (grad,) = torch.autograd.grad(told, inputs.pred, torch.full_like(told, upstream))
    assert (grad == 7).all()  # what was prepared is taken as it is
    (grad,) = torch.autograd.grad(inputs.loss(upstream=upstream).sum() * upstream, inputs.pred)
    (again,) = torch.autograd.grad(untold.sum() * upstream, inputs.pred)
    assert torch.equal(grad, again)
    inputs.check(grad, torch.full_like(told, upstream))


@DEVICES
@LOSSES
def test_only_tokens_of_another_upstream_gradient_are_written(device: str, loss: str) -> None:
    inputs = Inputs(loss, device, "none")
    value = inputs.loss()
    prepared(value).fill_(7)
    upstream = torch.ones_like(value)
    upstream[0, 1], upstream[2, 3] = 2, -1
    (grad,) = torch.autograd.grad(value, inputs.pred, upstream)
    kept = (grad == 7).all(-1)
    assert torch.equal(kept, upstream == 1)
    assert not (grad[~kept] == 7).any()

    inputs = Inputs(loss, device, "mean")
    for upstream, rewritten in ((1.0, False), (1.5, True)):
        value = inputs.loss()
        prepared(value).fill_(7)
        (grad,) = torch.autograd.grad(value * upstream, inputs.pred)
        assert bool((grad != 7).all()) == rewritten
        assert bool((grad == 7).all()) != rewritten


@DEVICES
@LOSSES
@REDUCTIONS
def test_a_graph_may_be_gone_through_again(device: str, loss: str, reduction: str) -> None:
    """Each pass has its gradient, whatever was expected, and no pass touches what another one returned."""
    inputs = Inputs(loss, device, reduction)
    value = inputs.loss()
    upstreams = [upstream_of(kind, value) for kind in ("expected", "other", "expected", "mixed")]
    grads = [torch.autograd.grad(value, inputs.pred, upstream, retain_graph=True)[0] for upstream in upstreams]
    for grad, upstream in zip(grads, upstreams, strict=True):
        inputs.check(grad, upstream)
    value.backward(upstreams[0], retain_graph=True)
    value.backward(upstreams[0])
    assert inputs.pred.grad is not None
    assert_same([inputs.pred.grad], [2 * grads[0]], exact=False)


@DEVICES
@LOSSES
def test_inputs_that_change_before_the_backward_pass_are_noticed(device: str, loss: str) -> None:
    inputs = Inputs(loss, device, "mean")
    value = inputs.loss()
    inputs.target.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@DEVICES
def test_gradients_of_the_one_or_the_other(device: str) -> None:
    """The prediction's, the target's, both or none: each as with both, and none that nobody wants."""
    pred, target = torch.randn(2, 4, 6, 16, device=device)
    upstream = torch.randn((), device=device)
    both = [x.clone().requires_grad_() for x in (pred, target)]
    wanted = torch.autograd.grad(cosine_loss(*both, impl="triton"), both, upstream)
    for which in range(2):
        inputs = [pred.clone(), target.clone()]
        inputs[which].requires_grad_()
        loss = cosine_loss(*inputs, impl="triton")
        (grad,) = torch.autograd.grad(loss, inputs[which], upstream)
        assert_same([grad], [wanted[which]], exact=False)
        assert inputs[1 - which].grad is None
    # Of both, the one that is asked for.
    loss = cosine_loss(*both, impl="triton")
    second = torch.autograd.grad(loss, both[1], upstream, retain_graph=True)
    first = torch.autograd.grad(loss, both[0], upstream)
    assert_same([*first, *second], wanted, exact=False)
    assert not cosine_loss(pred, target, impl="triton").requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            inside = cosine_loss(*both, impl="triton")
        assert not inside.requires_grad
        assert_same([inside], [loss], exact=False)
    assert mvp_kernels.record() == {"cosine_loss": "triton"}


@DEVICES
@IMPLS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("indexed", [True, False])
def test_targets_that_want_a_gradient(device: str, impl: str, kind: str, dtype: torch.dtype, indexed: bool) -> None:
    """Both gradients of guided_loss; still Triton's."""
    images, tokens, taken, width = SHAPE
    pred = torch.randn(images, taken, width, device=device).to(dtype).requires_grad_()
    target = (torch.randn(images, tokens if indexed else taken, width, device=device) + 0.5).to(dtype).requires_grad_()
    index = distinct_index(SHAPE, device) if indexed else None
    pred64, target64 = (x.detach().double().requires_grad_() for x in (pred, target))
    for reduction in ("mean", "none"):
        loss = guided_loss(pred, target, index, kind, reduction, impl=impl)
        upstream = torch.randn_like(loss)
        grads = torch.autograd.grad(loss, (pred, target), upstream, retain_graph=True)
        (alone,) = torch.autograd.grad(loss, target, upstream)
        assert_same([alone], [grads[1]], exact=False)
        want = reference.guided_loss(pred64, target64, index, kind, reduction)
        want_grads = torch.autograd.grad(want, (pred64, target64), upstream.double())
        assert_near(loss, want, torch.ones_like(want))
        for grad, want_grad in zip(grads, want_grads, strict=True):
            # A token's largest: with this many channels the terms of a gradient don't cancel by much.
            assert_near(grad, want_grad, 4 * want_grad.abs().amax(-1, keepdim=True))
    assert mvp_kernels.record() == {"guided_loss": impl}


@DEVICES
@IMPLS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64, torch.int64])
def test_weights_of_any_type(device: str, impl: str, dtype: torch.dtype) -> None:
    """Yes and no, or numbers; a token of weight 0 takes no part, whatever it holds."""
    pred, target = torch.randn(2, 3, 7, 16, device=device)
    weight = torch.tensor([1, 0, 2, 0, 1, 1, 3], device=device).repeat(3, 1).to(dtype)
    clean = pred.clone().requires_grad_()
    want = cosine_loss(clean, target, weight.float(), impl="reference")
    (want_grad,) = torch.autograd.grad(want, clean)
    pred[weight == 0], target[weight == 0] = torch.nan, torch.inf
    pred.requires_grad_()
    loss = cosine_loss(pred, target, weight, impl=impl)
    (grad,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)
    assert (grad[weight == 0] == 0).all()
    assert (cosine_loss(pred, target, weight, "none", impl=impl)[weight == 0] == 0).all()
    assert mvp_kernels.record() == {"cosine_loss": impl}


@DEVICES
@IMPLS
def test_padding_takes_no_part(device: str, impl: str) -> None:
    """What a padded prediction holds is not seen; where all is padding, loss and gradient are 0."""
    inputs = Inputs("guided", device, "mean")
    assert inputs.index is not None
    padded = inputs.index < 0
    assert padded.any()
    bad = inputs.pred.detach().masked_fill(padded[..., None], torch.nan).requires_grad_()
    for reduction in ("mean", "none"):
        inputs.reduction = reduction
        values = [inputs.loss(pred, impl=impl) for pred in (inputs.pred, bad)]
        grads = [torch.autograd.grad(v.sum(), p)[0] for v, p in zip(values, (inputs.pred, bad), strict=True)]
        assert torch.equal(*values)
        assert torch.equal(*grads)
        assert (grads[1][padded] == 0).all()
        inputs.index, index = torch.full_like(inputs.index, -1), inputs.index
        nothing = inputs.loss(bad, impl=impl)
        assert (nothing == 0).all()
        assert (torch.autograd.grad(nothing.sum(), bad)[0] == 0).all()
        inputs.index = index


@DEVICES
@pytest.mark.parametrize("wrong", [-2, 9, 1 << 32, 1 << 40])
def test_a_target_out_of_range_past_the_host(device: str, wrong: int) -> None:
    """NaN for its token's loss and gradient; all other tokens are as they were."""
    inputs = Inputs("guided", device, "none")
    assert inputs.index is not None

    def run(reduction: str) -> tuple[Tensor, Tensor]:
        given = (inputs.index, "layernorm", reduction, 1e-6, 1.0)
        loss = guided_operators.guided_loss(inputs.pred, inputs.target, *given)
        return loss, torch.autograd.grad(loss.sum(), inputs.pred)[0]

    inputs.index[1, 2] = 4
    was = [*run("none"), run("mean")[1]]
    inputs.index[1, 2] = wrong
    mean, mean_grad = run("mean")
    assert mean.isnan()
    for got, before in zip((*run("none"), mean_grad), was, strict=True):
        assert got[1, 2].isnan().all()
        got[1, 2] = before[1, 2]
        assert torch.equal(got, before)


@DEVICES
@pytest.mark.parametrize("name", [name for name in CALLS if "loss" in name])
def test_autocast_and_shape_of_the_predictions(device: str, name: str) -> None:
    """float32 under autocast; predictions of (B * M, D) are the same."""
    call = make_call(name, device)
    eager = call.outcome()
    with torch.autocast(device, torch.bfloat16):
        inside = call.outcome()
    assert_same(inside, eager)
    assert inside[0].dtype == torch.float32
    if call.op == "guided_loss":
        flat = call.outcome(lambda pred, *others: call.run(pred.flatten(0, 1), *others))
        assert_same(flat, eager)
