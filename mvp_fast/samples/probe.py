"""Looking into image files, in as many processes as asked for. Imports PIL only, so that a process starts quickly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import NamedTuple

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.samples.encoded_image import BrokenImageError, judge, open_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
CHUNK = 256


class Probe(NamedTuple):
    """What is known of a file: its length in bytes and size in pixels, or the reason why it can't be used."""

    length: int = 0
    width: int = 0
    height: int = 0
    reason: str = ""


def probe(file: str, verify: bool) -> Probe:
    """Read an image's header; with `verify`, judge the whole file as the loaders do."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Probe(reason="not a regular file")
        if status.st_size == 0:
            return Probe(reason="the file is empty")
        with open(file, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images that are large, of metadata that is odd
            if verify:
                width, height = judge(stream.read())
            else:
                with open_image(stream) as image:
                    width, height = image.size
    except OSError as error:
        return Probe(reason=error.strerror or str(error))
    except BrokenImageError as error:
        return Probe(reason=str(error))
    except MemoryError:
        return Probe(reason="decoding it takes more memory than there is")
    if width < 1 or height < 1:
        return Probe(reason=f"the image has {width} x {height} pixels")
    return Probe(status.st_size, width, height)


def probe_chunk(root: str, paths: Sequence[str], verify: bool) -> list[Probe]:
    """`probe` for files relative to `root`."""
    return [probe(os.path.join(root, path), verify) for path in paths]


def probe_all(root: str, paths: Sequence[str], verify: bool, workers: int) -> Iterator[list[Probe]]:
    """`probe` for files relative to `root`, in their order, in lists of CHUNK and a shorter last one.

    With 1 worker, or a single chunk, the calling process does the work.

    Raises:
        EnvironmentProblem: one of the processes was killed.
    """
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    if workers == 1 or len(chunks) <= 1:
        for chunk in chunks:
            yield probe_chunk(root, chunk, verify)
        return
    # spawn: a fork would copy the threads' locks of whatever the caller has loaded.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context, initializer=_ignore_interrupts)
    try:
        yield from pool.map(probe_chunk, repeat(root), chunks, repeat(verify))
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "A process that reads images was killed", where=root, fix="Take fewer --workers if memory was short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
