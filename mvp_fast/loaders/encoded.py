"""Encoded images: reading a sample's bytes, judging them cheaply, and decoding them with Pillow.

Every backend reads through here, so that all of them call the same samples bad. What counts as bad:

- the file is missing or cannot be read, or is not as long as the index says;
- a JPEG without an end-of-image marker after its header: it was cut short. libjpeg fills such images with grey in
  silence (where padding follows, Pillow does too), so the marker is looked for here, before any decoder;
- the decoded image is not as large as the index says, and so the plan's box would not fit it;
- Pillow does not decode it. Where a faster decoder refuses an image, Pillow has the last word.

EXIF orientation is ignored throughout: width, height and boxes are those of the stored pixels.
"""

from __future__ import annotations

import errno
import io
import os
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mvp_fast.samples.index import Index
from mvp_fast.samples.probe import FORMATS

BadKind = Literal["missing", "stale", "broken"]

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
# Frame headers (ITU-T T.81, table B.1): baseline, extended sequential and progressive, all Huffman-coded.
_USUAL_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
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
class JpegHeader:
    """What a JPEG's markers say up to the first scan.

    Attributes:
        width, height: pixels as stored.
        components: 1 grey, 3 colour, 4 CMYK or YCCK.
        usual: 8 bits a sample, Huffman-coded, sequential or progressive: what every decoder takes.
        scan: offset of the first start-of-scan marker.
    """

    width: int
    height: int
    components: int
    usual: bool
    scan: int


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


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Walk the markers of a JPEG up to the first scan; None where they cannot be followed (Pillow decides then)."""
    frame: tuple[int, int, int, bool] | None = None
    position = 2
    try:
        while True:
            if data[position] != 0xFF:
                return None
            while data[position] == 0xFF:  # any number of fill bytes may precede a marker
                position += 1
            marker = data[position]
            position += 1
            if marker in _WITHOUT_LENGTH:
                continue
            if marker == 0xDA:
                return None if frame is None else JpegHeader(*frame, scan=position - 2)
            if marker in _FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", data, position + 2)
                frame = (width, height, components, marker in _USUAL_FRAMES and bits == 8)
            position += int.from_bytes(data[position : position + 2], "big")
            if marker in (0xD8, 0xD9):
                return None
    except (IndexError, struct.error):
        return None


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
    if not data.startswith(SOI):
        return Encoded(data, plain_jpeg=False)
    header = read_jpeg_header(data)
    if data.rfind(EOI, 2 if header is None else header.scan) < 0:
        raise BadSampleError("broken", "the JPEG is cut short: it has no end-of-image marker")
    if header is None:
        return Encoded(data, plain_jpeg=False)
    _check_size(index, sample, header.width, header.height)
    return Encoded(data, plain_jpeg=header.usual and header.components in (1, 3))


def decode(index: Index, sample: int, encoded: Encoded) -> Image.Image:
    """Decode the whole image with Pillow, to RGB: the last word on whether a sample is bad.

    Alpha is dropped, palettes and CMYK are converted, 16-bit grey keeps its upper 8 bits.

    Raises:
        BadSampleError: Pillow refuses it, or the image is not as large as the index says.
    """
    try:
        with Image.open(io.BytesIO(encoded.data), formats=FORMATS) as image:
            _check_size(index, sample, *image.size)
            if image.mode.startswith("I;16"):  # Pillow would clip these at 255 instead of scaling
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise BadSampleError("broken", f"its pixels are of type {image.mode}, which has no defined range")
            return image.convert("RGB")
    except (BadSampleError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text names a memory address
        raise BadSampleError("broken", f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise BadSampleError("broken", f"Pillow does not decode it: {error}") from error


def _read_bytes(path: os.PathLike[str], offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. A sample at offset 0 is a file of its own, which must end where the sample does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
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


def _check_size(index: Index, sample: int, width: int, height: int) -> None:
    """BadSampleError where the image is not as large as the index says."""
    indexed = int(index.width[sample]), int(index.height[sample])
    if (width, height) != indexed:
        raise BadSampleError("stale", f"the image is {width}x{height} pixels, the index says {indexed[0]}x{indexed[1]}")
