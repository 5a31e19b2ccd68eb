"""How fast the data set's own files are read: some of them, at random, by several threads, for a few seconds.

Files are dropped from the page cache first, which the kernel does as far as it can (posix_fadvise, DONTNEED). Whether
the bytes then came from the disk, the kernel says too (read_bytes in /proc/self/io); where it says less than was read,
or nothing, the rate may be the cache's.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvp_fast.doctor.row import Row, State, told
from mvp_fast.errors import DataError

SECONDS = 2.0
"""Longest that files are read, and longest that they are dropped from the cache before."""
THREADS = 8
MOST = 20_000  # files that are looked at in a folder, and pieces that are drawn


@dataclass(frozen=True)
class Piece:
    """An image's bytes: in a file of its own, or somewhere in a shard."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Rate:
    """What was read.

    Attributes:
        from_disk: bytes of it that came from the storage layer, as the kernel counts them; None where it doesn't.
    """

    images: int
    bytes: int
    seconds: float
    from_disk: int | None

    @property
    def cached(self) -> bool:
        """Whether a part may have come from the page cache."""
        return self.from_disk is None or self.from_disk < 0.9 * self.bytes


def disk_rows(options: dict[str, Any]) -> list[Row]:
    """The row of the data folder; none where no folder was given."""
    if not options["data"]:
        return []
    place = Path(options["data"])
    fix = "mvp-fast data index DIR writes an index; give --data that, or a folder of images"
    try:
        pieces = find_pieces(place)
    except DataError as error:
        return [Row("data", State.BROKEN, error.paragraph(), "reading the data", fix)]
    if not pieces:
        return [Row("data", State.BROKEN, f"no images in {place}", "reading the data", fix)]
    try:
        rate = measure(pieces)
    except OSError as error:
        return [Row("data", State.BROKEN, told(error), "reading the data", "mvp-fast data index DIR, anew")]
    if not rate.images:
        return [Row("data", State.BROKEN, f"not one image of {place} was read", "reading the data", fix)]
    return [_row(place, rate)]


def _row(place: Path, rate: Rate) -> Row:
    images, size = rate.images / rate.seconds, rate.bytes / rate.images
    words = f"{rate.bytes / rate.seconds / 1e6:,.0f} MB/s, {images:,.0f} images/s of {size / 1000:.0f} KB"
    words += f", {THREADS} threads at random in {place}"
    facts = {
        "bytes_per_second": rate.bytes / rate.seconds,
        "images_per_second": images,
        "images": rate.images,
        "seconds": rate.seconds,
        "from_disk_bytes": rate.from_disk,
        "may_be_cached": rate.cached,
    }
    if not rate.cached:
        return Row("data", State.OK, f"{words}, from the disk", facts=facts)
    if rate.from_disk is None:
        words += "; perhaps from the page cache: the kernel does not tell"
    else:
        words += f"; {100 * rate.from_disk / rate.bytes:.0f} % from the disk, the rest may be the page cache's rate"
    return Row("data", State.NOTE, words, "the disk's own rate", "a data set larger than the memory tells", facts=facts)


def find_pieces(place: Path, seed: int | None = None) -> list[Piece]:
    """Up to MOST images of an index or a folder, in random order.

    Raises:
        DataError: there is no such place, or the index can't be read.
    """
    draw = random.Random(seed)
    if not place.exists():
        raise DataError("There is nothing at this path", where=str(place))
    if place.is_file() or (place / "index.parquet").exists():
        from mvp_fast.samples.index import Index

        index = Index.open(place)
        chosen = draw.sample(range(len(index)), min(MOST, len(index)))
        return [Piece(index.file(i), int(index.offset[i]), int(index.length[i])) for i in chosen]
    found = list(_images(place))
    draw.shuffle(found)
    return found


def _images(folder: Path) -> Iterator[Piece]:
    from mvp_fast.samples.probe import EXTENSIONS

    seen = 0
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                path = Path(above, name)
                if path.is_file():  # no pipe, which would be waited for
                    yield Piece(path, 0, path.stat().st_size)
                    seen += 1
            if seen >= MOST:
                return


def measure(pieces: list[Piece], seconds: float = SECONDS, threads: int = THREADS) -> Rate:
    """Drop pieces from the page cache, then read them, each once, for at most `seconds`.

    Raises:
        OSError: a file can't be opened or read.
    """
    dropped = _drop(pieces, seconds)
    lock, waiting = threading.Lock(), iter(pieces[:dropped])
    give_up = time.perf_counter() + seconds

    def read() -> tuple[int, int]:
        images = size = 0
        while time.perf_counter() < give_up:
            with lock:
                piece = next(waiting, None)
            if piece is None:
                break
            handle = os.open(piece.path, os.O_RDONLY)
            try:
                size += len(os.pread(handle, piece.length, piece.offset))
            finally:
                os.close(handle)
            images += 1
        return images, size

    before, start = _from_disk(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        counts = [future.result() for future in [pool.submit(read) for _ in range(threads)]]
    took, after = time.perf_counter() - start, _from_disk()
    came = None if before is None or after is None else after - before
    return Rate(sum(images for images, _ in counts), sum(size for _, size in counts), took, came)


def _drop(pieces: list[Piece], seconds: float) -> int:
    """Drop pieces from the page cache for at most `seconds`; how many were. Pages not yet written can't be dropped."""
    give_up = time.perf_counter() + seconds
    for number, piece in enumerate(pieces):
        if time.perf_counter() > give_up:
            return number
        handle = os.open(piece.path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, piece.offset, piece.length, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return len(pieces)


def _from_disk() -> int | None:
    """Bytes that this process has had fetched from storage so far; None where the kernel does not count them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    counts = dict(line.split(": ", 1) for line in lines)
    return int(counts["read_bytes"]) if "read_bytes" in counts else None
