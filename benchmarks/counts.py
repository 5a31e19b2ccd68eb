"""What can be counted exactly, and so compared exactly: operations, kernel launches, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """Of one round.

    Attributes:
        operations: that torch's dispatcher ran; views and whatever else only hands on memory left out. None where code
            of torch.compile ran: the dispatcher does not see into it.
        written_bytes: new memory that their results took, in all; what is written in place is not new. None as above.
        launches: kernels, copies and fills on the GPU; None on the CPU.
        peak_bytes: on the GPU above what was resident; None on the CPU.
    """

    operations: int | None
    written_bytes: int | None
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
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
        new = {address: size for address, size in new.items() if address not in held}
        if new or not results or op._schema.is_mutable:  # otherwise it has only handed on memory, as views do
            self.operations += 1
            self.written += sum(new.values())
        return result


def count(work: Callable[[], Any], device: str, compiled: bool = False) -> Counts:
    """Count one call of `work`. It has run before: what is made once is not counted.

    Args:
        work: torch code.
        device: "cpu" or "cuda".
        compiled: whether parts of it went through torch.compile. Under the dispatch mode that counts operations such
            code falls back to eager, so that they are not counted.
    """
    launches = peak = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - resident
        on_gpu = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        launches = sum(not e.is_user_annotation for e in on_gpu)  # torch's optimizers mark their steps
    if compiled:
        return Counts(None, None, launches, peak)
    with _Watch() as watch:
        work()
    return Counts(watch.operations, watch.written, launches, peak)


def flops_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`, two a multiply-add.

    For work in plain torch. Attention is taken apart into its products, because the counter knows the fused kernels of
    GPUs alone, and not the short cut of torch's MultiheadAttention.
    """
    short_cut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(short_cut)
    return int(counter.get_total_flops())
