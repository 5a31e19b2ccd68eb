"""Writes a set of scenes into a folder, with several processes, so that it can be interrupted and taken up again.

While a set is drawn, DIR/scenes.partial holds what was asked for, a file of rows for each finished chunk of images,
and files that are being written: every file is renamed into place when it is whole. scenes.json comes last.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.samples.scenes.draw import draw, encode_image, encode_mask
from mvp_fast.samples.scenes.folder import ASKED, MANIFEST, MASKS, PARTIAL, TABLE, SceneSet, SetReport, find_complete
from mvp_fast.samples.scenes.layout import layout
from mvp_fast.samples.scenes.records import make_row, read_rows, rows_as_text, write_table
from mvp_fast.samples.scenes.spec import find_profile
from mvp_fast.samples.workers import alone, start_worker

CHUNK = 16
"""Images that a worker draws at a time; an interrupted run loses the chunks that were under way."""

Progress = Callable[[int], None]
"""Called with the number of images done so far."""


def write_set(folder: str | Path, asked: SceneSet, workers: int = 0, progress: Progress | None = None) -> SetReport:
    """Draw the set `asked` into `folder`, or what an interrupted call left to do; nothing where it is complete.

    Args:
        folder: made where it is missing.
        asked: what to draw.
        workers: processes; 0 takes as many as there are cores. With 1 the calling process draws. A script that asks
            for more needs the guard `if __name__ == "__main__"`, as always where processes are spawned.
        progress: called after every chunk.

    Raises:
        ConfigError: there is no such set, or `workers` is negative.
        DataError: the folder holds another set or other files, or another process draws into it.
        EnvironmentProblem: the folder can't be written, the disk is full, or a worker was killed.
    """
    asked.check()
    if workers < 0:
        raise ConfigError(f"{workers} workers can't draw", where="--workers", fix="take 0 for one a core, or more")
    root = Path(folder)
    try:
        found = find_complete(root, asked)
        if found and not (root / PARTIAL).exists():
            return found
        (root / PARTIAL).mkdir(parents=True, exist_ok=True)
        with alone(root, root / PARTIAL / "lock", "draws into the folder"):
            return _draw_set(root, asked, workers or len(os.sched_getaffinity(0)), progress or (lambda done: None))
    except OSError as error:
        raise _explain(error, root) from error
    except BrokenProcessPool as error:
        fix = "The same command goes on from there; take fewer --workers if memory was short"
        raise EnvironmentProblem("a process that draws scenes was killed", where=str(root), fix=fix) from error


def _draw_set(root: Path, asked: SceneSet, workers: int, progress: Progress) -> SetReport:
    """Draw all chunks that are not done yet, then the table and the manifest."""
    began = time.monotonic()
    found = find_complete(root, asked)  # again: another process may have had the lock until now
    if found:
        shutil.rmtree(root / PARTIAL)
        return found
    _place(root, root / PARTIAL / ASKED, json.dumps(asked.manifest()).encode())
    for name in asked.classes():
        (root / name).mkdir(exist_ok=True)
        (root / MASKS / name).mkdir(parents=True, exist_ok=True)
    drawn = done = 0
    for images, new in _run_chunks(root, asked, workers):
        done, drawn = done + images, drawn + new
        progress(done)

    unfinished = root / PARTIAL / TABLE
    chunks = range(-(-asked.images // CHUNK))
    length = write_table(unfinished, (row for chunk in chunks for row in read_rows(_rows_file(root, chunk))))
    os.replace(unfinished, root / TABLE)
    manifest = {**asked.manifest(), "bytes": length}
    _place(root, root / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    shutil.rmtree(root / PARTIAL)
    return SetReport(root, asked.images, asked.classes(), length, drawn, time.monotonic() - began)


def _run_chunks(root: Path, asked: SceneSet, workers: int) -> Iterator[tuple[int, int]]:
    """Draw every chunk, in this process or in `workers` others; yields what `draw_chunk` returns, in any order."""
    chunks = iter(range(-(-asked.images // CHUNK)))
    if workers == 1:
        for chunk in chunks:
            yield draw_chunk(root, asked, chunk)
        return
    # Spawned, not forked: the caller may have threads (and a GPU) by now.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        waiting: set[Future[tuple[int, int]]] = set()
        for chunk in chunks:
            waiting.add(pool.submit(draw_chunk, root, asked, chunk))
            if len(waiting) >= 3 * workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def draw_chunk(root: Path, asked: SceneSet, chunk: int) -> tuple[int, int]:
    """Write the images, the masks and the rows of one chunk, unless they are all there.

    Returns:
        how many images the chunk has, and how many were drawn now.
    """
    numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, asked.images))
    if _chunk_is_there(root, chunk):
        return len(numbers), 0
    profile, classes, rows = find_profile(asked.profile), asked.classes(), []
    for number in numbers:
        scene = layout(asked.seed, profile, number, asked.pairs)
        drawing = draw(scene)
        jpeg = encode_image(drawing, scene)
        key = f"{scene.label}/{number:06d}"
        _place(root, root / f"{key}.jpg", jpeg)
        _place(root, root / MASKS / f"{key}.png", encode_mask(drawing))
        rows.append(make_row(key, scene, drawing, classes, len(jpeg)))
    _place(root, _rows_file(root, chunk), rows_as_text(rows))
    return len(numbers), len(numbers)


def _chunk_is_there(root: Path, chunk: int) -> bool:
    """Whether a run before this one finished the chunk, and its files are still as long as they were."""
    try:
        return all(
            (root / f"{row['key']}.jpg").stat().st_size == row["bytes"]
            and (root / MASKS / f"{row['key']}.png").stat().st_size > 0
            for row in read_rows(_rows_file(root, chunk))
        )
    except FileNotFoundError:
        return False


def _rows_file(root: Path, chunk: int) -> Path:
    return root / PARTIAL / f"{chunk:06d}.jsonl"


def _place(root: Path, path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = root / PARTIAL / f"{os.getpid()}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _explain(error: OSError, root: Path) -> EnvironmentProblem:
    """What the system refused, for users."""
    where = str(error.filename or root)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Make room and give the same command again; it goes on from there"
        return EnvironmentProblem("the disk is full", where=where, fix=fix)
    what = f"the set can't be written: {(error.strerror or str(error)).lower()}"
    return EnvironmentProblem(what, where=where, fix="Give a folder that you may write to --out")
