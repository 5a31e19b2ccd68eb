"""A .beton, FFCV's file format, beside the index that `mvp-fast data convert --to beton` writes with it.

The file says where its samples are; the index says the same again. A sample for which the two do not agree is bad: so
damage to the file's tables is found before a byte of pixels is read.

The format's version 2, little-endian: a header; a descriptor a field; the table, a row a sample and a column a field;
pages with the samples' bytes; a table of allocations, which is not needed here. The tests hold this to FFCV's reader.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import DataError
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.samples.index import Index

SUFFIX = ".beton"
VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
COLUMNS = (np.dtype("<f8"), np.dtype("<i8"), IMAGE, _BYTES, np.dtype("<u8"), _BYTES, np.dtype("<u8"))
"""The table's column of each type of field, by type_id: float, int, RGB image, bytes, array, JSON, tensor."""
JPEG, RAW = 0, 1
"""How an image is stored: the column `mode`."""
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
        view, done = into.data, 0
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

    def wrong(what: str) -> DataError:
        return DataError(what, where=str(path), fix=_CONVERT)

    try:
        with open(path, "rb") as file:
            start = file.read(HEADER.itemsize)
            if len(start) < HEADER.itemsize:
                raise wrong(f"The beton is cut short: it has {len(start)} bytes")
            header = np.frombuffer(start, HEADER)[0]
            if header["version"] != VERSION:
                raise wrong(f"The beton has version {header['version']}, or is none: version {VERSION} is read")
            if header["num_samples"] != samples:
                raise wrong(f"The beton has {header['num_samples']:,} samples, and its index has {samples:,}")
            fields = np.frombuffer(file.read(FIELD.itemsize * int(header["num_fields"])), FIELD)
            types = fields["type_id"].tolist()
            if len(types) != header["num_fields"] or COLUMNS.index(IMAGE) not in types or max(types) >= len(COLUMNS):
                raise wrong(f"The beton's header is damaged, or it holds no images: its fields have the types {types}")
            row = np.dtype([("", COLUMNS[kind]) for kind in types], align=True)
            table = np.fromfile(file, row, samples)
    except FileNotFoundError as error:
        raise wrong("The beton is missing") from error
    except IsADirectoryError as error:
        raise wrong("The beton is a folder") from error
    except ValueError as error:  # np.frombuffer of a piece of a descriptor
        raise wrong(f"The beton is cut short: {error}") from error
    if len(table) != samples:
        raise wrong(f"The beton is cut short: {len(table):,} of {samples:,} rows of its table are there")
    image = table[f"f{types.index(COLUMNS.index(IMAGE))}"]
    return np.asarray(image)
