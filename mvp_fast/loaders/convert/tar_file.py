"""One WebDataset shard: its tar file, its index for DALI, and the record that says that both are finished."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mvp_fast.loaders import encoded
from mvp_fast.loaders.convert.layout import BLOCK, describe, extension
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.samples.files import replacing
from mvp_fast.samples.index import Index

PARTIAL = "shards.partial"
"""The folder of records, inside the folder of shards."""


@dataclass(frozen=True)
class Task:
    """One shard to write, for a process that has neither index nor layout.

    Attributes:
        index: the images' index file.
        out: the folder of shards.
        shard: its number.
        first: the place of its first sample in the new order.
        samples: rows of the index.
        digits: how many digits a place has in the names of members.
        verify: decode every image.
    """

    index: Path
    out: Path
    shard: int
    first: int
    samples: npt.NDArray[np.int64]
    digits: int
    verify: bool


def shard_name(shard: int) -> str:
    """A shard's name without its extension."""
    return f"shard-{shard:06d}"


def write_shard(task: Task) -> tuple[dict[str, Any], bool]:
    """Write one shard and its record, unless both are there and whole.

    Returns:
        The record, and whether the shard was written now.
    """
    name = shard_name(task.shard)
    path = task.out / PARTIAL / f"{name}.json"
    record = _read_record(task.out, name, path)
    if record is not None:
        return record, False
    index = _open(task.index)
    lines: list[str] = []
    offsets: list[int] = []  # -1 for a bad one
    bad: list[tuple[str, str]] = []
    with replacing(task.out / f"{name}.tar") as file:
        summing = _Summing(file)
        with tarfile.open(fileobj=summing, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place, sample in enumerate(task.samples.tolist(), start=task.first):
                try:
                    data = encoded.read(index, sample)
                    if task.verify or not data.plain_jpeg:  # what is no JPEG has no cheaper check
                        encoded.decode(index, sample, data)
                except BadSampleError as error:
                    bad.append((index.key(sample), error.reason))
                    offsets.append(-1)
                    continue
                members = [(extension(data.data), data.data), *describe(index, sample)]
                line = [_add(tar, f"{place:0{task.digits}d}", *member) for member in members]
                offsets.append(int(line[0].split()[1]))
                lines.append(" ".join(line))
    with replacing(task.out / f"{name}.idx") as file:
        file.write("".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines)).encode())
    record = {"bytes": summing.length, "sha256": summing.digest.hexdigest(), "offsets": offsets, "bad": bad}
    with replacing(path) as file:
        file.write(json.dumps(record).encode())
    return record, True


def _add(tar: tarfile.TarFile, name: str, kind: str, data: bytes) -> str:
    """Add one member; returns its part of the line in DALI's index: extension, offset, length and name."""
    member = tarfile.TarInfo(f"{name}.{kind}")  # its defaults: owned by 0, of time 0, mode 644
    member.size = len(data)
    offset = tar.offset + BLOCK
    tar.addfile(member, io.BytesIO(data))
    return f"{kind} {offset} {len(data)} {member.name}"


class _Summing(io.RawIOBase):
    """A file for tarfile to write to, that adds up a checksum on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.length = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.length


def _read_record(out: Path, name: str, path: Path) -> dict[str, Any] | None:
    """The record of a finished shard whose files are whole; None where there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        with open(out / f"{name}.tar", "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
        lines = (out / f"{name}.idx").read_text().splitlines()
    except (FileNotFoundError, ValueError, KeyError):
        return None
    good = sum(offset >= 0 for offset in record["offsets"])
    return record if same and lines[:1] == [f"v1.2 {good}"] and len(lines) == good + 1 else None


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> Index:
    """The index, opened once a process."""
    return Index.open(path)
