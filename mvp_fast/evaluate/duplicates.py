"""Test images that are in the training set too, byte for byte."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import numpy.typing as npt

from mvp_fast.evaluate.progress import Tell
from mvp_fast.samples.index import Index

GLANCE = 4096  # bytes, from the middle of an image: headers are alike


def duplicates(train: Index, test: Index, tell: Tell = lambda done: None) -> npt.NDArray[np.int64]:
    """Rows of `test` whose encoded bytes are also those of a sample of `train`: int64, ascending.

    Samples of one length and size in both sets are compared by a part, and those still alike by all their bytes
    (SHA-256). A file that can't be read is like none.

    Args:
        tell: called with the number of images looked at, of all in both sets.
    """
    sizes = [np.stack((index.length, index.width, index.height), axis=1) for index in (train, test)]
    _, kind = np.unique(np.concatenate(sizes), axis=0, return_inverse=True)
    kinds = kind[: len(train)], kind[len(train) :]
    shared = np.intersect1d(*kinds)
    rows = [np.flatnonzero(np.isin(each, shared)) for each in kinds]
    done = len(train) + len(test) - len(rows[0]) - len(rows[1])
    for whole in (False, True):
        digests: list[list[bytes]] = [[], []]
        for which, index in enumerate((train, test)):
            for row in rows[which].tolist():
                digests[which].append(_digest(index, row, whole))
                done += not whole
                tell(done)
        both = (set(digests[0]) & set(digests[1])) - {b""}
        rows = [
            each[np.array([digest in both for digest in found], dtype=np.bool_)]
            for each, found in zip(rows, digests, strict=True)
        ]
    return rows[1]


def _digest(index: Index, row: int, whole: bool) -> bytes:
    """Of a sample's bytes, or of a part of them together with their number; empty where they can't be read."""
    offset, length = int(index.offset[row]), int(index.length[row])
    if not whole:
        offset += max(length - GLANCE, 0) // 2
    try:
        file = os.open(index.file(row), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.pread(file, length if whole else min(GLANCE, length), offset)
        finally:
            os.close(file)
    except OSError:
        return b""
    return hashlib.sha256(length.to_bytes(8, "little") + found).digest()
