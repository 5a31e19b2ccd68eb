"""What the compiled (numba) parts of the plan share: the decorator and a scalar Philox.

Kept apart from random.py because numba takes a while to import, and the index needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from mvp_fast.samples.random import INCREMENTS, MULTIPLIERS, ROUNDS


def compiled(function: Callable[..., Any]) -> Any:
    """numba.njit, without the GIL, its machine code kept on disk so that only the first run ever compiles.

    numba keeps it beside the source, else in the user's cache folder, else where NUMBA_CACHE_DIR points. With none
    of them writable it refuses to decorate at all; then the code is compiled anew in each process (seconds).
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(nogil=True)(function)


_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in INCREMENTS)
_ROUNDS = ROUNDS
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@compiled
def philox4x32_scalar(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Philox 4x32-10 of one counter: four counter words and two key words as uint64, below 2**32 each.

    Returns four words as uint64, below 2**32 each. uint64 because numba widens 32-bit arithmetic anyway.
    """
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3
