"""CUDA graphs: a function of tensors captured once and replayed, without launching its kernels one by one.

A replay reads inputs and writes outputs at fixed places. Several captures of one function take turns, so that the
outputs of one call can be read while the next one computes; they share the memory in between, which is safe because
they follow each other on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # runs before a capture: libraries choose algorithms and take workspaces, Triton compiles


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class GraphedFunction:
    """`function(*tensors) -> tensors`, captured at the first call; tensors of other shapes are computed as usual.

    The function must do all its work on the current stream, the same for any values, without waiting for the device.

    Args:
        function: takes and returns tensors of one GPU; run without gradients.
        turns: captures that take turns: what a call returns is overwritten by the turns-th call after it.

    Attributes:
        replays: calls that were answered by a replay.
        others: calls that were not.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], turns: int = 2) -> None:
        self.function, self.turns = function, turns
        self.replays = self.others = 0
        self._captures: list[_Capture] = []

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self._captures:
            self._capture(inputs)
        if not _alike(inputs, self._captures[0].inputs):
            self.others += 1
            return self.function(*inputs)
        turn = self._captures[self.replays % self.turns]
        for mine, given in zip(turn.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        turn.graph.replay()
        self.replays += 1
        return turn.outputs

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        caller = torch.cuda.current_stream(inputs[0].device)
        stream = torch.cuda.Stream(inputs[0].device)  # a capture may not be of the default stream
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            static = [tuple(tensor.clone() for tensor in inputs) for _ in range(self.turns)]
            for _ in range(WARM_UP):
                self.function(*static[0])
            pool = None
            for mine in static:
                graph = torch.cuda.CUDAGraph()
                # Other threads load data meanwhile: what they allocate and copy is no business of this capture.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = self.function(*mine)
                pool = graph.pool()
                self._captures.append(_Capture(graph, mine, outputs))
        caller.wait_stream(stream)


def _alike(given: Sequence[Tensor], static: Sequence[Tensor]) -> bool:
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(given, static, strict=True))
