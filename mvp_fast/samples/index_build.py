"""Writes the index of a folder of images.

Two layouts, also mixed: class folders (ROOT/CLASS/**/image, labelled by CLASS's place among the sorted names) and
images directly in ROOT (label -1). A class is a top-level folder with at least one image file in it, good or bad, so
that a bad image never shifts a label. Left out:

- files without one of the extensions in `probe.EXTENSIONS`, and all whose name begins with a dot, as for folders;
- a top-level folder `masks` that mirrors the images, as in the synthetic sets: it holds folders only, each with the
  name of a folder beside it. Any other folder of that name is a class;
- the scratch folder of an unfinished synthetic set, `scenes.partial`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mvp_fast import __version__
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.samples.files import replacing
from mvp_fast.samples.index import COLUMNS, FILE_NAME, METADATA_KEY, VERSION
from mvp_fast.samples.probe import EXTENSIONS, Probe, probe_all

MASKS, SCRATCH = "masks", "scenes.partial"
ROWS_A_GROUP = 1 << 17  # what is unpacked at a time when an index is read
HEADERS_A_PROCESS = 10_000  # read in about the time that another process takes to start

Progress = Callable[[int, int], None]
"""Called with the number of files looked into and their total."""


@dataclass(frozen=True)
class BadFile:
    """A file or folder that was left out.

    Attributes:
        path: relative to the root, with forward slashes.
        reason: why it can't be used.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class IndexReport:
    """What `build_index` did.

    Attributes:
        path: the index.
        images: rows in it.
        classes: class names.
        bytes: length of all images together.
        bad: what was left out; also in `bad_path`, one JSON object a line.
        bad_path: the list beside the index, whether or not there is one.
        seconds: what it took.
    """

    path: Path
    images: int
    classes: list[str]
    bytes: int
    bad: list[BadFile]
    bad_path: Path
    seconds: float


def build_index(
    root: str | Path,
    out: str | Path | None = None,
    verify: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> IndexReport:
    """Index the images under `root`. The result does not depend on `workers`.

    Args:
        root: the folder.
        out: the Parquet file to write, replacing an older one at the end; default `root`/index.parquet.
        verify: decode every image instead of reading its header alone.
        workers: processes; 0 takes as many as pay (see `processes`). A script that asks for more than 1 needs the guard
            `if __name__ == "__main__"`, as always with processes that are spawned.
        progress: called now and then.

    Raises:
        ConfigError: `workers` is negative.
        DataError: the folder is missing or can't be read, has no usable image, or `out` is a folder.
        EnvironmentProblem: the index can't be written, or a worker was killed.
    """
    began = time.monotonic()
    if workers < 0:
        raise ConfigError(f"{workers} processes can't read images", where="--workers", fix="Take 0 for one a core")
    base = os.path.abspath(root)
    path = Path(out) if out is not None else Path(base) / FILE_NAME
    bad_path = path.with_suffix(".bad.jsonl")
    classes, keys, labels, bad = _scan(base)
    with replacing(path) as file:
        probes: list[Probe] = []
        for chunk in probe_all(base, keys, verify, workers or processes(len(keys), verify)):
            probes += chunk
            if progress is not None:
                progress(len(probes), len(keys))
        good = np.array([not found.reason for found in probes], dtype=np.bool_)
        bad += [BadFile(key, found.reason) for key, found in zip(keys, probes, strict=True) if found.reason]
        bad.sort(key=lambda entry: entry.path)
        write_bad(bad_path, bad)
        if not good.any():
            first = f"; the first, {bad[0].path}: {bad[0].reason}" if bad else ""
            raise DataError(f"None of the {len(bad)} image files can be used{first}", where=base, fix=f"See {bad_path}")
        table = _table(keys, labels, probes, good)
        about = {
            "version": VERSION,
            "classes": classes,
            "root": os.path.relpath(base, os.path.abspath(path.parent)),
            "root_absolute": base,
            "tool": f"mvp-fast {__version__}",
            "verified": verify,
        }
        write_table(table, about, file)
    total = int(table.column("length").to_numpy().sum())
    return IndexReport(path, len(table), classes, total, bad, bad_path, time.monotonic() - began)


def processes(files: int, verify: bool) -> int:
    """How many processes pay: one a core; this one alone for headers of so few files that others start too late."""
    return 1 if files < HEADERS_A_PROCESS and not verify else len(os.sched_getaffinity(0))


def write_table(table: pa.Table, about: dict[str, Any], file: IO[bytes] | Path) -> None:
    """Write the columns of an index with what is to be known `about` them."""
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()})
    # Neighbouring keys share their beginnings, which this encoding stores once.
    text = dict.fromkeys(("key", "path"), "DELTA_BYTE_ARRAY")
    numbers: Any = ["offset", "length", "width", "height", "label"]
    pq.write_table(
        table, file, row_group_size=ROWS_A_GROUP, compression="zstd", use_dictionary=numbers, column_encoding=text
    )


