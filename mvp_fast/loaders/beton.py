"""A .beton, FFCV's file format, beside the index that `mvp-fast data convert --to beton` writes with it.

FFCV's reader says what the file holds; the index says the same again. A sample for which the two do not agree is bad:
so damage to the file's tables is found before a byte of pixels is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import DataError
from mvp_fast.loaders import ffcv_library
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.loaders.ffcv_library import JPEG, RAW
from mvp_fast.samples.index import Index

SUFFIX = ".beton"
_CONVERT = "Write a beton and its index with `mvp-fast data convert INDEX --to beton`"


@dataclass(frozen=True)
class Beton:
    """An open beton; `close` it.

    Attributes:
        path: the file.
        descriptor: of the open file.
        raw_n: bool (n,), the sample's pixels are stored as they are; else as a JPEG.
        fits_n: bool (n,), the file's table says of the sample what the index says.
    """

    path: Path
    descriptor: int
    raw_n: NDArray[np.bool_]
    fits_n: NDArray[np.bool_]

    @classmethod
    def open(cls, index: Index) -> Beton:
        """Open the beton that an index describes.

        Raises:
            DataError: the index is not of a beton, the file is missing, of another version, damaged in its header, or
                has another number of samples.
            EnvironmentProblem: FFCV is not installed.
            OSError: this process is out of file descriptors or memory.
        """
        path = _path(index)
        image = _image_table(path, len(index))
        raw_n = np.asarray(image["mode"] == RAW)
        fits_n = (
            (image["data_ptr"] == index.offset.astype(np.uint64))
            & (image["width"] == index.width)
            & (image["height"] == index.height)
            & (raw_n | (image["mode"] == JPEG))
        )
        pixels_n = 3 * index.width.astype(np.int64) * index.height
        fits_n &= ~raw_n | (index.length == pixels_n)
        return cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), raw_n, fits_n)

    def close(self) -> None:
        """Close the file; call it once."""
        os.close(self.descriptor)

    def check(self, sample: int) -> None:
        """BadSampleError where the file's table does not say of a sample what the index says."""
        if not self.fits_n[sample]:
            raise BadSampleError("stale", "the beton's table of samples says something else of it than the index")

    def read(self, offset: int, into: NDArray[np.uint8]) -> None:
        """Read the bytes from `offset` on into uint8 (length,).

        Read, not mapped: a file that was cut short gives an error here, where a mapped one would end the process.

        Raises:
            BadSampleError: the file ends before that, or can't be read.
        """
        view, done = memoryview(into), 0
        while done < len(view):
            try:
                more = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise BadSampleError("missing", f"the file cannot be read: {error.strerror}") from error
            if not more:
                size = os.fstat(self.descriptor).st_size
                raise BadSampleError("stale", f"the file has {size} bytes, the index says {offset + len(view)}")
            done += more


def _path(index: Index) -> Path:
    """The one file of all samples; DataError where that is no beton."""
    if index.is_synthetic:
        raise DataError("The loader `ffcv` needs a beton, and a synthetic index has no file", fix=_CONVERT)
    path = index.file(0)
    if path.suffix != SUFFIX or index.file(len(index) - 1) != path:
        raise DataError(
            f"The loader `ffcv` reads a beton, but this index is of other files, such as {path}",
            where=str(index.path),
            fix=f"{_CONVERT}, and give its index as data.index",
        )
    return path


def _image_table(path: Path, samples: int) -> NDArray[Any]:
    """What the file says of its images: a structured array (n,) of mode, width, height and data_ptr."""
    module = ffcv_library.load("ffcv.reader")
    if not path.exists():
        raise DataError("The beton is missing", where=str(path), fix=_CONVERT)
    version = np.fromfile(path, "<u2", 1)
    known = ffcv_library.load("ffcv.types").CURRENT_VERSION
    if len(version) and int(version[0]) != known:
        raise DataError(
            f"The beton has version {int(version[0])}, or is none: FFCV reads version {known}",
            where=str(path),
            fix=_CONVERT,
        )
    try:
        reader = module.Reader(str(path))
        kinds = [type(handler).__name__ for handler in reader.handlers.values()]
        number, table = int(reader.num_samples), reader.metadata
        image = table[table.dtype.names[kinds.index("RGBImageField")]]
    except OSError:
        raise
    except Exception as error:  # a damaged header gives FFCV anything: IndexError, KeyError, MemoryError, ValueError
        raise DataError(
            f"The beton's header is damaged: FFCV's reader says {type(error).__name__}: {error}",
            where=str(path),
            fix=_CONVERT,
        ) from error
    if len(table) != number:
        raise DataError(
            f"The beton is cut short: {len(table):,} of {number:,} entries of its table are there",
            where=str(path),
            fix=_CONVERT,
        )
    if number != samples:
        raise DataError(
            f"The beton has {number:,} samples, its index {samples:,}: they do not belong together",
            where=str(path),
            fix=_CONVERT,
        )
    return np.asarray(image)
