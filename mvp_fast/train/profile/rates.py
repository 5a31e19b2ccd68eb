"""What this device does when it has nothing but a matrix product, or nothing but a copy, to do: the ceilings.

They are measured in the same run as the steps, right after them, so that clocks and neighbours are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

# A few milliseconds each; on a CPU, tens of them.
SIDE = {"cpu": 512, "cuda": 8192}
BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
LEAST_SIDE = 1024
ROUNDS, LONGEST = 9, 1.0  # seconds: a CPU without instructions for bf16 takes its time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """Medians over at most ROUNDS rounds.

    Attributes:
        matmul: floating-point operations a second (two a multiply-add) of a square product, by precision.
        copy: bytes a second of a copy on the device, read and written.
        upload: bytes a second of a copy from pinned memory to the GPU; None on a CPU.
    """

    matmul: dict[str, float]
    copy: float
    upload: float | None = None


def measure_rates(device: torch.device) -> Rates:
    """Measure them: some hundred milliseconds, and up to 2 GiB on a GPU, or less where it has less left.

    Raises:
        torch.OutOfMemoryError: not even a small product fits beside the run.
    """
    side, size = SIDE[device.type], BYTES[device.type]
    while True:
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what the steps left to torch alone
            return _measure(device, side, size)
        except torch.OutOfMemoryError:
            if side <= LEAST_SIDE:
                raise
            side, size = side // 2, size // 4


@torch.no_grad()
def _measure(device: torch.device, side: int, size: int) -> Rates:
    matmul = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        matmul[name] = 2 * side**3 / _median(device, partial(torch.mm, a, b, out=out))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _median(device, partial(target.copy_, source))
    if device.type == "cpu":
        return Rates(matmul, copy)
    pinned = torch.ones(size // 4, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(pinned, device=device)
    return Rates(matmul, copy, pinned.numel() / _median(device, partial(there.copy_, pinned, non_blocking=True)))


def _median(device: torch.device, work: Callable[[], object]) -> float:
    work()  # the first call touches the memory, and chooses a kernel
    found: list[float] = []
    while len(found) < ROUNDS and sum(found) < LONGEST:
        found.append(_seconds(device, work))
    return sorted(found)[len(found) // 2]


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
