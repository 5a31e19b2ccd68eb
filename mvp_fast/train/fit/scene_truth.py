"""What scenes show, for the zero-shot check: the colour and the shape of each main object, and all pairs of a set.

Shape legend: N images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples.index import Index
from mvp_fast.samples.scenes.folder import TABLE
from mvp_fast.samples.scenes.vocabulary import COLOURS, SHAPES, TEXTURES, Pair

TEMPLATES = (
    "a {}",
    *(f"a {size} {{}}" for size in ("small", "medium-sized", "large")),
    *(f"a large {texture} {{}}" for texture in TEXTURES),
)
"""Of the prompts; a class's feature is the mean over all of them."""


class Truth(NamedTuple):
    """Of the main object of each image.

    Attributes:
        colour_N, shape_N: int64, places in COLOURS and SHAPES.
    """

    colour_N: npt.NDArray[np.int64]
    shape_N: npt.NDArray[np.int64]


def scenes_table(index: Index) -> Path | None:
    """The table of the set of scenes that the index is of; None where it is of something else."""
    places = (folder / TABLE for folder in (index.path.parent, index.root))
    return next((path for path in places if path.is_file()), None)


def read_truth(index: Index, path: Path) -> Truth:
    """Colour and shape of every image's main object, in the index's order.

    Raises:
        DataError: the table can't be read, or lacks an image.
    """
    rows = {row["key"]: row["objects"][row["main"]] for row in _rows(path, ["key", "objects", "main"])}
    colours, shapes = list(COLOURS), list(SHAPES)
    found: list[tuple[int, int]] = []
    for i in range(len(index)):
        key = index.key(i)
        main = rows.get(key.rpartition(".")[0] or key)
        if main is None:
            raise DataError(
                f"The table of scenes lacks the image {key}",
                where=str(path),
                fix="Index the set again: `mvp-fast data index DIR`",
            )
        found.append((colours.index(main["colour"]), shapes.index(main["shape"])))
    colour_N, shape_N = np.asarray(found, dtype=np.int64).T
    return Truth(colour_N, shape_N)


def pairs_shown(path: Path) -> set[Pair]:
    """The (colour, shape) of all objects of a set."""
    return {(thing["colour"], thing["shape"]) for row in _rows(path, ["objects"]) for thing in row["objects"]}


def check_held_out(train: Path | None, held_out: Path) -> None:
    """ConfigError where an object of the set held out has a pair that an object of the training set has, too."""
    if train is None:
        return
    both = sorted(pairs_shown(train) & pairs_shown(held_out))
    if both:
        told = ", ".join(f"{colour} {shape}" for colour, shape in both[:3])
        raise ConfigError(
            f"The compositions are not held out: {len(both)} pairs of colour and shape are in the training set as well,"
            f" such as {told}",
            where=f"fit.held-out {held_out.parent}",
            fix="Draw the training set with `mvp-fast data scenes --pairs seen` and this one with `--pairs held-out`",
        )


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
        return rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"The table of scenes can't be read: {' '.join(str(error).split())[:200]}", where=str(path)
        ) from error
