"""The order of an epoch over shards: large sequential regions at a time, mixed in a window. No list, no state.

For each seed and epoch, the samples stand in a circle: shard after shard, the shards permuted, the samples of a shard
as they lie in it. The epoch begins at a random place of the circle. Cut from there into windows of W samples (the last
one is shorter), each window is permuted by itself. So

- position -> sample is a permutation of [0, n), computed for any position alone in O(log shards);
- every sample comes at every position equally often over the epochs: the beginning is uniform over the circle;
- W positions in a row lie in two windows at most: in 2 W samples of the circle that are neighbours in their shards.

Ranks take their slices of the global batch as always, and so all of them read the same few shards at a time. Shards of
its own for each rank, as is common, would make the order depend on the number of ranks.

The permutations are those of `order`: Feistel networks with Philox. Of an epoch a table is kept, of 16 bytes a shard:
where each shard comes to stand.

Shape legend: B samples, S shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvp_fast.samples.compiled import compiled
from mvp_fast.samples.order import ROUNDS, half_bits, order, permuted
from mvp_fast.samples.random import Stream, draws, key_words

Int64Array = npt.NDArray[np.int64]

_WINDOW = np.uint64(int(Stream.WINDOW) << 16)


@compiled
def _find(k0, k1, epoch, position_B, n, window, bits, last_bits, shift, begin_S, first_S, out_B):  # type: ignore[no-untyped-def]
    for b in range(position_B.size):
        number = position_B[b] // window
        base = number * window
        size, half = (window, bits) if base + window <= n else (n - base, last_bits)
        place = (base + permuted(k0, k1, _WINDOW, epoch, number, position_B[b] - base, size, half) + shift) % n
        low, high = 0, begin_S.size
        while high - low > 1:
            middle = (low + high) // 2
            if begin_S[middle] <= place:
                low = middle
            else:
                high = middle
        out_B[b] = first_S[low] + (place - begin_S[low])


@dataclass(frozen=True)
class _Circle:
    """One epoch's circle: the place each shard begins at, the sample that is there, and where the epoch begins."""

    begin_S: npt.NDArray[np.uint64]
    first_S: npt.NDArray[np.uint64]
    shift: int


class ShardedOrder:
    """Position -> sample, for shards that are runs of the index.

    Args:
        starts: where each shard begins, and the number of samples: int64 (S + 1), ascending.
        seed: in [0, 2**64).
        window: samples that are mixed at a time, 1 or more.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, starts: Int64Array, seed: int, window: int) -> None:
        if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 1).any():
            raise ValueError("shards begin at 0, and each has a sample or more")
        self.samples, self.seed = int(starts[-1]), seed
        self.window = min(window, self.samples)
        if window < 1 or self.samples // self.window >= 1 << 32:
            raise ValueError(f"windows of {window} of {self.samples} samples: 1 to 2**32 windows are possible")
        self._starts = starts
        self._circles: dict[int, _Circle] = {}  # of the epochs asked for last; replaced, never changed

    def fingerprint(self) -> str:
        """SHA-256 over where the shards begin."""
        return hashlib.sha256(np.ascontiguousarray(self._starts.astype("<i8")).data).hexdigest()

    def __call__(self, epoch_B: Int64Array, position_B: Int64Array) -> Int64Array:
        """The samples at given positions, in [0, samples), of given epochs, in [0, 2**32): int64 (B,)."""
        out_B = np.empty(position_B.shape, dtype=np.int64)
        for epoch in np.unique(epoch_B).tolist():
            these = epoch_B == epoch
            out_B[these] = self._of_epoch(epoch, position_B[these])
        return out_B

    def _of_epoch(self, epoch: int, position_B: Int64Array) -> Int64Array:
        circle, n, window = self._circle(epoch), self.samples, self.window
        k0, k1 = key_words(self.seed)
        numbers = (n, window, half_bits(window), half_bits(n % window or window), circle.shift)
        out_B = np.empty(len(position_B), dtype=np.int64)
        _find(
            np.uint64(k0), np.uint64(k1), np.uint64(epoch), position_B.astype(np.uint64), *map(np.uint64, numbers),
            circle.begin_S, circle.first_S, out_B,
        )  # fmt: skip
        return out_B

    def _circle(self, epoch: int) -> _Circle:
        found = self._circles.get(epoch)
        if found is None:
            shards = len(self._starts) - 1
            shard_S = order(self.seed, epoch, np.arange(shards), shards, Stream.SHARDS)
            end_S = np.cumsum(np.diff(self._starts)[shard_S])
            begin_S = np.concatenate([[0], end_S[:-1]])
            low, high = (int(word) for word in draws(self.seed, Stream.SHARDS, epoch, 0, ROUNDS)[0, :2])
            shift = (high << 32 | low) * self.samples >> 64
            found = _Circle(begin_S.astype(np.uint64), self._starts[shard_S].astype(np.uint64), shift)
            self._circles = {**dict(list(self._circles.items())[-1:]), epoch: found}
        return found
