"""How a kernel is cut into programs: rows of values a program, and warps a program.

A program holds a tile of whole rows, so that it reads each once and has all that its sums need. The defaults give a
warp its rows for itself as long as it can hold them (up to 1,024 values): its sums are then shuffles, without shared
memory or barriers, and one-warp programs fill a multiprocessor with enough reads under way. What
`python -m mvp_kernels.tune` found on this machine is read from its file at the first launch and goes before them;
nothing is tried out while a kernel is being used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

SCHEMA = 1
CACHE = "MVP_KERNELS_CACHE"
ROW_BYTES = 4096  # of a row, to a warp, as float32 or float64
TILE_BYTES = 2048  # to a warp; more would not stay in registers as float32
COPY_BYTES = 4096  # to a warp that only copies
COPIES = ("masked_gather", "masked_gather_backward")
ALIGNED = 16  # a multiple of this many values is what Triton knows to start every row at a whole vector
ONE_BY_ONE = 512  # values to a warp where each has a load of its own, and an address in registers for it
MOST_ROWS, MOST_WARPS = 32, 16  # of the defaults: a row to a lane
TRIED_ROWS, TRIED_VALUES = 128, 4096  # most rows a program and values a warp that are ever tried
ATTENTION = "relpos_attention"  # its kernels' names begin with it; rows of theirs are queries, and keys as well
LEAST_TILE = 16  # rows of theirs: what the tensor cores take
INTERPRETED_VALUES = 1 << 16  # the interpreter's cost is by the program, not by the value

Key = tuple[str, int, int]  # kernel, values of a row, bytes of a value


class Launch(NamedTuple):
    """Tokens a program, warps a program."""

    rows: int
    warps: int


_tried: dict[str, Launch] = {}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    import triton  # the tuner has to say where it is missing

    return bool(triton.knobs.runtime.interpret)


def launch_of(op: str, width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch parameters of a kernel. It looks them up: nothing is timed or written here.

    Args:
        op: name of the kernel, such as `guided_loss`.
        width: values of a row.
        dtype: type of the values that are read or written most.
        device: where it runs; tuned parameters belong to a kind of GPU.
    """
    tried = _tried.get(op)
    if tried is not None:
        return tried
    if interpreted() and not op.startswith(ATTENTION):
        return Launch(max(1, INTERPRETED_VALUES // block_of(width)), 1)
    return _settled(op, width, dtype.itemsize, device)


@functools.lru_cache(maxsize=1024)  # a launch takes the host microseconds; a device's name and a file would take more
def _settled(op: str, width: int, itemsize: int, device: torch.device) -> Launch:
    tuned = tuned_for(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    return tuned.get((op, width, itemsize)) or default_launch(op, width, itemsize)


def default_launch(op: str, width: int, itemsize: int) -> Launch:
    """Parameters from the row's size alone."""
    if op.startswith(ATTENTION):
        return _attention_launch(op, width, itemsize)
    block = block_of(width)
    tile = (COPY_BYTES if op in COPIES else TILE_BYTES) // itemsize
    row = ROW_BYTES // max(itemsize, 4)
    if width % ALIGNED or op == "patchify":  # whose colours lie three bytes apart
        tile, row = min(tile, ONE_BY_ONE), min(row, ONE_BY_ONE)
    return Launch(max(1, min(tile // block, MOST_ROWS)), max(1, min(block // row, MOST_WARPS)))


def _attention_launch(op: str, width: int, itemsize: int) -> Launch:
    """Tiles of 64 tokens leave 197 a tail of 16, those of 128 one of 128; see docs/kernels.md."""
    if itemsize == 2:  # where 64 rows are a whole number of Hopper's instructions for one group of four warps
        return Launch(32 if op == f"{ATTENTION}_key" and width > 64 else 64, 4)
    return Launch(32, 8) if itemsize == 4 else Launch(LEAST_TILE, 4)


def block_of(width: int) -> int:
    """Values of a row in a tile: the next power of two."""
    return 1 << max(width - 1, 0).bit_length()


def programs_of(rows: int, rows_a_program: int) -> int:
    """Programs that cover all rows."""
    return -(-rows // rows_a_program)


def sensible(launch: Launch, width: int) -> bool:
    """Whether a kernel can be launched so with rows of `width`: powers of two, and a tile that a warp can hold."""
    if not all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in launch):
        return False
    held = launch.rows * block_of(width) // launch.warps
    return launch.rows <= TRIED_ROWS and launch.warps <= MOST_WARPS and (launch.rows == 1 or held <= TRIED_VALUES)


@contextlib.contextmanager
def trying(op: str, launch: Launch) -> Iterator[None]:
    """Within, `op` is launched with `launch`, whatever its width.

    It counts in every thread of the process, because autograd runs backward passes in threads of its own: for a tuner
    or a test that has the process to itself.
    """
    before = _tried.get(op)
    _tried[op] = launch
    try:
        yield
    finally:
        if before is None:
            del _tried[op]
        else:
            _tried[op] = before


def cache_file(device_name: str) -> Path:
    """Where tuned parameters are: in $MVP_KERNELS_CACHE or ~/.cache/mvp_kernels, a file a kind of GPU and Triton.

    Raises:
        RuntimeError: neither variable is set, and there is no home.
    """
    import triton

    folder = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvp_kernels"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(folder) / f"{slug}-triton{triton.__version__}.json"


@functools.cache
def tuned_for(device_name: str) -> dict[Key, Launch]:
    """What was found on this kind of GPU; empty where nothing was tuned.

    A file that can't be used is said once and left alone: the defaults are right too, if slower.
    """
    try:
        path = cache_file(device_name)
    except RuntimeError:  # no home, so no file
        return {}
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"mvp_kernels can't use its tuned launch parameters in {path}: {error}. The defaults are used; write the"
            " file anew with `python -m mvp_kernels.tune`.",
            stacklevel=2,
        )
        return {}


def save_tuned(device_name: str, found: Mapping[Key, Launch | None]) -> Path:
    """Add what was found to the file, None for a kernel whose default is best; later launches here use it too.

    The file is written beside and then renamed. One that can't be read is replaced.

    Raises:
        OSError, RuntimeError: there is no place to write to.
    """
    path = cache_file(device_name)
    try:
        launches: dict[Key, Launch | None] = {**_read(path)}
    except (OSError, ValueError):
        launches = {}
    entries = [
        {"op": op, "width": width, "itemsize": itemsize, **launch._asdict()}
        for (op, width, itemsize), launch in sorted({**launches, **found}.items())
        if launch is not None
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps({"schema": SCHEMA, "device": device_name, "launches": entries}, indent=1) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    forget()
    return path


def forget() -> None:
    """Read the tuned parameters again at the next launch."""
    tuned_for.cache_clear()
    _settled.cache_clear()


def _read(path: Path) -> dict[Key, Launch]:
    """The launch parameters in a file, none where there is no file.

    Raises:
        OSError, ValueError: it can't be read, or is not what `save_tuned` writes.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, not {SCHEMA}")
        launches = {
            (entry["op"], entry["width"], entry["itemsize"]): Launch(entry["rows"], entry["warps"])
            for entry in document["launches"]
        }
        for (op, width, itemsize), launch in launches.items():
            if not (type(op) is str and type(width) is type(itemsize) is int and sensible(launch, width)):
                raise ValueError(f"{op} of width {width} can't run with {launch.rows} rows and {launch.warps} warps")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not a file of launch parameters ({error!r})") from error
    return launches
