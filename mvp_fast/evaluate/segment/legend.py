"""What the values of a mask mean: names of classes, which value is which class, and which values are ignored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mvp_fast.config.segment import SegmentConfig
from mvp_fast.errors import ConfigError, DataError

IGNORED = -1
"""What a pixel that neither trains nor counts has in place of a class."""
UNKNOWN = -2
"""What a mask value without a meaning becomes."""
VALUES = 1 << 16
"""Values that a mask can have: 16 bits."""
SCENES, ADE_NAMES = "scenes.json", "objectInfo150.txt"
ADE_CLASSES = 150


@dataclass(frozen=True, eq=False)
class Legend:
    """The classes of a set of masks.

    Attributes:
        names: of the classes.
        value_of: the mask value of each class.
        class_of: int16 (VALUES,), the class of each mask value, or IGNORED, or UNKNOWN.
    """

    names: tuple[str, ...]
    value_of: tuple[int, ...]
    class_of: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.names)

    def words(self) -> str:
        """The values that a mask may have."""
        ignored = np.flatnonzero(self.class_of == IGNORED).tolist()
        low, high = min(self.value_of), max(self.value_of)
        also = f", and {', '.join(map(str, ignored))} for what is ignored" if ignored else ""
        return f"{low} to {high} for its {len(self)} classes{also}"


def make_legend(names: tuple[str, ...], values: tuple[int, ...], ignore: tuple[int, ...]) -> Legend:
    """A legend of classes with these names and mask values; what is ignored is no class, though it had a name.

    Raises:
        ConfigError: fewer than two classes are left, or there are too many.
    """
    kept = [(name, value) for name, value in zip(names, values, strict=True) if value not in ignore]
    if not 2 <= len(kept) < 1 << 15:
        raise ConfigError(
            f"Segmentation needs 2 to {(1 << 15) - 1} classes, and {len(kept)} are left",
            where="segment.classes, segment.num-classes, segment.ignore",
        )
    class_of = np.full(VALUES, UNKNOWN, dtype=np.int16)
    class_of[list(ignore)] = IGNORED
    class_of[[value for _, value in kept]] = np.arange(len(kept))
    return Legend(tuple(name for name, _ in kept), tuple(value for _, value in kept), class_of)


def find_legend(config: SegmentConfig, folders: list[Path], ade: bool) -> Legend:
    """The legend that the settings ask for, or that lies in one of `folders`.

    Args:
        config: classes, num_classes, reduce_zero_label and ignore are used.
        folders: where scenes.json or objectInfo150.txt may be, nearest first.
        ade: whether the layout is ADE20K's.

    Raises:
        ConfigError: nothing says which classes there are, or what says so can't be read.
        DataError: a scenes.json is damaged.
    """
    reduce_zero = config.reduce_zero_label == "yes" or (config.reduce_zero_label == "auto" and ade)
    ignore = config.ignore + ((0,) if reduce_zero else ())
    if not config.classes and not config.num_classes:
        for folder in folders:
            if (folder / SCENES).is_file():
                by_value = _scenes_legend(folder / SCENES)
                return make_legend(tuple(by_value.values()), tuple(by_value), ignore)
    names = _names(config, folders, ade)
    first = 1 if reduce_zero else 0
    return make_legend(names, tuple(range(first, first + len(names))), ignore)


def _names(config: SegmentConfig, folders: list[Path], ade: bool) -> tuple[str, ...]:
    if config.classes:
        names = _lines(Path(config.classes))
        if config.num_classes not in (0, len(names)):
            raise ConfigError(
                f"segment.num-classes is {config.num_classes}, but segment.classes names {len(names)}",
                where=config.classes,
            )
        return names
    if config.num_classes and not (ade and config.num_classes == ADE_CLASSES):
        return tuple(f"class {number}" for number in range(config.num_classes))
    if ade:
        for folder in folders:
            if (folder / ADE_NAMES).is_file() and len(found := _ade_names(folder / ADE_NAMES)) == ADE_CLASSES:
                return found
        return tuple(f"class {number}" for number in range(1, ADE_CLASSES + 1))
    raise ConfigError(
        "Nothing says which classes the masks have",
        where=f"there is no {SCENES} in {' or '.join(map(str, folders))}",
        fix="Give --segment.classes FILE with a name a line, or --segment.num-classes N",
    )


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"The names of the classes can't be read: {reason}", where=str(path)) from error
    return tuple(line.strip() for line in lines if line.strip())


def _scenes_legend(path: Path) -> dict[int, str]:
    """Name of each mask value, ascending."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["mask_legend"]
        legend = {int(value): str(name) for value, name in found.items()}
        if not all(0 <= value < VALUES for value in legend):
            raise ValueError("a value is out of range")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"The file has no mask_legend that can be read: {error}",
            where=str(path),
            fix="Draw the set anew, or give --segment.classes FILE",
        ) from error
    return dict(sorted(legend.items()))


def _ade_names(path: Path) -> tuple[str, ...]:
    """The last column of objectInfo150.txt: synonyms, of which the first is taken."""
    rows = [line.split("\t") for line in _lines(path)[1:]]
    return tuple(row[-1].split(",")[0].strip() for row in rows)
