"""Which implementation runs: by argument, by environment, never silently another one; also under torch.compile.

Where there is no GPU, Triton's interpreter is at hand (see conftest.py), so that a request for triton can be met on the
CPU; `auto` leaves it alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mvp_kernels
from mvp_kernels import KernelUnavailable, Normalization, dispatch, reference, registry
from tests.kernel_cases import GPU, surroundings

__all__ = ["surroundings"]

OPS = ["cosine_loss", "guided_loss", "masked_gather", "patchify", "token_norm"]
ATTENTION = ["relpos_attention", "relpos_attention_qkv", "relpos_bias"]
ALL = [*OPS, *ATTENTION]
ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled: not for the CPU")
GREY = Normalization((0.5,) * 3, (0.5,) * 3)


def call(op: str, impl: str = "auto", device: str = "cpu") -> Any:
    x, index = torch.randn(2, 4, 8, device=device), torch.tensor([[0, -1], [3, 2]], device=device)
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device=device)
    qkv, table, pairs = torch.randn(1, 5, 3, 2, 4), torch.randn(3, 2), torch.zeros(5, 5, dtype=torch.int64)
    qkv, table, pairs = qkv.to(device), table.to(device), pairs.to(device)
    heads = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return {
        "relpos_attention": lambda: dispatch.relpos_attention(*heads, impl=impl),
        "relpos_attention_qkv": lambda: dispatch.relpos_attention_qkv(qkv, impl=impl),
        "relpos_bias": lambda: dispatch.relpos_bias(table, pairs, impl=impl),
        "masked_gather": lambda: dispatch.masked_gather(x, index, impl=impl),
        "token_norm": lambda: dispatch.token_norm(x, "layernorm", impl=impl),
        "cosine_loss": lambda: dispatch.cosine_loss(x, x + 1, impl=impl),
        "guided_loss": lambda: dispatch.guided_loss(x[:, :2], x, index, impl=impl),
        "patchify": lambda: dispatch.patchify(images, 2, [GREY], impl=impl),
    }[op]()


def fake_triton(calls: list[str], obstacle: str = "", automatic: bool = True, op: str = "token_norm") -> None:
    """Register an implementation under Triton's name, which notes that it was loaded and called."""

    def load() -> Callable[..., Any]:
        calls.append("loaded")

        def run(*args: Any) -> Any:
            calls.append("called")
            return getattr(reference, op)(*args)

        return run

    registry.register(op, "triton", load, lambda device_type: obstacle, lambda device_type: automatic)


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_reference_runs_on_the_cpu_and_is_recorded(op: str, impl: str) -> None:
    """Also where the interpreter could run Triton's."""
    assert mvp_kernels.last_used(op) is None
    call(op, impl)
    assert mvp_kernels.record() == {op: "reference"}
    assert mvp_kernels.last_used(op) == "reference"


