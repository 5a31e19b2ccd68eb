"""What a set of scenes is, and what a folder holds of it: nothing, a part, all of it, or something else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples.scenes.spec import check_pairs, find_profile
from mvp_fast.samples.scenes.vocabulary import MASK_GROUND, MASK_VALUES, Pair, all_pairs

GENERATOR_VERSION = 1
"""Goes up with every change of what is drawn."""

MANIFEST = "scenes.json"
"""Written last: a folder that has it holds a complete set."""
TABLE = "scenes.parquet"
MASKS = "masks"
PARTIAL = "scenes.partial"
"""Folder beside the images while a set is drawn."""
ASKED = "asked.json"
"""In PARTIAL: what the unfinished set is to be."""

IDENTITY = ("profile", "seed", "images", "version")


@dataclass(frozen=True)
class SceneSet:
    """What decides a set of scenes.

    Attributes:
        images: how many.
        profile: a key of PROFILES.
        seed: in [0, 2**64).
        pairs: the (colour, shape) that objects may have; None for all.
    """

    images: int
    profile: str = "imagenet"
    seed: int = 0
    pairs: frozenset[Pair] | None = None

    def classes(self) -> list[str]:
        """The class names, sorted."""
        return sorted({shape for _, shape in (all_pairs() if self.pairs is None else self.pairs)})

    def manifest(self) -> dict[str, Any]:
        """What scenes.json says of the set, but for what came of drawing it."""
        held_out = [] if self.pairs is None else sorted(all_pairs() - self.pairs)
        return {
            "generator": "mvp-fast data scenes",
            "version": GENERATOR_VERSION,
            "profile": self.profile,
            "seed": self.seed,
            "images": self.images,
            "held_out_pairs": [list(pair) for pair in held_out],
            "classes": self.classes(),
            "mask_legend": {str(MASK_GROUND): "ground", **{str(value): word for word, value in MASK_VALUES.items()}},
        }

    def check(self) -> None:
        """ConfigError where there is no such set."""
        find_profile(self.profile)
        if self.images < 1:
            raise ConfigError(f"{self.images} images can't be drawn", where="--images", fix="ask for at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"the seed {self.seed} is not in [0, 2**64)", where="--seed", fix="take another")
        if self.pairs is not None:
            check_pairs(self.pairs)


@dataclass(frozen=True)
class SetReport:
    """What is in a folder, and what a call did for it.

    Attributes:
        folder: where the set is.
        images: images in it.
        classes: class names.
        bytes: length of all JPEG files together.
        drawn: images drawn by this call; 0 where the set was there already.
        seconds: what that took.
    """

    folder: Path
    images: int
    classes: list[str]
    bytes: int
    drawn: int
    seconds: float


def find_complete(root: Path, asked: SceneSet) -> SetReport | None:
    """The report of the complete set `asked` in `root`; None where it is still to be drawn, or a part of it.

    Raises:
        DataError: `root` holds another set or other files.
        OSError: `root` can't be read.
    """
    if not root.exists():
        return None
    if (root / MANIFEST).exists():
        found = _read_json(root / MANIFEST)
        _compare(root, "a set", found, asked)
        length = found.get("bytes")
        if isinstance(length, int) and _is_whole(root, asked):
            return SetReport(root, asked.images, asked.classes(), length, 0, 0.0)
        return None
    if (root / PARTIAL / ASKED).exists():
        _compare(root, "an unfinished set", _read_json(root / PARTIAL / ASKED), asked)
        return None
    others = sorted(path.name for path in root.iterdir() if path.name != PARTIAL and not path.name.startswith("."))
    if others:
        what = f"the folder holds files that are no set of scenes, such as {others[0]!r}"
        raise DataError(what, where=str(root), fix="give a new or an empty folder to --out")
    return None


def _compare(root: Path, state: str, found: dict[str, Any], asked: SceneSet) -> None:
    """DataError where the set that was found is not the one that is asked for."""
    wanted = asked.manifest()
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if not differing:
        return
    there = ", ".join(f"{name} {found.get(name)}" for name in IDENTITY)
    wish = ", ".join(f"{name} {wanted[name]}" for name in differing if name in IDENTITY)
    wish = f"with {wish}" if wish else f"that differs in {', '.join(differing)}"
    what = f"the folder holds {state} with {there}; asked for is one {wish}"
    raise DataError(what, where=str(root), fix="Give another --out, or remove the folder to draw it anew")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        fix = "Remove its folder and draw the set anew, or give another --out"
        raise DataError("the file can't be read as JSON that describes a set", where=str(path), fix=fix)
    return found


def _is_whole(root: Path, asked: SceneSet) -> bool:
    """Whether the table is there and as many images and masks as there should be."""
    images = sum(_count(root / name, ".jpg") for name in asked.classes())
    masks = sum(_count(root / MASKS / name, ".png") for name in asked.classes())
    return images == masks == asked.images and (root / TABLE).exists()


def _count(folder: Path, suffix: str) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.name.endswith(suffix) for entry in entries)
    except FileNotFoundError:
        return 0
