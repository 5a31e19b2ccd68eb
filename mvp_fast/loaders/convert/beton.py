"""From an index to a .beton, FFCV's file format, and the index of that.

    OUT.beton          the images as FFCV's writer stores them, fields: image, label, row (of the source index)
    OUT.parquet        its index: path, offset and length in the beton, the stored sizes; keys, labels and classes stay
    OUT.bad.jsonl      what was left out, if anything was, as `data index --verify` lists it
    OUT.beton.parts/   while the work goes on:
        job.json         what is made of what; another job does not go on with it
        lock             held by the process at work
        000000.beton     a finished part, and 000000.json its bad samples: gone when it is joined
        000000.npz       the journal of a part that was joined
        joined.beton     the beton to be

Work is done in parts of the source's rows, each written in one process, joined in their order. So neither the number of
processes nor an interruption changes a byte of what comes out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mvp_fast import __version__
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.loaders import ffcv_library
from mvp_fast.loaders.beton import SUFFIX
from mvp_fast.loaders.convert import beton_parts
from mvp_fast.loaders.convert.beton_estimate import Estimate, check_room
from mvp_fast.loaders.convert.beton_join import Join, Joined, write_beside
from mvp_fast.loaders.convert.beton_parts import PAGE, Form
from mvp_fast.samples.files import replacing
from mvp_fast.samples.index import COLUMNS, VERSION, Index
from mvp_fast.samples.index_build import BadFile, write_bad, write_table
from mvp_fast.samples.workers import alone

FORMAT = 1
"""Changes whenever the same images would be stored in other bytes."""
SIDES = (16, 1600)  # a raw image of the greatest side still fits into a page
LEAST, MOST, PARTS = 64, 1024, 200
"""Samples a part, at least and at most; between them, so many parts."""
FEW_SECONDS = 20
"""Work that one process does in about the time that others need to import FFCV (which imports torch)."""

Progress = Callable[[int, int], None]
"""Called with the number of samples done and their total."""


@dataclass(frozen=True)
class BetonReport:
    """What `write_beton` did.

    Attributes:
        path, index: the beton and its index.
        images: in it.
        bytes: its size.
        bad: what was left out; also in `bad_path`.
        bad_path: the list beside the index, whether or not there is one.
        resumed: samples that an earlier attempt had done.
        seconds: what it took.
    """

    path: Path
    index: Path
    images: int
    bytes: int
    bad: list[BadFile]
    bad_path: Path
    resumed: int
    seconds: float


def default_out(index: Index, form: Form) -> Path:
    """Where a beton goes that was given no name: beside the index."""
    return index.path.with_name(f"{index.path.stem}-{form.mode}{form.side}{SUFFIX}")


def write_beton(
    index: Index,
    out: Path | None,
    form: Form,
    workers: int = 0,
    tell: Callable[[Estimate, int], None] | None = None,
    progress: Progress | None = None,
) -> BetonReport:
    """Convert the images of an index; goes on with what an interrupted attempt of the same job left.

    Args:
        index: the source.
        out: the beton to write, ending in .beton; `default_out` where it is None.
        form: how samples are stored.
        workers: processes; 0 takes one a core, or this one alone for little work. A script that asks for more than 1
            needs the guard `if __name__ == "__main__"`, as always with processes that are spawned.
        tell: called with the estimate, and the bytes that are free there, before the work starts.
        progress: called now and then.

    Raises:
        ConfigError: a number out of range, a name without .beton, or one whose index would replace the source's.
        DataError: what is to be written is there, the work of another job is under way there, or no image is usable.
        EnvironmentProblem: FFCV is missing, there is too little room, another process is at it, or one was killed.
    """
    began = time.monotonic()
    path = _check(index, out, form, workers)
    folder = path.with_name(path.name + ".parts")
    bounds = _bounds(len(index))
    with _at_work(folder, path, _job(index, form, bounds)):
        join = Join(folder / "joined.beton", form, len(index))
        done = join.go_on([_part(folder, k).with_suffix(".npz") for k in range(len(bounds))])
        resumed = sum(count for _, count in bounds[:done])
        resumed += sum(count for k, (_, count) in enumerate(bounds[done:], done) if _part(folder, k).exists())
        if done < len(bounds):
            seconds = check_room(index, form, folder, resumed, tell)
            workers = workers or (1 if seconds < FEW_SECONDS else len(os.sched_getaffinity(0)))
        for k in _parts(index, form, folder, bounds, done, workers):
            join.add(_part(folder, k), _part(folder, k).with_suffix(".npz"))
            if progress is not None:
                progress(sum(bounds[k]), len(index))
        bad = [BadFile(entry.key, entry.reason) for part in join.parts for entry in part.bad]
        bad_path = path.with_suffix(".bad.jsonl")
        write_bad(bad_path, bad)
        if len(bad) == len(index):
            raise DataError(
                f"None of the {len(bad):,} images can be used; the first, {bad[0].path}: {bad[0].reason}",
                where=str(index.path),
                fix=f"See {bad_path}",
            )
        join.finish()
        _write_index(index, path, join.parts)
        os.replace(folder / "joined.beton", path)
    shutil.rmtree(folder)
    seconds = time.monotonic() - began
    images, size = len(index) - len(bad), path.stat().st_size
    return BetonReport(path, path.with_suffix(".parquet"), images, size, bad, bad_path, resumed, seconds)


def _check(index: Index, out: Path | None, form: Form, workers: int) -> Path:
    """The beton's path."""
    ffcv_library.need_ffcv("--to beton")
    if index.is_synthetic:
        raise DataError("A synthetic index has no images to convert", fix="Give an index of image files")
    if not SIDES[0] <= form.side <= SIDES[1]:
        raise ConfigError("Images can't be stored with this side", where=f"--side {form.side}", fix="Take 16 to 1600")
    if not 1 <= form.quality <= 100:
        raise ConfigError("JPEG has qualities 1 to 100", where=f"--quality {form.quality}")
    if workers < 0:
        raise ConfigError(f"{workers} processes can't convert", where="--workers", fix="Take 0 for one a core")
    path = default_out(index, form) if out is None else out
    if path.suffix != SUFFIX:
        raise ConfigError("A beton's name ends in .beton", where=f"--out {path}")
    if path.with_suffix(".parquet").resolve() == index.path.resolve():
        raise ConfigError(
            f"The beton's index, {path.with_suffix('.parquet')}, would replace the index it is made from",
            where=f"--out {path}",
            fix="Give --out another name",
        )
    return path