@ON_THE_CPU
@pytest.mark.parametrize("op", ALL)
def test_triton_runs_where_it_is_asked_for(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = call(op)
    call(op, "triton")
    assert mvp_kernels.record() == {op: "triton"}
    mvp_kernels.reset_record()
    monkeypatch.setenv("MVP_KERNELS", "triton")
    assert type(call(op)) is type(want)
    assert mvp_kernels.record() == {op: "triton"}


@GPU
@pytest.mark.parametrize("op", ALL)
def test_triton_is_automatic_on_the_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call(op, device="cuda")
    assert mvp_kernels.record() == {op: "triton"}
    assert mvp_kernels.resolve() == "triton"
    monkeypatch.setenv("MVP_KERNELS", "reference")
    call(op, device="cuda")
    assert mvp_kernels.record() == {op: "reference"}
    assert mvp_kernels.resolve() == "reference"


@pytest.mark.parametrize("op", ALL)
def test_a_request_that_cannot_be_met_raises(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_triton([], "it needs a wheel", op=op)
    message = f"the triton implementation of {op} can't run on cpu: it needs a wheel"
    with pytest.raises(KernelUnavailable, match=message):
        call(op, "triton")
    monkeypatch.setenv("MVP_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match=message):
        call(op)
    del registry._registered[op]["triton"]
    with pytest.raises(
        KernelUnavailable, match=f"there is no triton implementation of {op}: ask for auto or reference"
    ):
        call(op, "triton")
    assert mvp_kernels.record() == {}


def test_without_the_interpreter_triton_is_refused_on_the_cpu() -> None:
    """In a process of its own, for the variable is read once; and importing the package loads no kernel."""
    code = "\n".join(
        [
            "import sys, torch, mvp_kernels as k",
            "print([n for n in ('mvp_kernels.operators', 'mvp_fast', 'timm', 'open_clip') if n in sys.modules])",
            "print(k.resolve('auto', 'cpu'))",
            "x, i, u = torch.randn(2, 4, 8), torch.tensor([[0], [1]]), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)",
            "calls = [lambda p: k.masked_gather(x, i, impl=p), lambda p: k.token_norm(x, impl=p),",
            "    lambda p: k.cosine_loss(x, x, impl=p), lambda p: k.guided_loss(x, x, impl=p),",
            "    lambda p: k.patchify(u, 2, [((0.5,) * 3, (0.5,) * 3, torch.float32)], impl=p)]",
            "for call in calls:",
            "    try:",
            "        call('triton')",
            "    except k.KernelUnavailable as error:",
            "        print(error)",
            "    call('auto')",
            "print(sorted(k.record().items()))",
        ]
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded, resolved, *refused, record = done.stdout.splitlines()
    assert loaded == "[]"
    assert resolved == "reference"
    why = "can't run on cpu: only Triton's interpreter runs there: set TRITON_INTERPRET=1 before the start"
    order = ["masked_gather", "token_norm", "cosine_loss", "guided_loss", "patchify"]
    assert refused == [f"the triton implementation of {op} {why}" for op in order]
    assert record == str([(op, "reference") for op in OPS])


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVP_KERNELS", "triton")
    call("token_norm", "reference")
    assert mvp_kernels.record() == {"token_norm": "reference"}
    monkeypatch.setenv("MVP_KERNELS", "")
    call("token_norm")
    assert mvp_kernels.record() == {"token_norm": "reference"}


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'cuda', not one of auto, triton, reference"):
        call("token_norm", "cuda")
    monkeypatch.setenv("MVP_KERNELS", "fast")
    with pytest.raises(KernelUnavailable, match="MVP_KERNELS is 'fast', not one of auto, triton, reference"):
        call("token_norm")
    with pytest.raises(ValueError, match="'fast', not one of triton, reference"):
        registry.register("token_norm", "fast", lambda: reference.token_norm)


def test_one_registration_replaces_an_implementation() -> None:
    """Loaded when it is first chosen, once; the one before is forgotten, although it has run."""
    if not torch.cuda.is_available():
        call("token_norm", "triton")
    calls: list[str] = []
    fake_triton(calls)
    assert mvp_kernels.resolve("auto", "cpu") == "reference (token_norm triton)"
    assert calls == []
    call("token_norm")
    call("token_norm", "triton")
    assert calls == ["loaded", "called", "called"]
    assert mvp_kernels.last_used("token_norm") == "triton"
    call("token_norm", "reference")
    assert calls == ["loaded", "called", "called"]
    assert mvp_kernels.last_used("token_norm") == "reference"


@pytest.mark.parametrize(("obstacle", "automatic"), [("it needs a GPU", True), ("", False)])
def test_auto_steps_over_what_cannot_or_should_not_run(obstacle: str, automatic: bool) -> None:
    calls: list[str] = []
    fake_triton(calls, obstacle, automatic)
    call("token_norm")
    assert calls == []
    assert mvp_kernels.last_used("token_norm") == "reference"
    if obstacle:
        with pytest.raises(KernelUnavailable, match=obstacle):
            call("token_norm", "triton")
    else:
        call("token_norm", "triton")
        assert calls == ["loaded", "called"]


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mvp_kernels.resolve("auto", "cpu") == "reference"
    assert mvp_kernels.resolve() == ("triton" if torch.cuda.is_available() else "reference")
    assert mvp_kernels.resolve("reference", "cuda") == "reference"
    with pytest.raises(KernelUnavailable, match="Triton kernels run on CUDA devices"):
        mvp_kernels.resolve("triton", "mps")
    monkeypatch.setenv("MVP_KERNELS", "triton")
    assert mvp_kernels.resolve() == "triton"
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="torch finds no CUDA device"):
            mvp_kernels.resolve("auto", "cuda")
    assert mvp_kernels.record() == {}  # asking runs nothing


@pytest.mark.parametrize("kind", ["l2", "layernorm", "none"])
def test_compile_takes_the_whole_graph_of_the_reference(kind: str) -> None:
    """One graph, the same values and gradients as eager, and the record tells what was compiled in."""
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    weight = torch.randn(5, 48, requires_grad=True)
    pred, index = torch.randn(2, 3, 5), torch.tensor([[0, 3, -1], [2, 2, 1]])

    def loss(weight: Tensor, images: Tensor, index: Tensor) -> Tensor:
        (patches,) = dispatch.patchify(images, 4, [Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
        tokens = patches @ weight.T
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
    fake_triton([], "it needs a wheel")
    torch.compiler.reset()
    step = torch.compile(lambda x: dispatch.token_norm(x, impl="triton"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="it needs a wheel"):
        step(torch.randn(2, 3))
