"""Forward, backward and update of a step as one CUDA graph: no kernel of them is launched by itself.

It pays where the host can't launch kernels as fast as the GPU takes them: small batches, small students, slow hosts.
What the step reads lies at fixed places, filled before each replay; what it leaves is overwritten by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mvp_fast.errors import ConfigError

WARM_UP = 3
"""Steps taken as usual before the capture: the optimizer makes its state, libraries choose algorithms."""
OPTIMIZERS = ("adamw", "adam")
"""torch's fused ones, which take their learning rate and count their steps on the device."""

Parts = Sequence[Sequence[Tensor]]  # the tensors of each micro-batch
Work = Callable[[], tuple[Tensor, ...]]


class StepGraph:
    """`function(parts)` captured at the first `run`, replayed from then on.

    The function must do all its work on the current stream, the same for any values, without waiting for the device.
    It may change tensors that live outside, such as weights; the capture itself changes none.

    Args:
        function: from the tensors of all micro-batches to those that a step leaves.
        parts: how many micro-batches there are.
        capture: makes of some work its replay.

    Attributes:
        replays: calls of `run` so far.
    """

    def __init__(
        self,
        function: Callable[[Parts], tuple[Tensor, ...]],
        parts: int,
        capture: Callable[[Work], Work] | None = None,
    ) -> None:
        self._function, self._capture = function, capture or capture_on_gpu
        self._parts: list[list[Tensor]] = [[] for _ in range(parts)]
        self._replay: Work | None = None
        self.replays = 0

    def load(self, part: int, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of a micro-batch to their places; shapes and types are those of the first time."""
        static = self._parts[part]
        if not static:
            static.extend(tensor.clone() for tensor in tensors)
            return
        for mine, given in zip(static, tensors, strict=True):
            mine.copy_(given, non_blocking=True)

    def run(self) -> tuple[Tensor, ...]:
        """Take the step with what was loaded; copies of what it leaves."""
        if self._replay is None:
            self._replay = self._capture(lambda: self._function(self._parts))
        self.replays += 1
        return tuple(tensor.clone() for tensor in self._replay())


def capture_on_gpu(work: Work) -> Work:
    """Capture work on the current GPU; what is returned replays it on the caller's stream."""
    caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # a capture may not be of the default stream
    stream.wait_stream(caller)
    graph = torch.cuda.CUDAGraph()
    # Other threads load data meanwhile: what they allocate and copy is no business of this capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        left = work()
    caller.wait_stream(stream)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return left

    return replay


def prepare(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let the optimizer read its learning rate on the device, so that a replay sees it change."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)


def check(optimizer: str, world: int) -> None:
    """ConfigError where a step can't be captured."""
    if world > 1:
        raise ConfigError(
            "A step of several ranks is not captured: they exchange gradients in it",
            where="train.step-graph",
            fix="Leave it off with several ranks",
        )
    if optimizer.lower() not in OPTIMIZERS:
        raise ConfigError(
            f"The optimizer `{optimizer}` can't be captured in a CUDA graph",
            where="train.step-graph",
            fix=f"Choose {' or '.join(OPTIMIZERS)}, or leave train.step-graph off",
        )
