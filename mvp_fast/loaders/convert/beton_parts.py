"""A part of a data set as a .beton of its own, written by FFCV's DatasetWriter in one process, and read again.

A part is finished when its file has its name: it is written beside and renamed. Its list of bad samples is renamed
first. Parts are temporary; `beton.py` joins them.

Shape legend: H and W pixels, C channels.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import DataError
from mvp_fast.loaders import encoded, ffcv_library
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.samples import workers
from mvp_fast.samples.index import Index

PAGE = 1 << 23
"""Bytes of a page, FFCV's unit of writing; a sample lies within one. FFCV's default."""
FIELDS = ("image", "label", "row")
WRITE_MODES = {"raw": "raw", "jpeg": "jpg", "mixed": "proportion"}
"""Our names and FFCV's; mixed draws for each sample whether it is stored raw or as a JPEG, one half each."""


@dataclass(frozen=True)
class Form:
    """How samples are stored.

    Attributes:
        mode: raw, jpeg or mixed.
        side: greatest width and height, pixels; larger images are shrunk (OpenCV's area filter), none is enlarged.
        quality: of JPEG, 1 to 100.
    """

    mode: str
    side: int
    quality: int

    def fields(self) -> dict[str, Any]:
        """FFCV's fields, by name."""
        fields = ffcv_library.load("ffcv.fields")
        image = fields.RGBImageField(
            write_mode=WRITE_MODES[self.mode], max_resolution=self.side, jpeg_quality=self.quality
        )
        return dict(zip(FIELDS, (image, fields.IntField(), fields.IntField()), strict=True))


@dataclass(frozen=True)
class Bad:
    """A sample that was left out: its row and key in the source index, and why."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A finished part.

    Attributes:
        samples: FFCV's table of the good samples, structured (n,) with mode, width, height, data_ptr; label_n and
            row_n int64 (n,).
        size_n: int64 (n,), bytes of each good sample.
        data: the file, mapped: uint8.
        bad: the samples that were left out.
    """

    samples: NDArray[Any]
    label_n: NDArray[np.int64]
    row_n: NDArray[np.int64]
    size_n: NDArray[np.int64]
    data: NDArray[np.uint8]
    bad: list[Bad]


def decode(index: Index, row: int, side: int) -> NDArray[np.uint8]:
    """A sample judged and decoded in full, by the judgement of all loaders: uint8 RGB (H, W, 3).

    FFCV shrinks it to `side` itself, but fails where that leaves less than a pixel of the shorter side; so an image
    that is longer and thinner than that is shrunk here.

    Raises:
        BadSampleError: it cannot be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are large, of metadata that is odd
        image_HWC = np.asarray(encoded.decode(index, row, encoded.read(index, row)))
    height, width = image_HWC.shape[:2]
    longest, shortest = max(height, width), min(height, width)
    if longest > side and int(side / longest * shortest) < 1:
        import cv2

        size = (side, 1) if width > height else (1, side)
        image_HWC = np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA))
    return image_HWC


class _Samples:
    """What DatasetWriter reads from: (image, label, row); a bad sample is one black pixel with row -1."""

    def __init__(self, index: Index, first: int, count: int, side: int) -> None:
        self._index, self._first, self._count, self._side = index, first, count, side
        self.bad: list[Bad] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int, int]:
        row = self._first + int(i)
        try:
            return decode(self._index, row, self._side), int(self._index.label[row]), row
        except BadSampleError as error:
            bad = Bad(row, self._index.key(row), error.reason)
            if bad not in self.bad:  # FFCV asks once more where a sample does not fit into a page
                self.bad.append(bad)
            return np.zeros((1, 1, 3), np.uint8), -1, -1


def _writer(path: Path, form: Form) -> Any:
    """FFCV's DatasetWriter, working in this process.

    FFCV starts processes of its own and waits for ever where one of them ends early, as on a full disk. What they do is
    done here one after the other, by FFCV's functions: prepare, the work of one worker, finalize.
    """
    module = ffcv_library.load("ffcv.writer")

    class Writer(module.DatasetWriter):  # type: ignore[name-defined]
        def _write_common(self, num_samples: int, queue_content: Any, work_fn: Any, extra_worker_args: Any) -> None:
            self.num_samples = num_samples
            self.prepare()
            try:
                work: Any = queue.SimpleQueue()
                for todo in (*queue_content, None):
                    work.put(todo)
                allocations: Any = queue.SimpleQueue()
                allocator = module.MemoryAllocator(self.fname, self.data_region_start, self.page_size)
                done = multiprocessing.Value("Q", 0)
                arguments = work, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations
                work_fn(*arguments, *extra_worker_args)
                self.finalize(allocations.get())
            finally:
                self.metadata_sm.unlink()
                with contextlib.suppress(BufferError):  # an error's traceback still holds it
                    self.metadata_sm.close()

    return Writer(str(path), form.fields(), page_size=PAGE, num_workers=1)


def write_part(index: Index, form: Form, first: int, count: int, path: Path) -> None:
    """Write samples `first` to `first + count - 1` as the part `path`; nothing if it is there.

    The bytes depend on the samples and `form` alone.

    Raises:
        OSError: the disk is full, or has another fault.
    """
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    samples = _Samples(index, first, count, form.side)
    np.random.seed(first % (1 << 32))  # noqa: NPY002 (FFCV draws with it which samples of a mixed part become JPEG)
    try:
        _writer(temporary, form).from_indexed_dataset(samples)
        _check_whole(temporary)
        listed = temporary.with_suffix(".json")
        listed.write_text(json.dumps([asdict(bad) for bad in sorted(samples.bad, key=lambda bad: bad.row)]))
        os.replace(listed, path.with_suffix(".json"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_whole(path: Path) -> None:
    """FFCV does not look at how much of a page was written: on a full disk the last one may be short."""
    reader = ffcv_library.load("ffcv.reader").Reader(str(path))
    table = int(reader.header["alloc_table_ptr"])
    if table % PAGE or path.stat().st_size != table + reader.alloc_table.nbytes:
        raise OSError(28, os.strerror(28), str(path))


def read_part(path: Path) -> Part:
    """Read a finished part.

    Raises:
        DataError: it is damaged.
    """
    try:
        reader = ffcv_library.load("ffcv.reader").Reader(str(path))
        bad = [Bad(**entry) for entry in json.loads(path.with_suffix(".json").read_text())]
        image, label, row = (reader.metadata[name] for name in reader.metadata.dtype.names)
        sizes = dict(zip(reader.alloc_table["sample_id"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
        size_n = np.array([sizes[i] for i in range(len(image))], np.int64)
        good = row >= 0
        data = np.memmap(path, np.uint8, "r")
        return Part(image[good], label[good], row[good], size_n[good], data, bad)
    except OSError:
        raise
    except Exception as error:
        raise DataError(
            f"An unfinished conversion left a damaged part: {type(error).__name__}: {error}",
            where=str(path),
            fix="Remove this file and start again: what else is finished stays",
        ) from error


_source: tuple[Index, Form] | None = None


def start_worker(index: Path, form: Form) -> None:
    """Make a worker process ready: open the index once, and end when the parent is gone."""
    global _source
    workers.start_worker()
    _source = Index.open(index), form


def work(first: int, count: int, path: Path) -> None:
    """`write_part` in a worker process."""
    if _source is None:
        raise RuntimeError("the process was not started with start_worker")
    write_part(*_source, first, count, path)
