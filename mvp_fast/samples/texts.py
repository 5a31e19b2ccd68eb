"""Columns of text as Arrow holds them: the bytes of all texts one after the other, and where each begins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def runs(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    """Where each run of equal texts begins, and how many texts there are: int64 (runs + 1)."""
    new = pc.not_equal(texts.slice(1), texts.slice(0, len(texts) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(new) + 1, [len(texts)]]).astype(np.int64)


def lengths(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    """How many bytes each text has: int64 (n,)."""
    return np.diff(_bounds(texts))


def content(texts: pa.LargeStringArray) -> memoryview:
    """The bytes of all texts, one after the other."""
    bounds = _bounds(texts)
    return memoryview(texts.buffers()[2] or b"")[bounds[0] : bounds[-1]]


def _bounds(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    # Arrow's layout: buffer 1 holds where each text begins in buffer 2, and where the last one ends.
    bounds = np.frombuffer(memoryview(texts.buffers()[1] or b""), dtype=np.int64)
    return bounds[texts.offset : texts.offset + len(texts) + 1]
