"""Whether the Triton kernels can run here. Importing this imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

INTERPRET = "TRITON_INTERPRET"
OLDEST = (8, 0)  # compute capability: the first with bfloat16


def interpreting() -> bool:
    """Whether Triton was, or will be, told to run its kernels in its interpreter."""
    return os.environ.get(INTERPRET, "0").lower() in ("1", "true", "yes", "on", "y")


def triton_obstacle(device_type: str) -> str:
    """What keeps the Triton kernels from running on this kind of device; "" where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cpu":
        return "" if interpreting() else f"only Triton's interpreter runs there: set {INTERPRET}=1 before the start"
    if device_type != "cuda":
        return "Triton kernels run on CUDA devices"
    return _cuda_obstacle()


@functools.cache
def _cuda_obstacle() -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        return f"{torch.cuda.get_device_name()} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return ""


def triton_is_automatic(device_type: str) -> bool:
    """The interpreter is for tests: it has to be asked for."""
    return device_type == "cuda" and not interpreting()
