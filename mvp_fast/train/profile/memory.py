"""Memory by part, in bytes: what a run holds, what a step adds, and a snapshot of it for torch's viewer."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from mvp_fast.train.build import PretrainRun
from mvp_fast.train.sharding import local_part

# Of allocations in a snapshot; the oldest make room. A step of a large model has some ten thousand.
SNAPSHOT_ENTRIES = 200_000


def resident(run: PretrainRun) -> dict[str, int]:
    """What the parts of a run hold on this rank, after a step; parts that it does not have are left out."""
    optimizer = [each for state in run.optimizer.state.values() for each in state.values()]
    parts = {
        "student weights": _bytes(run.student.parameters()),
        "gradients": _bytes(p.grad for p in run.student.parameters() if p.grad is not None),
        "optimizer state": _bytes(each for each in optimizer if isinstance(each, Tensor)),
        "averaged weights": _bytes(run.ema.parameters()) if run.ema is not None else 0,
        "teacher": _bytes([*run.teacher.parameters(), *run.teacher.buffers()]),
    }
    return {name: size for name, size in parts.items() if size}


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Two names of one tensor count once.
    each = {id(tensor): local_part(tensor) for tensor in tensors}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in each)


def of_process() -> dict[str, int]:
    """Of this process's memory on the host: what it has now, and the most that it had since it began."""
    # Kilobytes, but on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return {"process": pages * resource.getpagesize(), "process, most": peak}
    except OSError:
        return {"process, most": peak}


def of_step(device: torch.device, step: Callable[[], None]) -> dict[str, int]:
    """On a GPU: the peak, what the step added to what was there before it, and what torch has reserved."""
    if device.type != "cuda":
        step()
        return {}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "activations and buffers": peak - before,
        "peak": peak,
        "reserved": torch.cuda.memory_reserved(device),
        "free on the GPU": free,
        "GPU": total,
    }


def snapshot(device: torch.device, step: Callable[[], None], path: Path | None) -> None:
    """On a GPU: take a step, and write each of its allocations to `path`, for https://pytorch.org/memory_viz.

    Args:
        path: None to take the step alone, as the other ranks must.

    Raises:
        OSError: it can't be written.
    """
    if path is None:
        step()
        return
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    try:
        step()
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
