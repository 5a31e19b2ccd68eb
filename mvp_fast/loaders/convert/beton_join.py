"""Joins parts to one .beton, a part at a time, so that an interruption loses nothing and the disk holds little twice.

The bytes are those that FFCV's DatasetWriter writes of the same samples with one worker: samples one after the other,
none across the border of a page, pointers into the file, the table of samples before them, the table of allocations
after them. While parts are missing, a journal, one file a joined part, says where its samples lie and where the next
one goes; the joined part itself is removed.

The number of samples, on which the beginning of the first page depends, is taken as the source's; where bad ones were
left out, the table is shorter than its room.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import DataError
from mvp_fast.loaders import ffcv_library
from mvp_fast.loaders.convert.beton_parts import PAGE, Bad, Form, read_part


@dataclass(frozen=True)
class Joined:
    """What the journal knows of a part: its samples with pointers into the joined file, and where that ends.

    Attributes:
        image: FFCV's table, structured (n,) with mode, width, height, data_ptr.
        label, row, size: int64 (n,).
        bad: the samples that were left out.
        end: int64, offset of the first byte behind the part's samples.
    """

    image: NDArray[Any]
    label: NDArray[np.int64]
    row: NDArray[np.int64]
    size: NDArray[np.int64]
    bad: list[Bad]
    end: int


def write_beside(path: Path, data: bytes) -> None:
    """Write a file that has its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Join:
    """The file that parts are joined to.

    Args:
        path: the joined file, in the folder of the parts.
        form: how samples are stored.
        samples: of the source.
    """

    def __init__(self, path: Path, form: Form, samples: int) -> None:
        self._path, self._fields = path, form.fields()
        types = ffcv_library.load("ffcv.types")
        self._types, self._metadata_type = types, types.get_metadata_type(list(self._fields.values()))
        self._tables = types.HeaderType.itemsize + len(self._fields) * types.FieldDescType.itemsize
        end = self._tables + samples * self._metadata_type.itemsize
        self._end = -(-end // PAGE) * PAGE
        self._parts: list[Joined] = []

    @property
    def parts(self) -> list[Joined]:
        """The parts that were joined, in their order."""
        return self._parts

    def go_on(self, journals: list[Path]) -> int:
        """Take up the parts of an earlier attempt that were joined, in their order; how many there were."""
        for path in journals:
            if not path.exists():
                break
            self._parts.append(_read_journal(path))
            self._end = self._parts[-1].end
        if self._parts and (not self._path.exists() or self._path.stat().st_size < self._end):
            raise DataError(
                "An unfinished conversion lost what it had joined",
                where=str(self._path),
                fix="Remove the folder, and start again",
            )
        return len(self._parts)

    def add(self, path: Path, journal: Path) -> Joined:
        """Join a part, journal it, and remove it."""
        part = read_part(path)
        pointers = self._place(part.size_n)
        with open(self._path, "r+b" if self._path.exists() else "wb") as file:
            file.truncate(self._end)  # what an interrupted attempt wrote behind it goes; padding reads as zeros
            for source, target, size in zip(part.samples["data_ptr"], pointers, part.size_n, strict=True):
                file.seek(int(target))
                file.write(part.data[int(source) : int(source) + int(size)].data)
            file.flush()
            os.fsync(file.fileno())
        end = int(pointers[-1] + part.size_n[-1]) if len(pointers) else self._end
        image = part.samples.copy()
        image["data_ptr"] = pointers
        joined = Joined(image, part.label_n, part.row_n, part.size_n, part.bad, end)
        _write_journal(journal, joined)
        self._parts.append(joined)
        self._end = end
        path.unlink()
        path.with_suffix(".json").unlink()
        return joined

    def _place(self, size_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples of these sizes go: one behind the other, the next page where one does not fit into this."""
        at, pointers = self._end, np.empty(len(size_n), np.int64)
        for i, size in enumerate(size_n.tolist()):
            if at % PAGE + size > PAGE:
                at = -(-at // PAGE) * PAGE
            pointers[i] = at
            at += size
        return pointers

    def finish(self) -> None:
        """Write the tables; the file is a beton then."""
        types = self._types
        image, label, row, size = (
            np.concatenate([getattr(part, name) for part in self._parts]) for name in ("image", "label", "row", "size")
        )
        metadata = np.zeros(len(image), self._metadata_type)
        for name, column in zip(metadata.dtype.names or (), (image, label, row), strict=True):
            metadata[name] = column
        allocations = np.zeros(len(image), types.ALLOC_TABLE_TYPE)
        for name, values in (("sample_id", np.arange(len(image))), ("ptr", image["data_ptr"]), ("size", size)):
            allocations[name] = values
        header = np.zeros(1, types.HeaderType)
        header["version"], header["num_samples"] = types.CURRENT_VERSION, len(image)
        header["num_fields"], header["page_size"] = len(self._fields), PAGE
        header["alloc_table_ptr"] = end = -(-self._end // PAGE) * PAGE
        with open(self._path, "r+b") as file:
            file.truncate(end)
            file.write(header.tobytes())
            file.write(self._descriptors().tobytes())
            file.write(metadata.tobytes())
            file.seek(end)
            file.write(allocations.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _descriptors(self) -> NDArray[Any]:
        """What the file says of its fields."""
        numbers = {kind: number for number, kind in self._types.TYPE_ID_HANDLER.items()}
        described = np.zeros(len(self._fields), self._types.FieldDescType)
        for entry, (name, each) in zip(described, self._fields.items(), strict=True):
            entry["type_id"] = numbers[type(each)]
            entry["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
            entry["arguments"][:] = each.to_binary()[0]
        return described


def _write_journal(path: Path, part: Joined) -> None:
    stream = io.BytesIO()
    bad = json.dumps([asdict(entry) for entry in part.bad])
    np.savez(stream, image=part.image, label=part.label, row=part.row, size=part.size, bad=bad, end=part.end)
    write_beside(path, stream.getvalue())


def _read_journal(path: Path) -> Joined:
    try:
        with np.load(path) as found:
            bad = [Bad(**entry) for entry in json.loads(str(found["bad"]))]
            image, label, row, size = (found[name] for name in ("image", "label", "row", "size"))
            return Joined(image, label, row, size, bad, int(found["end"]))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The journal of an unfinished conversion is damaged: {error}",
            where=str(path),
            fix=f"Remove the folder {path.parent}, and start again",
        ) from error
