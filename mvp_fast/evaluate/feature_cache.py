"""Features on disk: made once, written batch by batch, never taken for another network's or set's.

    FOLDER/KEY/about.json         what these are features of; KEY is a hash of it
               features.npy       (N, L, P, D): the samples that decoded, in the index's order
               progress.json      how many samples are done, and which of them did not decode
               bad_samples.jsonl  why not

`progress.json` is renamed into place after what it counts is on disk, so a killed extraction goes on where it was.
`about.json` has to match in full.

Shape legend: B samples of a batch, N of a set, K of them in use, L layers, P poolings, D channels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvp_fast.errors import EnvironmentProblem


@dataclass(frozen=True)
class Features:
    """Features of a set or of a part of it.

    Attributes:
        values_NLPD: float16 or float32, on disk or in memory.
        rows_K: int64, rows of the set's index.
        places_K: int64, where each is in `values_NLPD`.
        bad: rows of the index that did not decode and are left out.
    """

    values_NLPD: npt.NDArray[Any]
    rows_K: npt.NDArray[np.int64]
    places_K: npt.NDArray[np.int64]
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows_K)

    def of_rows(self, rows: npt.NDArray[np.int64]) -> Features:
        """Those of these rows of the index that are here, in their order."""
        kept_K = np.isin(self.rows_K, rows)
        bad = tuple(np.intersect1d(np.array(self.bad, dtype=np.int64), rows).tolist())
        return replace(self, rows_K=self.rows_K[kept_K], places_K=self.places_K[kept_K], bad=bad)

    def at(self, position_J: npt.NDArray[np.int64]) -> Features:
        """Those at these positions among the K."""
        return replace(self, rows_K=self.rows_K[position_J], places_K=self.places_K[position_J])

    def gather(self, position_B: npt.NDArray[np.int64], layers: Sequence[int]) -> npt.NDArray[Any]:
        """(B, len(layers), P * D): all poolings, joined, of the samples at these positions among the K."""
        found: npt.NDArray[Any] = self.values_NLPD[self.places_K[position_B][:, None], np.array(layers)]
        return found.reshape(len(position_B), len(layers), -1)

    def column(self, layer: int, pooling: int) -> Column:
        """One layer's features by one pooling, (K, D), read as it is sliced."""
        return Column(self, layer, pooling)


@dataclass(frozen=True)
class Column:
    """(K, D) features that are read from disk a slice of rows at a time."""

    features: Features
    layer: int
    pooling: int

    @property
    def shape(self) -> tuple[int, int]:
        """K and D."""
        return len(self.features), self.features.values_NLPD.shape[-1]

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        return np.asarray(self.features.values_NLPD[self.features.places_K[rows], self.layer, self.pooling])


class FeatureCache:
    """The files of one set's features.

    Args:
        folder: of all caches; this one has a folder of its own in it.
        about: what the features depend on, JSON-able; `shape` is their (N, L, P, D).
        dtype: of the values.

    Attributes:
        folder: this one's.
        ledger: where the loader writes which samples did not decode, and why.
    """

    def __init__(self, folder: Path, about: dict[str, Any], dtype: Any) -> None:
        text = json.dumps(about, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.about, self.dtype = about, np.dtype(dtype)
        self.shape: tuple[int, int, int, int] = tuple(about["shape"])
        self.ledger = self.folder / "bad_samples.jsonl"
        self._values = self.folder / "features.npy"
        self._row = int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def matches(self) -> bool:
        """Whether the folder says that it holds these features, in a file of this shape."""
        try:
            same = bool(json.loads((self.folder / "about.json").read_text(encoding="utf-8")) == self.about)
            values = np.load(self._values, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return False
        return same and values.shape == self.shape and values.dtype == self.dtype

    def read_progress(self) -> tuple[int, list[int]]:
        """Samples done, and those of them that did not decode."""
        try:
            found = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            return int(found["done"]), [int(row) for row in found["bad"]]
        except (OSError, ValueError, KeyError, TypeError):
            return 0, []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here meanwhile."""
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EnvironmentProblem(
                    "Another process is writing these features",
                    where=str(self.folder),
                    fix="Wait for it, or give another --out",
                ) from error
            yield
        finally:
            os.close(lock)

    def begin(self) -> tuple[int, list[int]]:
        """Where to go on: what is there, or an empty file."""
        if self.matches():
            return self.read_progress()
        with _told(self.folder):
            for name in ("progress.json", "bad_samples.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            need, free = self.shape[0] * self._row, shutil.disk_usage(self.folder).free
            if need > free:
                raise EnvironmentProblem(
                    f"The features take {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
                    where=str(self.folder),
                    fix="Free some space, or give an --out on another disk",
                )
            # Sparse. Written by calls, not through memory: a full disk is then an error and no crash.
            with open(self._values, "wb") as file:
                header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + need)
            (self.folder / "about.json").write_text(json.dumps(self.about, indent=1) + "\n", encoding="utf-8")
        return 0, []

    @contextmanager
    def writing(self) -> Iterator[int]:
        """The file of the features, open."""
        with _told(self.folder):
            file = os.open(self._values, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)

    def write(self, file: int, place: int, values_BLPD: npt.NDArray[Any]) -> None:
        """Write rows from `place` on."""
        view = memoryview(values_BLPD.tobytes())
        at = self._values.stat().st_size - (self.shape[0] - place) * self._row
        with _told(self.folder):
            while view:
                written = os.pwrite(file, view, at)
                view, at = view[written:], at + written

    def save(self, file: int, done: int, bad: list[int]) -> None:
        """Record progress, after what it counts is on disk."""
        with _told(self.folder):
            os.fsync(file)
            temporary = self.folder / ".progress.json.tmp"
            temporary.write_text(json.dumps({"done": done, "bad": bad}), encoding="utf-8")
            os.replace(temporary, self.folder / "progress.json")

    def features(self) -> Features:
        """All of them; the set is complete."""
        _, bad = self.read_progress()
        values_NLPD = np.load(self._values, mmap_mode="r", allow_pickle=False)
        rows_K = np.setdiff1d(np.arange(self.shape[0]), bad)
        return Features(values_NLPD, rows_K, np.arange(len(rows_K)), tuple(bad))


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What a person can do where the system refuses."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"The features can't be written: {error.strerror or error}",
            where=str(folder),
            fix="Free some space or mend the folder's rights, and give the same command again: it goes on from here",
        ) from error
