"""Whether an encoded image can be used: the one judgement of `data index --verify` and of every loader.

- A JPEG must have an end-of-image marker after its header: without one it was cut short. libjpeg fills such images
  with grey in silence (where padding follows, Pillow does too), so the marker is looked for before any decoder runs.
- It must have MAX_PIXELS or fewer by its header, so that memory stays bounded: a file of a hundred bytes can claim to
  hold gigabytes of pixels (a decompression bomb).
- Pillow must decode the whole image, into pixels whose range is defined.

EXIF orientation is ignored throughout: sizes are those of the stored pixels. Imports PIL only, so that a process which
reads files starts quickly.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What may be in a file, whatever its extension says: ImageNet holds a PNG named .JPEG."""

MAX_PIXELS = (1 << 30) // 4 // 3
"""Most pixels an image may have, 89,478,485: 256 MiB once decoded to RGB. Pillow's own limit before it warns."""
_TOO_LARGE = f"the image has more than {MAX_PIXELS:,} pixels, the most that an image may have here"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is refused, and told, by its size

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
# Frame headers (ITU-T T.81, table B.1): baseline, extended sequential and progressive, all Huffman-coded.
_USUAL_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))


class BrokenImageError(Exception):
    """The image can't be used; its text is the reason, in words for a list of bad files."""


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


def check_markers(data: bytes) -> JpegHeader | None:
    """Judge an image by its markers, without decoding it.

    Returns:
        The header of a JPEG; None for another format, or where the markers cannot be followed.

    Raises:
        BrokenImageError: a JPEG that was cut short, or has more than MAX_PIXELS.
    """
    if not data.startswith(SOI):
        return None
    header = read_jpeg_header(data)
    if data.rfind(EOI, 2 if header is None else header.scan) < 0:
        raise BrokenImageError("the JPEG is cut short: it has no end-of-image marker")
    if header is not None and header.width * header.height > MAX_PIXELS:
        raise BrokenImageError(_TOO_LARGE)
    return header


@contextmanager
def open_image(file: str | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image with Pillow; whatever Pillow raises in the block, on broken data, becomes BrokenImageError.

    Raises:
        BrokenImageError: Pillow refuses the image, here or in the block, or it has more than MAX_PIXELS.
        MemoryError: of this process, not the image's fault.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(_TOO_LARGE)
            yield image
    except (BrokenImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow raises it at twice the size, before it is known here
        raise BrokenImageError(_TOO_LARGE) from error
    except UnidentifiedImageError as error:  # its text names a memory address
        raise BrokenImageError(f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise BrokenImageError(f"Pillow does not decode it: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the whole of an image from `open_image`, to RGB.

    Alpha is dropped, palettes and CMYK are converted, 16-bit grey keeps its upper 8 bits.

    Raises:
        BrokenImageError: its pixels are of a type without a defined range.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip these at 255 instead of scaling
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImageError(f"its pixels are of type {image.mode}, which has no defined range")
    return image.convert("RGB")


def judge(data: bytes) -> tuple[int, int]:
    """Judge an image in full, as a loader does on its way to the pixels: markers, then the whole of it decoded.

    Returns:
        Width and height, pixels.

    Raises:
        BrokenImageError: it can't be used.
    """
    header = check_markers(data)
    with open_image(io.BytesIO(data)) as image:
        width, height = image.size
        if header is not None and (header.width, header.height) != (width, height):
            raise BrokenImageError(f"its header says {header.width}x{header.height} pixels, Pillow {width}x{height}")
        to_rgb(image)
    return width, height
