"""How a kernel is cut into programs: rows of values a program, and warps a program.

A program holds a tile of whole rows, so that it reads each once and has all that its sums need. The defaults give a
warp its rows for itself as long as it can hold them (up to 1,024 values): its sums are then shuffles, without shared
memory or barriers, and one-warp programs fill a multiprocessor with enough reads under way. What
`python -m mvp_kernels.tune` found on this machine is read from its file at the first launch and goes before them;
nothing is tried out while a kernel is being used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import triton

SCHEMA = 1
CACHE = "MVP_KERNELS_CACHE"
WARP_VALUES = 1024  # of a row, to a warp
TILE_BYTES = 2048  # to a warp; more would not stay in registers as float32
COPY_BYTES = 4096  # to a warp that only copies
COPIES = ("masked_gather", "masked_gather_backward")
MOST_ROWS, MOST_WARPS = 128, 16
INTERPRETED_VALUES = 1 << 16  # the interpreter's cost is by the program, not by the value


class Launch(NamedTuple):
    """Tokens a program, warps a program."""

    rows: int
    warps: int


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def launch_of(op: str, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch parameters of a kernel.

    Args:
        op: name of the kernel, such as `guided_loss`.
        width: values of a row.
        dtype: type of the values that are read or written most.
        device: where it runs; tuned parameters belong to a kind of GPU.
    """
    if interpreted():
        return Launch(max(1, INTERPRETED_VALUES // triton.next_power_of_2(max(width, 1))), 1)
    tuned = tuned_for(torch.cuda.get_device_name(device)).get((op, width, dtype.itemsize))
    return tuned or default_launch(op, width, dtype.itemsize)


def default_launch(op: str, width: int, itemsize: int) -> Launch:
    """Parameters from the row's size alone."""
    block = triton.next_power_of_2(max(width, 1))
    values = (COPY_BYTES if op in COPIES else TILE_BYTES) // itemsize
    return Launch(max(1, min(values // block, MOST_ROWS)), max(1, min(block // WARP_VALUES, MOST_WARPS)))


def cache_file(device_name: str) -> Path:
    """Where tuned parameters are: in $MVP_KERNELS_CACHE or ~/.cache/mvp_kernels, a file a kind of GPU and Triton."""
    folder = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvp_kernels"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(folder) / f"{slug}-triton{triton.__version__}.json"


@functools.cache
def tuned_for(device_name: str) -> dict[tuple[str, int, int], Launch]:
    """(kernel, width, bytes a value) -> what was found on this kind of GPU; empty where nothing was tuned.

    A file that can't be read is said once and left alone: the defaults are right too, if slower.
    """
    path = cache_file(device_name)
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, not {SCHEMA}")
        return {
            (entry["op"], entry["width"], entry["itemsize"]): Launch(int(entry["rows"]), int(entry["warps"]))
            for entry in document["launches"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"mvp_kernels can't use its tuned launch parameters in {path}: {error}. The defaults are used; write the"
            " file anew with `python -m mvp_kernels.tune`.",
            stacklevel=2,
        )
        return {}


def save_tuned(device_name: str, launches: dict[tuple[str, int, int], Launch]) -> Path:
    """Write what was found, beside and then renamed; later launches in this process use it too."""
    path = cache_file(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"op": op, "width": width, "itemsize": itemsize, **launch._asdict()}
        for (op, width, itemsize), launch in sorted(launches.items())
    ]
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps({"schema": SCHEMA, "device": device_name, "launches": entries}, indent=1) + "\n")
    beside.replace(path)
    tuned_for.cache_clear()
    return path
