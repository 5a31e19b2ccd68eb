"""The corpus of odd and bad image files, made by code: what every part that reads images must take, and must not.

`GOOD` decodes, whatever the name says; `BAD` does not, and `BAD_REASONS` has a part of what is said of it. `flipped`
are files with a bit flipped in the compressed pixels: libjpeg decodes past such damage, to pixels nobody can vouch for.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mvp_fast.loaders.registry import LOADERS

DECODING = tuple(name for name in LOADERS if name not in ("synthetic", "ffcv"))  # ffcv: see test_convert_beton.py
"""The backends that decode images; each is held to this corpus."""
WIDTH, HEIGHT = 90, 70
CUTS = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.75, 0.9, 0.97, 0.999)


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 4) -> Image.Image:
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (14, 18, 3), dtype=np.uint8)
    return Image.fromarray(noise_HWC).resize((width, height), Image.Resampling.BICUBIC)


def encode(kind: str = "JPEG", mode: str = "RGB", image: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or picture()).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG with any header and any pixels: `data` is what comes compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def sixteen_bit_grey() -> bytes:
    stream = io.BytesIO()
    Image.fromarray((np.arange(WIDTH * HEIGHT, dtype=np.uint16) * 10).reshape(HEIGHT, WIDTH)).save(stream, "PNG")
    return stream.getvalue()


def sixteen_bit_colour() -> bytes:
    pixels_HWC = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(">u2")
    lines = b"".join(b"\0" + pixels_HWC[y].tobytes() for y in range(HEIGHT))  # filter 0 before each
    return png(WIDTH, HEIGHT, 16, 2, lines)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees: nobody here does
    return encode(quality=90, exif=exif)


def large_jpeg() -> bytes:
    """50 megapixels in a moderate file."""
    return encode(image=picture(8660, 5774), quality=60)


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its frame header: a decompression bomb where that is large."""
    at = next(jpeg.index(bytes((0xFF, marker))) for marker in (0xC0, 0xC2) if bytes((0xFF, marker)) in jpeg)
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


BASELINE = encode(quality=90)
PROGRESSIVE = encode(quality=90, progressive=True)
THUMBNAIL = encode(quality=30)
# An EXIF thumbnail is a JPEG with an end-of-image marker of its own, before the scan.
WITH_THUMBNAIL = BASELINE[:2] + b"\xff\xe1" + (len(THUMBNAIL) + 2).to_bytes(2, "big") + THUMBNAIL + BASELINE[2:]
GIF, BMP, WEBP = encode("GIF", mode="P"), encode("BMP"), encode("WEBP")
# Pillow warns of more than 89,478,485 pixels and refuses twice that; the limit here is the lower one.
_SIZES = {"just above": (9459, 9460), "twice": (13000, 13000), "gigantic": (65000, 65000)}
_TEXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))

GOOD: dict[str, bytes] = {
    "baseline.jpg": BASELINE,
    "progressive.jpg": PROGRESSIVE,
    "trailing garbage.jpg": BASELINE + bytes(range(256)) * 9,
    "trailing zeros.jpg": BASELINE + bytes(3000),
    "thumbnail.jpg": WITH_THUMBNAIL,
    "rotated.jpg": rotated(),
    "cmyk.jpg": encode(mode="CMYK"),
    "grey.jpg": encode(mode="L"),
    "one pixel.jpg": encode(image=picture(1, 1)),
    "one column.jpg": encode(image=picture(1, 5000)),
    "one row.jpg": encode(image=picture(5000, 1)),
    "50 megapixels.jpg": large_jpeg(),
    "png named.jpg": encode("PNG"),
    "gif named.jpg": GIF,
    "jpeg named.png": BASELINE,
    "alpha.png": encode("PNG", mode="RGBA"),
    "palette.png": encode("PNG", mode="P"),
    "sixteen bits.png": sixteen_bit_grey(),
    "sixteen bits colour.png": sixteen_bit_colour(),
    "whole.webp": WEBP,
    "whole.gif": GIF,
    "whole.bmp": BMP,
}
BAD_REASONS: dict[str, str] = {}
BAD: dict[str, bytes] = {}


def _bad(name: str, data: bytes, reason: str = "") -> None:
    BAD[name], BAD_REASONS[name] = data, reason


_bad("text.jpg", b"lorem ipsum " * 40, "none of JPEG")
_bad("zeros.jpg", bytes(4000), "none of JPEG")
_bad("empty.jpg", b"", "the file is empty")
_bad("two bytes.jpg", b"\xff\xd8", "")
_bad("cut thumbnail.jpg", WITH_THUMBNAIL[:-400], "cut short")
_bad("padded thumbnail.jpg", WITH_THUMBNAIL[:-400] + bytes(400), "cut short")
_bad("cut named.jpg", encode("PNG")[:-900])
_bad("damaged tables.jpg", BASELINE[: BASELINE.index(b"\xff\xc4") + 5] + b"\xff" * 16 + BASELINE[600:])
_at = BASELINE.index(b"\xff\xc4") + 5  # more codes than any Huffman table has: only decoding tells
_bad("huffman.jpg", BASELINE[:_at] + b"\xff" * 16 + BASELINE[_at + 16 :], "Pillow does not decode it")
for _name, _data in (("baseline", BASELINE), ("progressive", PROGRESSIVE)):
    for _cut in CUTS:
        _kept = _data[: int(len(_data) * _cut)]
        _bad(f"{_name} {_cut}.jpg", _kept)
        _bad(f"{_name} padded {_cut}.jpg", _kept.ljust(len(_data), b"\0"))
for _n in (1, 2, 3):
    _bad(f"no end {_n}.jpg", BASELINE[:-_n] + bytes(_n), "cut short")
for _name, _size in _SIZES.items():
    _bad(f"{_name} bomb.jpg", with_size(BASELINE, *_size), "more than 89,478,485 pixels")
    _bad(f"{_name} progressive bomb.jpg", with_size(PROGRESSIVE, *_size), "more than 89,478,485 pixels")
    _bad(f"{_name} bomb.png", png(*_size, 8, 2, bytes(1000)), "more than 89,478,485 pixels")
    _bad(f"{_name} bomb.gif", GIF[:6] + struct.pack("<HH", *_size) + GIF[10:], "more than 89,478,485 pixels")
    _bad(f"{_name} bomb.bmp", BMP[:18] + struct.pack("<ii", *_size) + BMP[26:], "more than 89,478,485 pixels")
for _size in ((9459, 9460), (16383, 16383)):  # the format's greatest
    _bad(f"{_size[0]} bomb.webp", WEBP[:26] + struct.pack("<HH", *_size) + WEBP[30:], "more than 89,478,485 pixels")
_bad("text bomb.png", png(WIDTH, HEIGHT, 8, 2, bytes((1 + 3 * WIDTH) * HEIGHT), extra=_TEXT_BOMB), "does not decode")


@functools.cache
def flipped(count: int = 24) -> dict[str, bytes]:
    """Files with one bit flipped somewhere in the compressed pixels."""
    rng, files = np.random.default_rng(6), {}
    for i in range(count):
        whole = BASELINE if i % 2 else PROGRESSIVE
        data = bytearray(whole)
        data[int(rng.integers(whole.index(b"\xff\xda") + 14, len(whole) - 2))] ^= 1 << int(rng.integers(0, 8))
        files[f"flipped {i:02}.jpg"] = bytes(data)
    return files


def write_corpus(folder: Path, *corpora: dict[str, bytes]) -> Path:
    """Write the files of these corpora into `folder`."""
    for corpus in corpora:
        for name, data in corpus.items():
            (folder / name).write_bytes(data)
    return folder
