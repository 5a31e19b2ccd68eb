"""Which implementation runs: by argument, by environment, never silently another one; also under torch.compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import KernelUnavailable, dispatch, reference, registry

OPS = ["cosine_loss", "guided_loss", "masked_gather", "patchify", "token_norm"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No request by the environment, an empty record, and the registry as it was afterwards."""
    monkeypatch.delenv("MVP_KERNELS", raising=False)
    monkeypatch.setattr(registry, "_registered", {op: dict(found) for op, found in registry._registered.items()})
    mvp_kernels.reset_record()
    yield
    mvp_kernels.reset_record()


def call(op: str, impl: str = "auto") -> Tensor:
    x, index = torch.randn(2, 4, 8), torch.tensor([[0, -1], [3, 2]])
    return {
        "masked_gather": lambda: dispatch.masked_gather(x, index, impl=impl),
        "token_norm": lambda: dispatch.token_norm(x, "layernorm", impl=impl),
        "cosine_loss": lambda: dispatch.cosine_loss(x, x + 1, impl=impl),
        "guided_loss": lambda: dispatch.guided_loss(x[:, :2], x, index, impl=impl),
        "patchify": lambda: dispatch.patchify(
            torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 2, (0.5,) * 3, (0.5,) * 3, impl=impl
        ),
    }[op]()


def fake_triton(calls: list[str], obstacle: str = "") -> None:
    """Register an implementation of token_norm under Triton's name."""

    def norm(x: Tensor, kind: str, eps: float) -> Tensor:
        calls.append(kind)
        return reference.token_norm(x, kind, eps)

    registry.register("token_norm", "triton", norm, lambda device_type: obstacle)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_reference_runs_and_is_recorded(op: str, impl: str) -> None:
    assert mvp_kernels.last_used(op) is None
    call(op, impl)
    assert mvp_kernels.record() == {op: "reference"}
    assert mvp_kernels.last_used(op) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_a_request_that_cannot_be_met_raises(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"there is no triton implementation of {op}: ask for auto or reference"
    with pytest.raises(KernelUnavailable, match=message):
        call(op, "triton")
    monkeypatch.setenv("MVP_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match=message):
        call(op)
    assert mvp_kernels.record() == {}


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVP_KERNELS", "triton")
    call("token_norm", "reference")
    assert mvp_kernels.record() == {"token_norm": "reference"}
    monkeypatch.setenv("MVP_KERNELS", "")
    call("token_norm")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'cuda', not one of auto, triton, reference"):
        call("token_norm", "cuda")
    monkeypatch.setenv("MVP_KERNELS", "fast")
    with pytest.raises(KernelUnavailable, match="MVP_KERNELS is 'fast', not one of auto, triton, reference"):
        call("token_norm")
    with pytest.raises(ValueError, match="'fast', not one of triton, reference"):
        registry.register("token_norm", "fast", reference.token_norm)


def test_one_registration_adds_an_implementation() -> None:
    calls: list[str] = []
    fake_triton(calls)
    call("token_norm")
    call("token_norm", "triton")
    assert calls == ["layernorm", "layernorm"]
    assert mvp_kernels.last_used("token_norm") == "triton"
    call("token_norm", "reference")
    assert len(calls) == 2
    assert mvp_kernels.last_used("token_norm") == "reference"
    assert mvp_kernels.resolve("auto", "cpu") == "reference (token_norm triton)"


def test_auto_steps_over_an_obstacle_and_a_request_does_not() -> None:
    calls: list[str] = []
    fake_triton(calls, obstacle="it needs a GPU")
    call("token_norm")
    assert calls == []
    assert mvp_kernels.last_used("token_norm") == "reference"
    with pytest.raises(KernelUnavailable, match="triton implementation of token_norm can't run on cpu: it needs a GPU"):
        call("token_norm", "triton")


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mvp_kernels.resolve() == "reference"
    assert mvp_kernels.resolve("reference", "cuda") == "reference"
    with pytest.raises(KernelUnavailable):
        mvp_kernels.resolve("triton", "cuda")
    monkeypatch.setenv("MVP_KERNELS", "triton")
    with pytest.raises(KernelUnavailable):
        mvp_kernels.resolve()
    assert mvp_kernels.record() == {}  # asking runs nothing


@pytest.mark.parametrize("kind", ["l2", "layernorm", "none"])
def test_compile_takes_the_whole_graph(kind: str) -> None:
    """One graph, the same values and gradients as eager, and the record tells what was compiled in."""
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    weight = torch.randn(5, 48, requires_grad=True)
    pred, index = torch.randn(2, 3, 5), torch.tensor([[0, 3, -1], [2, 2, 1]])

    def loss(weight: Tensor, images: Tensor, index: Tensor) -> Tensor:
        tokens = dispatch.patchify(images, 4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) @ weight.T
        each = dispatch.masked_gather(dispatch.token_norm(tokens, kind), index)
        return dispatch.guided_loss(pred, tokens, index, kind) + dispatch.cosine_loss(pred, each)

    eager = loss(weight, images, index)
    (eager_gradient,) = torch.autograd.grad(eager, weight)
    mvp_kernels.reset_record()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(weight, images, index)
    (gradient,) = torch.autograd.grad(compiled, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradient, eager_gradient)
    assert mvp_kernels.record() == dict.fromkeys(OPS, "reference")


def test_compile_honours_a_request() -> None:
    torch.compiler.reset()
    step = torch.compile(lambda x: dispatch.token_norm(x, impl="triton"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="no triton implementation of token_norm"):
        step(torch.randn(2, 3))


def test_the_package_needs_torch_alone() -> None:
    code = "import sys, mvp_kernels; print([n for n in ('mvp_fast', 'timm', 'open_clip') if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
