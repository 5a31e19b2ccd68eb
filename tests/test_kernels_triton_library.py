"""The operators as others see them: torch.library, compilers, tracers, fake tensors, and gradients of gradients.

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mvp_kernels
from mvp_kernels import cosine_loss, guided_loss, masked_gather, patchify, token_norm
from mvp_kernels.operators import score
from tests.kernel_cases import CALLS, DEVICES, GPU, IMPLS, assert_same, make_call, surroundings

__all__ = ["surroundings"]

EPS = 1e-6


def opcheck_arguments(op: str, device: str) -> list[tuple[Any, ...]]:
    """Arguments of an operator of the library, each way it is called."""
    x_BND, target_BND = torch.randn(2, 3, 7, 13, device=device)
    pred_MD, other_MD = torch.randn(2, 12, 13, device=device)
    index_BM = torch.tensor([[0, 3, -1, 6], [-1, -1, 2, 1], [6, 5, 4, 3]], device=device)
    weight_M, losses_M = torch.rand(2, 12, device=device)
    images_BHWC = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8, device=device)
    total, none, one = torch.ones(score.TOTALS, device=device), torch.empty(0, device=device), losses_M[0].clone()

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    q, k, v, out = torch.randn(4, 2, 2, 18, 5, device=device)
    bias, table = torch.randn(2, 18, 18, device=device), torch.randn(7, 2, device=device)
    pairs, taken = torch.randint(0, 7, (18, 18), device=device), torch.tensor([[17, -1], [0, 5]], device=device)
    lse, few = torch.randn(2, 2, 18, device=device) + 9, torch.randn(2, 2, 2, device=device) + 9
    qkv, out_BNHD = torch.randn(2, 18, 3, 2, 5, device=device), torch.randn(2, 18, 2, 5, device=device)

    return {
        "relpos_bias": [(leaf(table), pairs)],
        "relpos_bias_backward": [(bias, pairs, 7)],
        "relpos_attention": [
            (leaf(q), leaf(k), leaf(v), leaf(bias), None, 0.5),
            (leaf(q), leaf(k), leaf(v), None, None, 0.5),
            (leaf(q[:, :, :2]), k, v, leaf(bias), taken, 0.5),
        ],
        "relpos_attention_backward": [
            (out, q, k, v, bias, None, out, lse, 0.5, True),
            (out, q, k, v, bias, None, out, lse, 0.5, False),
            (out[:, :, :2], q[:, :, :2], k, v, bias, taken, out[:, :, :2], few, 0.5, True),
        ],
        "relpos_attention_qkv": [(leaf(qkv), leaf(bias), 0.5), (leaf(qkv), None, 0.5)],
        "relpos_attention_qkv_backward": [
            (out_BNHD, qkv, bias, out_BNHD, lse, 0.5, True),
            (out_BNHD, qkv, None, out_BNHD, lse, 0.5, False),
        ],
        "masked_gather": [(leaf(x_BND), index_BM)],
        "masked_gather_backward": [(torch.randn(3, 4, 13, device=device), index_BM, 7)],
        "token_norm": [(leaf(x_BND), "l2", EPS), (leaf(x_BND), "layernorm", EPS)],
        "token_norm_backward": [(x_BND, target_BND, kind, EPS) for kind in ("l2", "layernorm")],
        "cosine_loss": [
            (leaf(pred_MD), leaf(other_MD), weight_M, True, EPS),
            (leaf(pred_MD), other_MD, None, False, EPS),
        ],
        "cosine_loss_backward": [
            (one, pred_MD, other_MD, weight_M, total, True, EPS),
            (losses_M, pred_MD, other_MD, None, none, False, EPS),
        ],
        "guided_loss": [
            (leaf(pred_MD), target_BND, index_BM, "l2", True, EPS),
            (leaf(pred_MD), target_BND, index_BM, "layernorm", False, EPS),
            (leaf(pred_MD), other_MD, None, "layernorm", True, EPS),
        ],
        "guided_loss_backward": [
            (one, pred_MD, target_BND, index_BM, total, "l2", True, EPS),
            (losses_M, pred_MD, other_MD, None, none, "layernorm", False, EPS),
        ],
        "patchify": [(images_BHWC, 4, [0.5] * 6, [0.2] * 6, ["float32", "bfloat16"])],
    }[op]


LIBRARY_OPS = [
    "cosine_loss",
    "cosine_loss_backward",
    "guided_loss",
    "guided_loss_backward",
    "masked_gather",
    "masked_gather_backward",
    "patchify",
    "relpos_attention",
    "relpos_attention_backward",
    "relpos_attention_qkv",
    "relpos_attention_qkv_backward",
    "relpos_bias",
    "relpos_bias_backward",
    "token_norm",
    "token_norm_backward",
]


def test_every_operator_of_the_library_is_checked() -> None:
    names = torch._C._dispatch_get_all_op_names()
    assert sorted(n.removeprefix("mvp_kernels::") for n in names if n.startswith("mvp_kernels::")) == LIBRARY_OPS


@DEVICES
@pytest.mark.parametrize("op", LIBRARY_OPS)
def test_opcheck(device: str, op: str) -> None:
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes."""
    for arguments in opcheck_arguments(op, device):
        outcome = torch.library.opcheck(getattr(torch.ops.mvp_kernels, op).default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}
        assert len(outcome) == 4


@DEVICES
@IMPLS
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(device: str, impl: str, name: str) -> None:
    """In float64, along random directions."""
    call = make_call(name, device, torch.float64, impl)
    if name == "patchify":
        assert not any(out.requires_grad for out in call.outcome())
        return
    assert torch.autograd.gradcheck(call.run, call.inputs, fast_mode=True)
    assert mvp_kernels.record() == {call.op: impl}