def _job(index: Index, form: Form, bounds: list[tuple[int, int]]) -> dict[str, Any]:
    return {"format": FORMAT, "source": index.fingerprint(), **asdict(form), "page": PAGE, "parts": len(bounds)}


@contextmanager
def _at_work(folder: Path, path: Path, job: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of parts for this process and this job."""
    try:
        if not folder.exists():
            for there in (path, path.with_suffix(".parquet")):
                if there.exists():
                    raise DataError(
                        "The output is there already", where=str(there), fix="Remove it, or give another --out"
                    )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"There is no writing here: {error.strerror}",
            where=str(folder),
            fix="Give --out a place with room and the rights to write",
        ) from error
    with alone(path, folder / "lock", "converts to this file"):
        try:
            found = json.loads((folder / "job.json").read_text())
        except FileNotFoundError:
            found = job
            write_beside(folder / "job.json", (json.dumps(job, indent=1) + "\n").encode())
        except ValueError:
            found = None
        if found != job:
            raise DataError(
                "An unfinished conversion lies here, of another index or with other options",
                where=str(folder),
                fix="Give the same options to go on with it, or remove the folder to start anew",
            )
        for left in folder.glob(".*.tmp*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield


def _bounds(samples: int) -> list[tuple[int, int]]:
    """First sample and number of samples of each part; they depend on nothing but the number of all."""
    size = min(MOST, max(LEAST, -(-samples // PARTS)))
    return [(first, min(size, samples - first)) for first in range(0, samples, size)]


def _part(folder: Path, k: int) -> Path:
    return folder / f"{k:06d}{SUFFIX}"


def _parts(
    index: Index, form: Form, folder: Path, bounds: list[tuple[int, int]], done: int, workers: int
) -> Iterator[int]:
    """Have the parts from `done` on written; yields their numbers, in order, as they are finished."""
    if done == len(bounds):
        return
    if workers == 1:
        for k in range(done, len(bounds)):
            beton_parts.write_part(index, form, *bounds[k], _part(folder, k))
            yield k
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
    pool = ProcessPoolExecutor(
        min(workers, len(bounds) - done),
        mp_context=context,
        initializer=beton_parts.start_worker,
        initargs=(index.path.absolute(), form),
    )
    pending: deque[tuple[int, Future[None]]] = deque()
    waiting = deque(range(done, len(bounds)))
    try:
        while pending or waiting:
            while waiting and len(pending) < 2 * workers:  # not all: finished parts that wait take up the disk
                k = waiting.popleft()
                pending.append((k, pool.submit(beton_parts.work, *bounds[k], _part(folder, k))))
            k, future = pending.popleft()
            future.result()
            yield k
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "A process that converts images was killed",
            where=str(folder),
            fix="Take fewer --workers if memory was short; the same command goes on with what is finished",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_index(index: Index, path: Path, parts: list[Joined]) -> None:
    """The index of the beton, beside it."""
    image, row, size = (np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "row", "size"))
    columns = {
        "key": pa.array([index.key(i) for i in row.tolist()], pa.large_string()),
        "path": pa.array([path.name] * len(row), pa.large_string()),
        "offset": image["data_ptr"].astype(np.int64),
        "length": size.astype(np.int64),
        "width": image["width"].astype(np.int32),
        "height": image["height"].astype(np.int32),
        "label": index.label[row].astype(np.int32),
    }
    about = {
        "version": VERSION,
        "classes": index.classes,
        "root": ".",
        "root_absolute": os.path.abspath(path.parent),
        "tool": f"mvp-fast {__version__}",
        "verified": True,
        "source": index.fingerprint(),
    }
    with replacing(path.with_suffix(".parquet")) as file:
        write_table(pa.table(columns, schema=COLUMNS), about, file)
