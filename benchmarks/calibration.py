"""The calibration arm: a matrix product and a copy, timed beside every round.

They touch no code of this project. Where they differ between two things that are compared, the machine has changed, not
the code. On a GPU they also give the rates that shares are stated of.
"""

from __future__ import annotations

import time

import torch

# Sides and bytes that take a few milliseconds: long enough to time, short enough to stand beside every round.
SIZES = {"cpu": (512, 1 << 25), "cuda": (8192, 1 << 29)}


class Calibration:
    """A matrix product and a copy on a device.

    Attributes:
        flops: of the product.
        bytes: read and written by the copy.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        side, size = SIZES[device]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.a, self.b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.product = torch.empty_like(self.a)
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.copy = torch.empty_like(self.source)
        self.flops, self.bytes = 2 * side**3, 2 * size
        self.round()  # the first one touches the memory

    def round(self) -> dict[str, float]:
        """Seconds of the product and of the copy."""
        return {
            "matmul": self._timed(lambda: torch.mm(self.a, self.b, out=self.product)),
            "copy": self._timed(lambda: self.copy.copy_(self.source)),
        }

    def _timed(self, work: object) -> float:
        assert callable(work)
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
