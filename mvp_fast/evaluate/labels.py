"""Labels of a training and a test set: one list of classes for both, and parts of a set that keep its proportions.

Classes are matched by name: two indexes number theirs each by itself. What is drawn (the rows of a part) depends on the
seed and the rows alone, by counter-based random numbers: the same rows on every machine, and a smaller part lies within
a larger one.

Shape legend: N samples, K rows of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples.index import Index
from mvp_fast.samples.random import Stream, draws

SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Labels:
    """The classes that two sets share, and each sample's.

    Attributes:
        classes: names, sorted; each has a sample in both sets.
        train_N, test_N: int64, places in `classes`.
    """

    classes: list[str]
    train_N: npt.NDArray[np.int64]
    test_N: npt.NDArray[np.int64]


def match_labels(train: Index, test: Index) -> Labels:
    """One numbering of the classes for both sets, by name.

    A class counts where it has a sample; both sets must have the same ones.

    Raises:
        DataError: a set has samples without a class, or classes that the other lacks, or there is but one class.
    """
    present = [_present(train, "training"), _present(test, "test")]
    for (index, what), other in (((test, "test"), 0), ((train, "training"), 1)):
        missing = sorted(present[other].keys() - present[1 - other].keys())
        if missing:
            raise DataError(
                f"The {what} set has no image of {_named(missing)}, which the other set has",
                where=str(index.path),
                fix="Give both sets class folders of the same names and index them anew with `mvp-fast data index DIR`",
            )
    classes = sorted(present[0])
    if len(classes) < 2:
        raise DataError(
            f"All images are of one class, {classes[0]!r}: there is nothing to tell apart", where=str(train.path)
        )
    place = {name: number for number, name in enumerate(classes)}
    train_N, test_N = (
        np.array([place.get(name, -1) for name in index.classes], dtype=np.int64)[index.label]
        for index in (train, test)
    )
    return Labels(classes, train_N, test_N)


def _present(index: Index, what: str) -> dict[str, int]:
    """The classes with samples, and how many; DataError where a sample has none."""
    without = np.flatnonzero(index.label < 0)
    if len(without):
        some = f"{len(without):,} of the {len(index):,} images have" if len(without) < len(index) else "the images have"
        raise DataError(
            f"In the {what} set {some} no class, such as {index.key(int(without[0]))}",
            where=str(index.path),
            fix="Labels are the folders right below the indexed one: DIR/CLASS/image.jpg; index DIR",
        )
    counts = np.bincount(index.label, minlength=len(index.classes)).tolist()
    return {name: count for name, count in zip(index.classes, counts, strict=True) if count}


def _named(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the class{'' if len(names) == 1 else 'es'} {shown}{more}"


def stratified_rows(label_N: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a part with this share of each class: rounded to the nearest, halves up, and one at least.

    With one seed, the rows at a smaller fraction are among those at a larger one.

    Args:
        label_N: 0 or more.
        fraction: in (0, 1]; 1 gives all rows.
        seed: in [0, 2**64).

    Returns:
        int64 (K,), ascending.

    Raises:
        ConfigError: the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"The share of the labels is {fraction:g}, but must be above 0 and at most 1")
    _check_seed(seed)
    place_N, size_N = _places(label_N, seed, Stream.SUBSET)
    return np.flatnonzero(place_N < np.maximum(np.floor(fraction * size_N + 0.5), 1))


def held_out_split(
    label_N: npt.NDArray[np.int64], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on, and rows to choose by: a share of each class, rounded to the nearest, halves up.

    One at least is held out of a class, and one at least stays; so a class with one sample has none held out.

    Args:
        label_N: 0 or more.
        share: in (0, 1).
        seed: in [0, 2**64).

    Returns:
        int64 (K1,) and int64 (K2,), ascending; together all rows.

    Raises:
        ConfigError: the share is out of range.
        DataError: no class has two samples.
    """
    if not 0 < share < 1:
        raise ConfigError(f"The share that is held out is {share:g}, but must be above 0 and below 1")
    _check_seed(seed)
    place_N, size_N = _places(label_N, seed, Stream.HELD_OUT)
    held_N = place_N < np.minimum(np.maximum(np.floor(share * size_N + 0.5), 1), size_N - 1)
    if not held_N.any():
        raise DataError(
            f"No class has two training images ({len(label_N)} in all), so none can be held out to choose by",
            fix="Take more labels",
        )
    return np.flatnonzero(~held_N), np.flatnonzero(held_N)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"The seed {seed} is not in [0, 2**64)")


def _places(
    label_N: npt.NDArray[np.int64], seed: int, stream: Stream
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each row's place in a random order of its class, and the class's size: int64 (N,) each."""
    words_N4 = draws(seed, stream, 0, np.arange(len(label_N)), 0).astype(np.uint64)
    order_N = np.lexsort((words_N4[:, 0] << np.uint64(32) | words_N4[:, 1], label_N))
    sizes = np.bincount(label_N)
    place_N = np.empty(len(label_N), dtype=np.int64)
    place_N[order_N] = np.arange(len(label_N)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place_N, sizes[label_N]
