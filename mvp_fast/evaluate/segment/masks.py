"""Masks in files: PNG with a palette or in grey, 8 or 16 bits, whose pixels are numbers of classes.

Shape legend: H and W pixels.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvp_fast.errors import DataError
from mvp_fast.evaluate.segment.legend import UNKNOWN, Legend
from mvp_fast.samples.index import Index

SUFFIX = ".png"
Values = npt.NDArray[np.unsignedinteger]
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # PNG's colour types whose pixels are one number
_KINDS = {2: "a colour image", 4: "grey with transparency", 6: "a colour image with transparency"}
THREADS = 16
"""Headers that are read at once: each read may wait for a disk or the network."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images, each with a mask of its size.

    Attributes:
        index: of the images.
        masks: the folder of the masks: <an image's key without its suffix>.png.
        legend: what the masks' values mean.
    """

    index: Index
    masks: Path
    legend: Legend

    def __len__(self) -> int:
        return len(self.index)

    def mask_file(self, sample: int) -> Path:
        """The mask of a row of the index."""
        return self.masks / (os.path.splitext(self.index.key(sample))[0] + SUFFIX)

    def read(
        self, sample: int, take: Callable[[Values], Values] = lambda values_HW: values_HW
    ) -> npt.NDArray[np.int16]:
        """The classes of a sample's pixels.

        Args:
            sample: row of the index.
            take: picks the pixels that are wanted of the mask (H, W); all of them unless given.

        Returns:
            int16, as `take` shapes it: classes, or IGNORED.

        Raises:
            DataError: the mask is missing or damaged, has another size than its image, or a value that means nothing.
        """
        file = self.mask_file(sample)
        values = take(_decode(file, (int(self.index.width[sample]), int(self.index.height[sample]))))
        classes: npt.NDArray[np.int16] = self.legend.class_of[values]
        if (classes == UNKNOWN).any():
            wrong = np.unique(values[classes == UNKNOWN]).tolist()
            shown = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise DataError(
                f"The mask has values that mean nothing: {shown}. It may have {self.legend.words()}",
                where=str(file),
                fix="Mend the mask, or give --segment.ignore, --segment.classes or --segment.num-classes",
            )
        return classes

    def check(self) -> None:
        """Look into the header of every mask: is it there, an index mask, as large as its image?

        Raises:
            DataError: some are not; the first of them are named.
        """
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mvp-headers") as pool:
            found = [problem for problem in pool.map(self._problem, range(len(self)), chunksize=64) if problem]
        if found:
            raise DataError(
                f"{len(found):,} of {len(self):,} masks can't be used: {'; '.join(found[:3])}"
                + (f"; and {len(found) - 3:,} more" if len(found) > 3 else ""),
                where=str(self.masks),
                fix="Each image needs a PNG mask of its size under its own name; leave out images without one",
            )

    def _problem(self, sample: int) -> str:
        """What is wrong with a mask, by its header; empty where nothing is."""
        file = self.mask_file(sample)
        try:
            with file.open("rb") as stream:
                head = stream.read(26)
        except OSError as error:
            return f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
        if len(head) < 26 or head[:8] != _SIGNATURE:
            return f"{file}: no PNG file"
        width, height, _, kind = struct.unpack(">IIBB", head[16:])
        if kind not in (_GREY, _PALETTE):
            return f"{file}: {_KINDS.get(kind, 'of an unknown kind')}, not one number a pixel"
        expected = int(self.index.width[sample]), int(self.index.height[sample])
        if (width, height) != expected:
            return f"{file}: {width}x{height} pixels, its image {expected[0]}x{expected[1]}"
        return ""


def _decode(file: Path, size: tuple[int, int]) -> Values:
    """The values of a mask, an unsigned type (H, W)."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            if image.size != size:
                raise DataError(
                    f"The mask has {image.width}x{image.height} pixels, its image {size[0]}x{size[1]}", where=str(file)
                )
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise DataError(f"The mask has colours ({image.mode}), not one number a pixel", where=str(file))
            values_HW = np.asarray(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("The mask is missing", where=str(file)) from error
    except Exception as error:  # on broken data Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"The mask can't be read: {error}", where=str(file)) from error
    return values_HW if values_HW.dtype == np.uint8 else values_HW.astype(np.uint16)
