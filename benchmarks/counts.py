"""What can be counted exactly, and so compared exactly: operations, kernel launches, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Counts:
    """Of one round.

    Attributes:
        operations: that torch's dispatcher ran, views left out.
        written_bytes: the size of their results: the memory they asked for, in all.
        launches: kernels and copies on the GPU; None on the CPU.
        peak_bytes: on the GPU above what was resident; None on the CPU.
    """

    operations: int
    written_bytes: int
    launches: int | None = None
    peak_bytes: int | None = None

    def as_dict(self) -> dict[str, int]:
        """Those that were counted."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.written = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.operations += 1
            held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                    self.written += tensor.untyped_storage().nbytes()
        return result


def count(work: Callable[[], Any], device: str) -> Counts:
    """Count one call of `work`. It has run before: what is made once is not counted."""
    launches = peak = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - resident
        launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    with _Watch() as watch:
        work()
    return Counts(watch.operations, watch.written, launches, peak)
