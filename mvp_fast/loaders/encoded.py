"""Encoded images: reading a sample's bytes, judging them cheaply, and decoding them with Pillow.

Every backend reads through here, so that all of them call the same samples bad. What counts as bad:

- the file is missing or cannot be read, or is not as long as the index says;
- the image can't be used, by the judgement of `samples.encoded_image` that `data index --verify` passes too;
- the decoded image is not as large as the index says, and so the plan's box would not fit it.

Where a faster decoder refuses an image, Pillow has the last word.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from mvp_fast.samples.encoded_image import BrokenImageError, check_markers, open_image, to_rgb
from mvp_fast.samples.index import Index

BadKind = Literal["missing", "stale", "broken"]

# Trouble of this process, not of a file: these are no reason to call a sample bad.
_OUR_TROUBLE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class BadSampleError(Exception):
    """A sample that cannot be used.

    Attributes:
        kind: `missing` (no such file), `stale` (the file is not the one that was indexed) or `broken`.
        reason: what is wrong, for the ledger; the same in every backend.
    """

    def __init__(self, kind: BadKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of one sample, as the index describes it.

    Attributes:
        data: the encoded image.
        plain_jpeg: a grey or colour JPEG of a usual kind. Anything else (PNG, WebP, CMYK, ...) is rare in training
            sets, and decoders differ in their treatment of it: it is left to Pillow in every backend.
    """

    data: bytes
    plain_jpeg: bool


def read(index: Index, sample: int) -> Encoded:
    """Read one sample's bytes and judge them as far as that is cheap.

    Args:
        index: the index; its offset, length, width and height are what the bytes are held against.
        sample: row of the index.

    Raises:
        BadSampleError: missing, unreadable, of another length, cut short, or of another size than indexed.
        OSError: this process is out of file descriptors or memory.
    """
    data = _read_bytes(index.file(sample), int(index.offset[sample]), int(index.length[sample]))
    try:
        header = check_markers(data)
    except BrokenImageError as error:
        raise BadSampleError("broken", str(error)) from error
    if header is None:
        return Encoded(data, plain_jpeg=False)
    wrong = _wrong_size(index, sample, header.width, header.height)
    if wrong is not None:
        raise wrong
    return Encoded(data, plain_jpeg=header.usual and header.components in (1, 3))


def expect(index: Index, sample: int) -> None:
    """Ask the system to have one sample's bytes in memory when `read` comes for them; does not wait, never fails."""
    try:
        descriptor = os.open(index.file(sample), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # as `read` opens it
    except OSError:  # `read` will say what is wrong
        return
    try:
        length = int(index.length[sample])
        os.posix_fadvise(descriptor, int(index.offset[sample]), length, os.POSIX_FADV_WILLNEED)
    except OSError:  # a file system without it
        return
    finally:
        os.close(descriptor)


def decode(index: Index, sample: int, encoded: Encoded) -> Image.Image:
    """Decode the whole image with Pillow, to RGB (see `to_rgb`): the last word on whether a sample is bad.

    Raises:
        BadSampleError: Pillow refuses it, or the image is not as large as the index says.
    """
    try:
        with open_image(io.BytesIO(encoded.data)) as image:
            wrong = _wrong_size(index, sample, *image.size)
            if wrong is None:
                return to_rgb(image)
    except BrokenImageError as error:
        raise BadSampleError("broken", str(error)) from error
    raise wrong


def _read_bytes(path: os.PathLike[str], offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. A sample at offset 0 is a file of its own, which must end where the sample does."""
    try:
        # O_NONBLOCK: opening a pipe would wait for ever. On files it has no effect.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadSampleError("missing", "not a regular file")
            size = status.st_size
            if size < offset + length or (offset == 0 and size != length):
                raise BadSampleError("stale", f"the file has {size} bytes, the index says {offset + length}")
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # a read of more than 2 GiB, or one interrupted on a network file system
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    raise BadSampleError("stale", f"the file ended after {len(data)} of {length} bytes")
                data += more
            return data
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSampleError("missing", "the file is missing") from error
    except OSError as error:
        if error.errno in _OUR_TROUBLE:
            raise
        raise BadSampleError("missing", f"the file cannot be read: {error.strerror}") from error


def _wrong_size(index: Index, sample: int, width: int, height: int) -> BadSampleError | None:
    """What to raise where the image is not as large as the index says."""
    indexed = int(index.width[sample]), int(index.height[sample])
    if (width, height) == indexed:
        return None
    return BadSampleError("stale", f"the image is {width}x{height} pixels, the index says {indexed[0]}x{indexed[1]}")
