"""Writes a data set as WebDataset shards: tar files of bounded size, with an index of our own and one for DALI.

    OUT/shard-000000.tar     plain tar (POSIX ustar), the same bytes for the same images whoever writes them, and when
    OUT/shard-000000.idx     for DALI's readers.webdataset, as its tool wds2idx writes it
    OUT/index.parquet        the index: every backend reads each image at its offset in its tar file
    OUT/index.bad.jsonl      samples that were left out
    OUT/shards.json          what was asked for; comes last

While they are written, OUT/shards.partial holds what was asked for and a record of each finished shard. An interrupted
call is taken up there: finished shards are read again and held against their checksums, all others are written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mvp_fast import __version__
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.loaders.convert.layout import Layout
from mvp_fast.loaders.convert.tar_file import PARTIAL, Task, shard_name, write_shard
from mvp_fast.samples.files import replacing
from mvp_fast.samples.index import COLUMNS, FILE_NAME, VERSION, Index
from mvp_fast.samples.index_build import BadFile, write_bad, write_table
from mvp_fast.samples.workers import alone, start_worker

ASKED, MANIFEST = "asked.json", "shards.json"
FORMAT = 1
"""Changes whenever the same images would give other files."""

Progress = Callable[[int, int], None]
"""Called with the number of images done and their total."""


@dataclass(frozen=True)
class ShardsReport:
    """What `write_shards` did.

    Attributes:
        index: the new index.
        images: rows in it.
        shards: tar files.
        bytes: of all tar files.
        written: tar files written now; the others were there.
        bad: what was left out.
        seconds: what it took.
    """

    index: Path
    images: int
    shards: int
    bytes: int
    written: int
    bad: list[BadFile]
    seconds: float


def write_shards(
    index: Index,
    layout: Layout,
    out: str | Path,
    asked: dict[str, Any],
    verify: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> ShardsReport:
    """Write the shards that `layout` says, or what an interrupted call left to do; nothing where all is complete.

    Args:
        index: the images.
        layout: from `lay_out`.
        out: the folder; made where it is missing.
        asked: the settings that decided `layout`; a folder goes on with the same ones only.
        verify: decode every image instead of checking its length, header and end.
        workers: processes; 0 takes one a core. A script that asks for more than 1 needs the guard
            `if __name__ == "__main__"`, as always with processes that are spawned.
        progress: called now and then.

    Raises:
        ConfigError: `workers` is negative.
        DataError: the folder holds something else, the images no longer fit the index, or none is usable.
        EnvironmentProblem: there is no room, the folder can't be written, or a worker was killed.
    """
    began = time.monotonic()
    root = Path(os.path.abspath(out))
    if workers < 0:
        raise ConfigError(f"{workers} processes can't write shards", where="--workers", fix="Take 0 for one a core")
    asked = {"format": FORMAT, "fingerprint": index.fingerprint(), "images": len(index), **asked, "verify": verify}
    _check_place(index, root, asked)
    index.check_files()
    if (root / MANIFEST).exists() and not (root / PARTIAL).exists():
        return _complete(root, layout, began)
    try:
        (root / PARTIAL).mkdir(parents=True, exist_ok=True)
        with alone(root, root / PARTIAL / "lock", "writes shards into the folder"):
            for torn in root.glob(".shard-*.tmp"):  # of a process that was killed
                torn.unlink(missing_ok=True)
            with replacing(root / PARTIAL / ASKED) as file:
                file.write(json.dumps(asked).encode())
            return _write_all(index, layout, root, asked, workers or len(os.sched_getaffinity(0)), progress, began)
    except BrokenProcessPool as error:
        fix = "The same command goes on from there; take fewer --workers if memory was short"
        raise EnvironmentProblem("A process that writes shards was killed", where=str(root), fix=fix) from error


def room_needed(layout: Layout, kept: set[int]) -> int:
    """Bytes that the shards take which are not `kept`, with their indexes (on the safe side)."""
    counts = np.diff(layout.first_S1)
    return sum(int(layout.size_S[s] + 200 * counts[s]) for s in range(len(layout)) if s not in kept)


def _write_all(
    index: Index,
    layout: Layout,
    root: Path,
    asked: dict[str, Any],
    workers: int,
    progress: Progress | None,
    began: float,
) -> ShardsReport:
    kept = {s for s in range(len(layout)) if (root / PARTIAL / f"{shard_name(s)}.json").exists()}
    _check_room(root, room_needed(layout, kept))
    tasks = [
        Task(index.path, root, s, int(first), layout.sample_N[first:last], layout.digits, asked["verify"])
        for s, (first, last) in enumerate(zip(layout.first_S1[:-1], layout.first_S1[1:], strict=True))
    ]
    written = done = 0
    records: list[dict[str, Any]] = []
    for task, (record, new) in zip(tasks, _run(tasks, workers), strict=True):
        records.append(record)
        written, done = written + new, done + len(task.samples)
        if progress is not None:
            progress(done, len(index))
    bad = _write_index(index, layout, root, records, asked)
    total = sum(record["bytes"] for record in records)
    manifest = {"asked": asked, "shards": [record["bytes"] for record in records], "bad": len(bad)}
    with replacing(root / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())
    shutil.rmtree(root / PARTIAL)
    images = len(index) - len(bad)
    return ShardsReport(root / FILE_NAME, images, len(tasks), total, written, bad, time.monotonic() - began)


def _run(tasks: list[Task], workers: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Carry out the tasks, in this process or in others; results in the order of the tasks."""
    if workers == 1 or len(tasks) == 1:
        yield from map(write_shard, tasks)
        return
    # Spawned, not forked: the caller may have threads by now.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=start_worker)
    try:
        yield from pool.map(write_shard, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_index(
    index: Index, layout: Layout, root: Path, records: list[dict[str, Any]], asked: dict[str, Any]
) -> list[BadFile]:
    """Write the new index and the list of what was left out; returns that."""
    offset_N = np.concatenate([np.array(record["offsets"], dtype=np.int64) for record in records])
    bad = sorted((BadFile(*entry) for record in records for entry in record["bad"]), key=lambda entry: entry.path)
    write_bad(root / Path(FILE_NAME).with_suffix(".bad.jsonl"), bad)
    good_N = offset_N >= 0
    if not good_N.any():
        raise DataError(f"None of the {len(bad)} images can be used; the first, {bad[0].path}: {bad[0].reason}")
    sample_N = layout.sample_N[good_N]
    shard_N = np.repeat(np.arange(len(layout)), np.diff(layout.first_S1))[good_N]
    names = pa.array([f"{shard_name(s)}.tar" for s in range(len(layout))], pa.large_string())
    columns: dict[str, Any] = {
        "key": index.keys(sample_N),
        "path": names.take(shard_N),
        "offset": offset_N[good_N],
    }
    columns |= {name: getattr(index, name)[sample_N] for name in ("length", "width", "height", "label")}
    about = {
        "version": VERSION,
        "classes": index.classes,
        "root": ".",
        "root_absolute": str(root),
        "tool": f"mvp-fast {__version__}",
        "verified": asked["verify"],
    }
    with replacing(root / FILE_NAME) as file:
        write_table(pa.table(columns, schema=COLUMNS), about, file)
    return bad


def _check_place(index: Index, root: Path, asked: dict[str, Any]) -> None:
    """DataError where `root` holds something else than shards of these images with these settings."""
    if index.is_synthetic:
        raise DataError("A synthetic index has no images", fix="Index a folder of images")
    if root.exists() and not root.is_dir():
        raise DataError("Shards go into a folder, but this is a file", where=str(root), fix="Give another --out")
    found = root / PARTIAL / ASKED
    if not found.exists():
        found = root / MANIFEST
    if not found.exists():
        others = sorted(p.name for p in root.iterdir() if p.name != PARTIAL) if root.exists() else []
        if others:
            fix = "Give --out an empty folder, or a new one"
            raise DataError(f"The folder holds other files, such as {others[0]}", where=str(root), fix=fix)
        return
    try:
        before = json.loads(found.read_text())
        before = before["asked"] if found.name == MANIFEST else before
        differs = sorted(name for name in before.keys() | asked.keys() if before.get(name) != asked.get(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("The file can't be read", where=str(found), fix="Give another --out") from error
    if differs:
        told = "; ".join(f"{name} was {before.get(name)}, is {asked.get(name)}" for name in differs)
        fix = "Give the same options and images, or another --out"
        raise DataError(f"The folder holds other shards: {told}", where=str(root), fix=fix)


def _complete(root: Path, layout: Layout, began: float) -> ShardsReport:
    """The report of a complete set; DataError where a file is gone or of another length."""
    sizes = json.loads((root / MANIFEST).read_text())["shards"]
    for s, size in enumerate(sizes):
        path = root / f"{shard_name(s)}.tar"
        if not path.exists() or path.stat().st_size != size:
            fix = f"Remove {root / MANIFEST} and the folder's other files, and convert anew"
            what = f"The set was complete, but {path.name} is no longer {size:,} bytes long"
            raise DataError(what, where=str(root), fix=fix)
    images = len(Index.open(root))
    return ShardsReport(root / FILE_NAME, images, len(sizes), sum(sizes), 0, [], time.monotonic() - began)


def _check_room(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise EnvironmentProblem(
            f"The shards take {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free",
            where=str(root),
            fix="Make room, or give --out a place on another disk",
        )
