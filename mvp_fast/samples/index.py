"""The index of a data set: one Parquet file with a row a sample, all that the plan and the loaders need to know of it.

    key      text   the sample's name: its path relative to the root, with forward slashes
    path     text   the file that holds its bytes, relative to the root, with forward slashes
    offset   int64  where its bytes begin in that file
    length   int64  how many bytes it has
    width    int32  pixels, as stored (EXIF orientation not applied)
    height   int32  pixels, as stored
    label    int32  its class's place in `classes`; -1 without a class

The Parquet schema carries, as JSON under the key `mvp_fast.index`: version, classes, tool, and the root twice, relative
to the index file and absolute. So a folder may move with the index in it, and an index may move without its images.

This module reads indexes; index_build.py writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples import texts

VERSION = 1
FILE_NAME = "index.parquet"
METADATA_KEY = b"mvp_fast.index"
# large_string, because the offsets of string are 32 bits: 2 GiB of keys is 40 million samples.
_TYPES = {
    "key": pa.large_string(),
    "path": pa.large_string(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "label": pa.int32(),
}
COLUMNS = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()])
_WRITE = "Write one with `mvp-fast data index DIR`, DIR being the folder of images"


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """An index in memory; immutable.

    Attributes:
        path: the Parquet file.
        root: the folder that paths are relative to.
        classes: names of the class folders, sorted; empty for a flat folder.
        offset, length: int64 (n,), bytes.
        width, height: int32 (n,), pixels of the stored image.
        label: int32 (n,), -1 without a class.
    """

    path: Path
    root: Path
    classes: list[str]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    # Arrow's text stays as it is in memory: a Python string a sample would take ten times the room. None: synthetic.
    _keys: pa.LargeStringArray | None = field(default=None)
    # One for each sample, and then the keys themselves; or one for each run of samples with the same path.
    _paths: pa.LargeStringArray | None = field(default=None)
    _starts: npt.NDArray[np.int64] | None = field(default=None)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Read an index.

        Args:
            path: the Parquet file, or the folder that holds it as index.parquet.

        Raises:
            DataError: it is missing, can't be read, is no index, or is one of another version.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        table, about = _read(path)
        columns: dict[str, Any] = {name: table.column(name).combine_chunks() for name in COLUMNS.names}
        numbers = {name: columns[name].to_numpy() for name in ("offset", "length", "width", "height", "label")}
        _check_values(path, numbers, len(about["classes"]))
        keys, paths = columns["key"], columns["path"]
        starts = None
        if paths.equals(keys):  # always so for a folder of image files
            paths = keys
        else:
            starts = texts.runs(paths)
            paths = paths.take(starts[:-1])
        root = _find_root(path, about, paths[0].as_py())
        del table, columns
        pa.default_memory_pool().release_unused()  # what unpacking took: two thirds of the memory at this point
        return cls(path=path, root=root, classes=about["classes"], **numbers, _keys=keys, _paths=paths, _starts=starts)

    @classmethod
    def synthetic(cls, images: int = 1_281_167, width: int = 500, height: int = 375) -> Index:
        """An index with no files behind it, all images of one size; takes no memory whatever their number.

        Raises:
            ConfigError: a number is below 1.
        """
        if min(images, width, height) < 1:
            raise ConfigError(
                "A synthetic index needs 1 image or more, of 1 pixel or more", where=f"{images} of {width} x {height}"
            )
        nowhere = Path("synthetic")

        def constant(value: int, kind: Any) -> Any:
            return np.broadcast_to(np.array(value, dtype=kind), (images,))

        return cls(
            path=nowhere,
            root=nowhere,
            classes=[],
            offset=constant(0, np.int64),
            length=constant(0, np.int64),
            width=constant(width, np.int32),
            height=constant(height, np.int32),
            label=constant(-1, np.int32),
        )

    def __len__(self) -> int:
        return len(self.width)

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, {len(self)} images, {len(self.classes)} classes)"

    @property
    def is_synthetic(self) -> bool:
        """Whether there are no files behind the index."""
        return self._keys is None

    def key(self, i: int) -> str:
        """The name of sample i."""
        if self._keys is None:
            return f"synthetic/{range(len(self))[i]:012d}"
        return str(self._keys[int(i)].as_py())

    def keys(self, sample_B: npt.NDArray[np.int64]) -> pa.LargeStringArray:
        """The names of these samples, in their order.

        Raises:
            DataError: the index is synthetic.
        """
        if self._keys is None:
            raise DataError("A synthetic index has no images", fix="Index a folder of images")
        return self._keys.take(sample_B)

    def file(self, i: int) -> Path:
        """The file that holds sample i.

        Raises:
            DataError: the index is synthetic.
        """
        if self._paths is None:
            raise DataError(
                "A synthetic index has no files", fix="Use the synthetic loader, or index a folder of images"
            )
        run = i if self._starts is None else np.searchsorted(self._starts, i, side="right") - 1
        return self.root / self._paths[int(run)].as_py()

    def shard_starts(self) -> npt.NDArray[np.int64] | None:
        """Where each shard begins, and the number of samples: int64 (S + 1); None where each sample is its own file.

        A shard is a run of samples with the same path.
        """
        if self._starts is None or (len(self._starts) == len(self) + 1 and not self.offset.any()):
            return None
        return self._starts

    def subset(self, sample_K: npt.NDArray[np.int64]) -> Index:
        """An index of these samples alone, in this order; with all the classes of this one.

        Raises:
            DataError: there are none.
        """
        if not len(sample_K):
            raise DataError("The part of the index that was asked for has no samples", where=str(self.path))
        names = ("offset", "length", "width", "height", "label")
        columns: dict[str, Any] = {name: getattr(self, name)[sample_K] for name in names}
        keys = None if self._keys is None else self._keys.take(sample_K)
        if self._paths is None or self._starts is None:
            return replace(self, **columns, _keys=keys, _paths=keys)
        paths = self._paths.take(np.searchsorted(self._starts, sample_K, side="right") - 1)
        starts = texts.runs(paths)
        return replace(self, **columns, _keys=keys, _paths=paths.take(starts[:-1]), _starts=starts)

    def fingerprint(self) -> str:
        """SHA-256 over the samples in their order: classes, keys, offsets, lengths, sizes and labels, but not places.

        Two copies of a data set in different folders have the same fingerprint.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(["mvp_fast.index", VERSION, len(self), self.classes]).encode())
        if self._keys is None:
            sizes = [int(self.width[0]), int(self.height[0])]
            digest.update(json.dumps(["synthetic", *sizes]).encode())
            return digest.hexdigest()
        digest.update(texts.lengths(self._keys).astype("<i8").data)
        digest.update(texts.content(self._keys))
        for column in (self.offset, self.length, self.width, self.height, self.label):
            digest.update(np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"), copy=False)).data)
        return digest.hexdigest()

    def check_files(self, samples: int = 64) -> None:
        """Look at some files, evenly spread from the first sample to the last: do they exist, with the indexed length?

        Raises:
            DataError: one doesn't.
        """
        if self.is_synthetic or samples < 1:
            return
        for i in np.unique(np.linspace(0, len(self) - 1, samples).round().astype(np.int64)).tolist():
            offset, length = int(self.offset[i]), int(self.length[i])
            file = self.file(i)
            whole = self._starts is None  # each sample a file of its own
            try:
                size = file.stat().st_size
            except OSError as error:
                raise self._misfit(f"{file} should be {length} bytes long, but: {error.strerror}") from error
            if whole and size != length:
                raise self._misfit(f"{file} is {size} bytes long, {length} in the index")
            if size < offset + length:
                raise self._misfit(f"{file} is {size} bytes long, sample {self.key(i)} needs {offset + length}")

    def _misfit(self, what: str) -> DataError:
        out = "" if self.path == self.root / FILE_NAME else f" --out {self.path}"
        return DataError(
            f"The index no longer fits its files: {what}",
            where=str(self.path),
            fix=f"Write it anew with `mvp-fast data index {self.root}{out}`",
        )


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and what its schema says about it; DataError where it is not an index of this version."""
    if not path.exists():
        raise DataError("There is no index here", where=str(path), fix=_WRITE)
    try:
        with pq.ParquetFile(path) as file:
            about = _about(path, file.schema_arrow)
            return file.read(), about
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The index can't be read as Parquet: {reason}", where=str(path), fix=_WRITE) from error


def _about(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        about = json.loads((schema.metadata or {})[METADATA_KEY])
        version = about["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("The file is Parquet, but no index of mvp-fast", where=str(path), fix=_WRITE) from error
    if version != VERSION:
        raise DataError(
            f"The index has version {version}, but this mvp-fast reads version {VERSION}", where=str(path), fix=_WRITE
        )
    known = {"classes": list, "root": str, "root_absolute": str}
    sound = all(isinstance(about.get(name), kind) for name, kind in known.items())
    if not sound or not schema.remove_metadata().equals(COLUMNS):
        raise DataError(
            f"The index has other columns than version {VERSION} has: {', '.join(schema.names)}",
            where=str(path),
            fix=_WRITE,
        )
    return dict(about)


def _check_values(path: Path, numbers: dict[str, npt.NDArray[Any]], classes: int) -> None:
    """DataError for an empty index, and for numbers that no image has."""
    if not len(numbers["length"]):
        raise DataError("The index is empty", where=str(path), fix=_WRITE)
    least = {"offset": 0, "length": 1, "width": 1, "height": 1, "label": -1}
    wrong = [name for name, bound in least.items() if numbers[name].min() < bound]
    if numbers["label"].max() >= classes:
        wrong.append("label")
    if wrong:
        raise DataError(f"The index has impossible values in {', '.join(wrong)}", where=str(path), fix=_WRITE)


def _find_root(path: Path, about: dict[str, Any], first: str) -> Path:
    """Where the first file is: under the relative root (the usual case), else under the absolute one."""
    relative = Path(os.path.normpath(os.path.join(os.path.abspath(path.parent), about["root"])))
    absolute = Path(about["root_absolute"])
    if not (relative / first).exists() and (absolute / first).exists():
        return absolute
    return relative
