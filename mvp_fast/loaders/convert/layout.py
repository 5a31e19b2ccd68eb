"""Which sample goes into which tar file, and how large the files become: known from the index alone.

A sample is two or three members of its shard, named by its place in the new order:

    00000017.jpg    the encoded image as it was found, byte for byte; its extension says what it is
    00000017.cls    the label, in digits; only in sets with classes
    00000017.json   key, width, height, and with classes label and class

The new order is a permutation of the index, so that a shard is a sample of the whole set, not of a class or two.

Shape legend: N samples, S shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvp_fast.errors import ConfigError
from mvp_fast.samples.index import Index

BLOCK = 512
"""What a header takes in a tar file, and what members are filled up to (POSIX.1-1988, ustar)."""
RECORD = 20 * BLOCK
"""What a whole tar file is filled up to, after two blocks of zeros."""
LEAST_DIGITS = 8

_KINDS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"))


@dataclass(frozen=True)
class Layout:
    """Where every sample goes.

    Attributes:
        sample_N: int64, the sample at each place of the new order.
        first_S1: int64 (S + 1), the place that each shard begins with, and N.
        size_S: int64, bytes of each tar file where no sample is bad.
        digits: how many digits a place has in the names of members.
    """

    sample_N: npt.NDArray[np.int64]
    first_S1: npt.NDArray[np.int64]
    size_S: npt.NDArray[np.int64]
    digits: int

    def __len__(self) -> int:
        return len(self.size_S)

    @property
    def bytes(self) -> int:
        """All tar files together."""
        return int(self.size_S.sum())


def lay_out(index: Index, shard_size: int, seed: int = 0) -> Layout:
    """Divide the samples of an index into shards of `shard_size` bytes or less, each as full as the next sample lets.

    Args:
        index: of image files or of other shards.
        shard_size: bytes, tar headers and padding included.
        seed: of the order; decides nothing else.

    Raises:
        ConfigError: a sample is larger than that.
    """
    from mvp_fast.samples.order import order  # numba: processes that write shards do without it

    n = len(index)
    sample_N = order(seed, 0, np.arange(n), n)
    room = shard_size - 2 * BLOCK
    first, sizes, filled = [0], [], 0
    for place, sample in enumerate(sample_N.tolist()):
        size = member_size(int(index.length[sample]))
        size += sum(member_size(len(text)) for _, text in describe(index, sample))
        if size > room or tar_size(size) > shard_size:
            raise ConfigError(
                f"{index.key(sample)} takes {tar_size(size):,} bytes in a tar file of its own",
                where=f"--shard-size is {shard_size:,} bytes",
                fix="Take larger shards",
            )
        if tar_size(filled + size) > shard_size:
            first.append(place)
            sizes.append(tar_size(filled))
            filled = 0
        filled += size
    sizes.append(tar_size(filled))
    digits = max(LEAST_DIGITS, len(str(n - 1)))
    return Layout(sample_N, np.array([*first, n]), np.array(sizes), digits)


def member_size(length: int) -> int:
    """What a member of `length` bytes takes in a tar file."""
    return BLOCK + -(-length // BLOCK) * BLOCK


def tar_size(members: int) -> int:
    """What a tar file takes whose members take `members` bytes."""
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD


def describe(index: Index, sample: int) -> Iterator[tuple[str, bytes]]:
    """What goes into the shard beside a sample's image: extensions and contents."""
    label = int(index.label[sample])
    about: dict[str, object] = {"key": index.key(sample)}
    about |= {"width": int(index.width[sample]), "height": int(index.height[sample])}
    if index.classes:
        about |= {"label": label, "class": index.classes[label] if label >= 0 else None}
        yield "cls", str(label).encode()
    yield "json", json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()


def extension(data: bytes) -> str:
    """The extension of an encoded image, by its content."""
    return next((name for magic, name in _KINDS if data.startswith(magic)), "webp")