def check_compiled(name: str, device: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """One graph; values and gradients as in eager mode."""
    call = make_call(name, device, dtype)
    eager = call.outcome()
    mvp_kernels.reset_record()
    torch.compiler.reset()
    compiled = call.outcome(torch.compile(call.run, fullgraph=True, backend=backend))
    assert_same(compiled, eager, exact=False)
    assert mvp_kernels.record() == {call.op: "triton"}


@DEVICES
@pytest.mark.parametrize("name", CALLS)
def test_compile(device: str, name: str) -> None:
    check_compiled(name, device, "aot_eager")


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_compile_by_inductor(name: str, dtype: torch.dtype) -> None:
    check_compiled(name, "cuda", "inductor", dtype)


def composition(images: Tensor, weight: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    """All five in one function, with other operations between them."""
    (tokens, shifted) = patchify(
        images,
        4,
        [mvp_kernels.Normalization((0.4,) * 3, (0.2,) * 3), mvp_kernels.Normalization((0.0,) * 3, (1.0,) * 3)],
        impl="triton",
    )
    pred = masked_gather((tokens + shifted) @ weight.T, index, impl="triton")
    target = token_norm(masked_gather(teacher, index, impl="triton"), "layernorm", impl="triton")
    guided = guided_loss(pred * 2, teacher, index, "layernorm", impl="triton")
    return 3 * guided + cosine_loss(pred, target, (index >= 0).float(), "none", impl="triton").square().sum()


def composition_inputs(device: str, images: int, taken: int, width: int) -> tuple[Tensor, ...]:
    index = torch.stack([torch.randperm(6)[:taken] for _ in range(images)])
    index[0, 0] = -1
    return (
        torch.randint(0, 256, (images, 8, 12, 3), dtype=torch.uint8, device=device),
        torch.randn(width, 48, device=device, requires_grad=True),
        torch.randn(images, 6, width, device=device),
        index.to(device),
    )


@DEVICES
def test_compile_takes_all_of_them_at_any_size(device: str) -> None:
    """One graph, and no second one for other sizes. The first sizes differ, or the compiler would take them for one."""
    torch.compiler.reset()
    compiled = torch.compile(composition, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, sizes in enumerate([(5, 4, 10), (2, 3, 24), (7, 6, 9)]):
        inputs = composition_inputs(device, *sizes)
        eager = composition(*inputs)
        (eager_grad,) = torch.autograd.grad(eager, inputs[1])
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            loss = compiled(*inputs)
        (grad,) = torch.autograd.grad(loss, inputs[1])
        torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, eager_grad, rtol=1e-5, atol=1e-5)
    assert set(mvp_kernels.record().values()) == {"triton"}


class Seen(TorchDispatchMode):
    """Notes this package's operators as they pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mvp_kernels":
            self.names.add(func._schema.name.removeprefix("mvp_kernels::"))
        return func(*args, **(kwargs or {}))


@DEVICES
@pytest.mark.parametrize("name", CALLS)
def test_a_tracer_sees_operators(device: str, name: str) -> None:
    """Whoever looks on (a profiler's counter, selective checkpointing) sees one forward and one backward operator."""
    call = make_call(name, device)
    eager = call.outcome()
    with Seen() as seen:
        traced = call.outcome()
    assert_same(traced, eager, exact=False)
    ops = ["masked_gather", "token_norm", "cosine_loss"] if name == "guided_loss target" else [call.op]
    backward = [] if name == "patchify" else [f"{op}_backward" for op in ops]
    assert seen.names == {*ops, *backward}


@DEVICES
@pytest.mark.parametrize("mode", ["inside the mode", "outside of it"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(device: str, name: str, dtype: torch.dtype, mode: str) -> None:
    """Shapes, types, strides and devices without a value."""
    call = make_call(name, device, dtype)
    real = call.outcome()
    fakes = FakeTensorMode()
    call = call._replace(inputs=tuple(fakes.from_tensor(x) for x in call.inputs))
    with fakes if mode == "inside the mode" else nullcontext():
        outcome = call.outcome()
    for fake, want in zip(outcome, real, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (want.shape, want.dtype, want.device)
        assert fake.stride() == want.stride()


DIFFERENTIABLE = [name for name in CALLS if name != "patchify"]


def second_derivative(loss: Tensor, x: Tensor) -> Tensor:
    """Of the gradient's square and of `x`: a way around the operator, along which autograd would find to `x`."""
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + x.sum(), x)
    return second


@DEVICES
@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_an_error(device: str, name: str, power: int) -> None:
    """Never a wrong one."""
    call = make_call(name, device, torch.float64)
    x = next(x for x in call.inputs if x.requires_grad)
    out = call.run(*call.inputs)
    assert isinstance(out, Tensor)
    if name == "masked_gather" and power == 1:  # linear: its gradient depends on nothing
        assert_same([second_derivative(out.sum(), x)], [torch.ones_like(x)])
        return
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second_derivative(out.pow(power).sum(), x)


@DEVICES
@pytest.mark.parametrize("op", [op for op in LIBRARY_OPS if op != "patchify" and not op.endswith("backward")])
def test_a_second_derivative_of_the_librarys_operator_is_an_error(device: str, op: str) -> None:
    arguments = opcheck_arguments(op, device)[0]
    out = getattr(torch.ops.mvp_kernels, op)(*arguments)
    loss = (out[0] if isinstance(out, tuple) else out).pow(3).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second_derivative(loss, arguments[0])


@DEVICES
@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "relpos_attention plain"])  # torch's own has none
def test_the_reference_has_a_second_derivative(device: str, name: str) -> None:
    """What an error of Triton's sends people to."""
    call = make_call(name, device, torch.float64, "reference")
    assert torch.autograd.gradgradcheck(call.run, call.inputs, fast_mode=True)
