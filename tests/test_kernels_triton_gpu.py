"""What only a GPU can show: CUDA graphs, no wait of the host for the device, assertions on it, the same bits at size.

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import mvp_kernels
from tests.kernel_cases import CALLS, GPU, Call, Shape, assert_same, distinct_index, make_call, surroundings

__all__ = ["surroundings"]

pytestmark = GPU


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, an operation for which the host would wait for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run`, and the memory that its replay writes the results to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and loaded before
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def other_inputs(call: Call) -> tuple[Tensor, ...]:
    """Other numbers of the same shapes; the index is that of other images."""
    return tuple(x.flip(0) if x.dtype == torch.int64 else x.detach().flip(0).roll(1, -1) for x in call.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_graph_capture(name: str, dtype: torch.dtype) -> None:
    """Forward and backward in one graph; replayed, it works on what is then in its inputs."""
    call = make_call(name, "cuda", dtype)
    first = call.outcome()
    graph, results = captured(call.outcome)
    for result in results:
        result.fill_(7)
    graph.replay()
    assert_same(results, first)
    for x, new in zip(call.inputs, other_inputs(call), strict=True):
        x.data.copy_(new)
    graph.replay()
    replayed = [result.clone() for result in results]
    assert_same(replayed, call.outcome())
    assert not all(torch.equal(a, b) for a, b in zip(replayed, first, strict=True))
    assert mvp_kernels.record() == {call.op: "triton"}


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name: str, debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the checks of debug mode too."""
    monkeypatch.setenv("MVP_KERNELS_DEBUG", debug)
    call = make_call(name, "cuda")
    want = call.outcome()
    with waiting_is_an_error():
        outcome = call.outcome()
    assert_same(outcome, want)
    assert mvp_kernels.record() == {call.op: "triton"}


def test_an_index_out_of_range_is_nan_and_no_wait() -> None:
    """The host doesn't look at an index on the device; the kernels do."""
    x_BND = torch.randn(2, 5, 8, device="cuda", requires_grad=True)
    pred_BMD = torch.randn(2, 3, 8, device="cuda", requires_grad=True)
    index_BM = torch.tensor([[0, 5, -1], [-2, 3, 1 << 40]], device="cuda")
    wrong_BM = torch.tensor([[False, True, False], [True, False, True]], device="cuda")

    def run() -> list[Tensor]:
        out_BMD = mvp_kernels.masked_gather(x_BND, index_BM)
        loss_BM = mvp_kernels.guided_loss(pred_BMD, x_BND.detach(), index_BM, reduction="none")
        grads = torch.autograd.grad([out_BMD.nansum(), loss_BM.nansum()], [x_BND, pred_BMD])
        return [out_BMD, loss_BM, *grads]

    run()
    with waiting_is_an_error():
        out_BMD, loss_BM, grad_BND, grad_BMD = run()
    assert torch.equal(out_BMD.isnan(), wrong_BM[..., None].expand_as(out_BMD))
    assert torch.equal(loss_BM.isnan(), wrong_BM)
    assert torch.equal(grad_BMD.isnan(), wrong_BM[..., None].expand_as(grad_BMD))
    want_BND = torch.zeros_like(grad_BND)
    want_BND[0, 0] = want_BND[1, 3] = 1
    assert torch.equal(grad_BND, want_BND)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[[0, 5]]", "an index is out of range"),
        ("[[1, 1]]", "a row of the index holds a token twice"),
        ("[[1, 2]]", ""),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_debug_mode_asserts_on_the_device(impl: str, index: str, message: str) -> None:
    """In a process of its own: after a failed assertion the device is of no use to it."""
    code = "\n".join(
        [
            "import torch, mvp_kernels",
            f"index = torch.tensor({index}, device='cuda')",
            f"mvp_kernels.masked_gather(torch.zeros(1, 5, 4, device='cuda'), index, impl={impl!r})",
            "print('the host went on')",
            "torch.cuda.synchronize()",
            "print('the device too')",
        ]
    )
    environment = {**os.environ, "MVP_KERNELS_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if not message:
        assert done.stdout.splitlines() == ["the host went on", "the device too"]
        assert done.returncode == 0
        return
    assert done.returncode != 0
    assert "the device too" not in done.stdout
    assert "device-side assert" in done.stderr
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 768])
def test_two_runs_give_the_same_bits_at_size(width: int, dtype: torch.dtype) -> None:
    """Thousands of programs, in whatever order they come to run."""
    shape = Shape(64, 197, 76, width)
    x_BND = torch.randn(64, 197, width, device="cuda").to(dtype).requires_grad_()
    pred_BMD, other_BMD = (torch.randn(64, 76, width, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    index_BM, weight_BM = distinct_index(shape, "cuda"), torch.rand(64, 76, device="cuda")
    calls = [
        Call("masked_gather", mvp_kernels.masked_gather, (x_BND, index_BM)),
        Call("token_norm", lambda x: mvp_kernels.token_norm(x, "layernorm"), (x_BND,)),
        Call("cosine_loss", mvp_kernels.cosine_loss, (pred_BMD, other_BMD, weight_BM)),
        Call("guided_loss", mvp_kernels.guided_loss, (pred_BMD, x_BND.detach(), index_BM)),
        Call("guided_loss", mvp_kernels.guided_loss, (pred_BMD, x_BND, index_BM)),
    ]
    for call in calls:
        first = call.outcome()
        for _ in range(3):
            assert_same(call.outcome(), first)
        assert mvp_kernels.last_used(call.op) == "triton"
