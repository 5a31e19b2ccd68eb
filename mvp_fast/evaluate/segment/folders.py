"""From the folder that a user names to images with masks: layouts, index, legend.

Layouts, the first that fits:

    DIR/images/training, DIR/annotations/training      ADE20K (validation likewise)
    X/images/NAME (given), X/annotations/NAME          a part of ADE20K
    DIR/images, DIR/masks                              also X/images (given), X/masks
    DIR/**, DIR/masks/**                               masks beside the images, as `mvp-fast data scenes` writes

or any folder of images with the folder of masks named. Masks are PNG files with the images' paths and names. Where the
images have an index already (index.parquet among them, or named), it is used; else one is written into the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvp_fast.config.segment import SegmentConfig
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.segment.legend import find_legend
from mvp_fast.evaluate.segment.masks import LabelledSet
from mvp_fast.samples.index import FILE_NAME, Index
from mvp_fast.samples.index_build import build_index

MASKS, IMAGES, ANNOTATIONS = "masks", "images", "annotations"
PARTS = {"train": "training", "val": "validation"}
"""What ADE20K calls them."""


@dataclass(frozen=True)
class Place:
    """Where images and masks are.

    Attributes:
        images: the folder of images.
        masks: the folder of masks; None where none was found.
        index: the index of the images; None where there is none yet.
        ade: whether the layout is ADE20K's.
    """

    images: Path
    masks: Path | None
    index: Path | None
    ade: bool = False

    def around(self) -> list[Path]:
        """Folders in which a file may say what the classes are, nearest first."""
        masks = [] if self.masks is None else [self.masks, self.masks.parent]
        found = [self.images, self.images.parent, self.images.parent.parent, *masks]
        return list(dict.fromkeys(found))


def find_place(given: str, part: str) -> Place:
    """Where the images and masks of a folder or index are.

    Args:
        given: the folder, or the Parquet file.
        part: `train` or `val`.

    Raises:
        DataError: there is nothing there.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return _beside(Index.open(path).root, path)
    if not path.is_dir():
        raise DataError("There is no such folder", where=f"segment.{part} {given}", fix="Check the path")
    name = PARTS[part]
    if (path / IMAGES / name).is_dir() and (path / ANNOTATIONS / name).is_dir():
        images = path / IMAGES / name
        return Place(images, path / ANNOTATIONS / name, _index_of(images), ade=True)
    if (path / IMAGES).is_dir() and (path / MASKS).is_dir():
        return Place(path / IMAGES, path / MASKS, _index_of(path / IMAGES))
    return _beside(path, _index_of(path))


def _beside(images: Path, index: Path | None) -> Place:
    images = Path(os.path.abspath(images))
    annotated = images.parent.parent / ANNOTATIONS / images.name
    if images.parent.name == IMAGES and annotated.is_dir():
        return Place(images, annotated, index, ade=True)
    if (images / MASKS).is_dir():
        return Place(images, images / MASKS, index)
    if images.name == IMAGES and (images.parent / MASKS).is_dir():
        return Place(images, images.parent / MASKS, index)
    return Place(images, None, index)


def _index_of(folder: Path) -> Path | None:
    return folder / FILE_NAME if (folder / FILE_NAME).is_file() else None


def open_sets(
    config: SegmentConfig, store: Path, write: bool, anew: bool, ready: Callable[[], None]
) -> tuple[LabelledSet, LabelledSet]:
    """The sets to train and to judge on; every mask's header is looked into.

    Args:
        config: what the user asked for.
        store: folder for indexes of images that have none.
        write: whether this process writes them; the others read them after `ready`.
        anew: write them also where `store` has them.
        ready: returns once the process that writes has done so.

    Raises:
        ConfigError: a folder of masks or the classes can't be found.
        DataError: images or masks are missing or don't fit, or the two sets have other classes.
    """
    places = {"train": find_place(config.train, "train"), "val": find_place(config.val or config.train, "val")}
    if not config.val and not places["val"].ade:
        raise ConfigError("There are no images to judge on: segment.val is empty", fix="Give --segment.val DIR")
    masks = {"train": config.train_masks, "val": config.val_masks}
    for part, place in places.items():
        if not masks[part] and place.masks is None:
            raise ConfigError(
                f"The masks of segment.{part} were not found: there is no folder {MASKS} in or beside the images",
                where=str(place.images),
                fix=f"Give --segment.{part}-masks DIR",
            )
        if masks[part] and not Path(masks[part]).is_dir():
            raise ConfigError("There is no such folder of masks", where=f"segment.{part}-masks {masks[part]}")
    if write:
        for part, place in places.items():
            if place.index is None and (anew or not _own(store, part).is_file()):
                build_index(place.images, _own(store, part))
    ready()
    sets = {}
    for part, place in places.items():
        index = Index.open(place.index or _own(store, part))
        index.check_files()
        folder = Path(masks[part]) if masks[part] else place.masks
        assert folder is not None
        legend = find_legend(config, place.around(), place.ade)
        sets[part] = LabelledSet(_without_masks(index, folder), folder, legend)
        sets[part].check()
    train, val = sets["train"], sets["val"]
    if (train.legend.names, train.legend.value_of) != (val.legend.names, val.legend.value_of):
        raise DataError(
            f"The two sets have other classes: {_shown(train)} and {_shown(val)}",
            where=f"{places['train'].images} and {places['val'].images}",
            fix="Name the classes of both with --segment.classes FILE",
        )
    return train, val


def _own(store: Path, part: str) -> Path:
    return store / f"{part}.parquet"


def _without_masks(index: Index, masks: Path) -> Index:
    """The index without masks that lie among the images: a folder of them looks like a class."""
    root, folder = os.path.abspath(index.root), os.path.abspath(masks)
    if not folder.startswith(root + os.sep):
        return index
    prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
    kept = np.array([not index.key(i).startswith(prefix) for i in range(len(index))])
    return index if kept.all() else index.subset(np.flatnonzero(kept))


def _shown(labelled: LabelledSet) -> str:
    names = labelled.legend.names
    return f"{len(names)} ({', '.join(names[:3])}, ...)"