def _table(keys: list[str], labels: list[int], probes: list[Probe], good: np.ndarray) -> pa.Table:
    names = pa.array(keys, pa.large_string()).filter(pa.array(good))
    kept = [found for found in probes if not found.reason]
    columns = {
        "key": names,
        "path": names,
        "offset": np.zeros(len(kept), dtype=np.int64),
        "length": np.array([found.length for found in kept], dtype=np.int64),
        "width": np.array([found.width for found in kept], dtype=np.int32),
        "height": np.array([found.height for found in kept], dtype=np.int32),
        "label": np.array(labels, dtype=np.int32)[good],
    }
    return pa.table(columns, schema=COLUMNS)


def _scan(root: str) -> tuple[list[str], list[str], list[int], list[BadFile]]:
    """The classes; the keys of all image files by name, sorted by class and key; their labels; what can't be read.

    Raises:
        DataError: the root is missing, no folder or unreadable, or holds no image file.
    """
    bad: list[BadFile] = []
    try:
        with os.scandir(root) as entries:
            top = {entry.name: _is_folder(entry) for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise DataError(f"The folder can't be read: {error.strerror}", where=root, fix="Check the path") from error
    folders = sorted(name for name, is_folder in top.items() if is_folder and name != SCRATCH)
    if MASKS in folders and _mirrors(os.path.join(root, MASKS), set(folders) - {MASKS}):
        folders.remove(MASKS)
    groups = [("", sorted(name for name, is_folder in top.items() if not is_folder and _is_image(name)))]
    groups += [(name, sorted(_walk(root, name, frozenset(), bad))) for name in folders]
    classes, keys, labels = [], [], []
    for name, found in groups:
        usable = [key for key in found if _is_text(key)]
        bad += [BadFile(_printable(key), "the name is not UTF-8") for key in found if not _is_text(key)]
        if name and usable:
            classes.append(name)
        keys += usable
        labels += [len(classes) - 1 if name else -1] * len(usable)
    if not keys and not bad:
        kinds = ", ".join(EXTENSIONS)
        raise DataError(f"The folder holds no image file ({kinds})", where=root, fix="Check the path")
    return classes, keys, labels, bad


def _walk(root: str, folder: str, above: frozenset[tuple[int, int]], bad: list[BadFile]) -> Iterator[str]:
    """Keys of the image files in a folder and those below; links are followed, but not in circles."""
    try:
        status = os.stat(os.path.join(root, folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(os.path.join(root, folder)) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        bad.append(BadFile(_printable(folder), f"the folder can't be read: {error.strerror}"))
        return
    for name, is_folder in found:
        if is_folder:
            yield from _walk(root, f"{folder}/{name}", above | {identity}, bad)
        elif _is_image(name):  # a broken link too: it is looked into, and told
            yield f"{folder}/{name}"


def _mirrors(masks: str, beside: set[str]) -> bool:
    """Whether a folder of masks mirrors the folders beside it."""
    try:
        with os.scandir(masks) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return False
    return bool(found) and all(is_folder and name in beside for name, is_folder in found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_text(name: str) -> bool:
    return name.isascii() or _printable(name) == name


def _printable(name: str) -> str:
    """A name with what is not UTF-8 in it written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_bad(path: Path, bad: list[BadFile]) -> None:
    """The list beside the index; an older one goes where there is nothing to list."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        for entry in bad:
            file.write((json.dumps({"path": entry.path, "reason": entry.reason}) + "\n").encode())
