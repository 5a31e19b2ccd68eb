"""What a conversion to a .beton will take, told from some of the images, and whether the disk has the room."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.loaders.convert import beton_parts
from mvp_fast.loaders.convert.beton_parts import PAGE, Form
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.samples.index import Index

PROBES = 48
"""Images that the estimate is made from."""
MARGIN = 1.05
"""Room asked for, in relation to the estimate."""


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        bytes: of the beton.
        seconds: of work, of one process.
        images: it was made from.
    """

    bytes: int
    seconds: float
    images: int


def estimate(index: Index, form: Form) -> Estimate:
    """Store some images, evenly spread, in memory, and tell from them what all will take."""
    field: Any = form.fields()["image"]
    entry, sizes, tried, began = np.zeros(1, field.metadata_type), list[int](), 0, time.process_time()

    def allocate(size: int) -> tuple[int, Any]:
        sizes.append(size)
        return 0, np.empty(size, np.uint8)

    state = np.random.get_state()  # noqa: NPY002 (FFCV draws from it where the mode is mixed)
    np.random.seed(0)  # noqa: NPY002
    for row in np.unique(np.linspace(0, len(index) - 1, PROBES).round().astype(np.int64)).tolist():
        tried += 1
        try:
            field.encode(entry, beton_parts.decode(index, row, form.side), allocate)
        except BadSampleError:
            continue
    np.random.set_state(state)  # noqa: NPY002
    mean = sum(sizes) / tried
    # A page ends with half a sample's room unused, on average; a sample has 64 bytes or less in the two tables.
    whole = len(index) * (mean * (1 + mean / (2 * PAGE)) + 64) + PAGE
    return Estimate(int(whole), (time.process_time() - began) / tried * len(index), tried)


def check_room(
    index: Index, form: Form, folder: Path, done: int, tell: Callable[[Estimate, int], None] | None
) -> float:
    """Say what it takes, and refuse where that is more than there is; the seconds of work that are left."""
    expected = estimate(index, form)
    left = 1 - done / len(index)
    free = shutil.disk_usage(folder).free
    if tell is not None:
        tell(expected, free)
    needed = int(MARGIN * left * expected.bytes)
    if needed > free:
        raise EnvironmentProblem(
            f"The disk has {free / 1e9:.2f} GB left, and the beton will take about {needed / 1e9:.2f} GB",
            where=str(folder.parent),
            fix="Give --out a disk with more room, or take a smaller --side, --mode jpeg or a lower --quality",
        )
    return left * expected.seconds
