"""Pictures of predictions: image, truth and prediction side by side, a colour a class.

Shape legend: H and W pixels, C classes.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from mvp_fast.evaluate.segment.judge import Sample
from mvp_fast.evaluate.segment.legend import IGNORED
from mvp_fast.evaluate.segment.masks import LabelledSet

_GAP = 4
_WHITE = 255
_GOLDEN = 0.6180339887498949
"""Share of the colour circle between one class's hue and the next one's: no two are near each other for long."""


class Painter:
    """Writes pictures of some images of a set, evenly spread over it.

    Args:
        labelled: the set.
        folder: to write to; made where missing.
        count: how many images.
    """

    def __init__(self, labelled: LabelledSet, folder: Path, count: int) -> None:
        self._labelled, self._folder = labelled, folder
        count = min(count, len(labelled))
        self.chosen = frozenset(np.linspace(0, len(labelled) - 1, count).round().astype(int).tolist())
        self._palette_C3 = class_colours(labelled)

    def paint(self, sample: Sample, predicted_HW: Tensor) -> None:
        """Write the picture of a sample, if it is one of those chosen: ignored pixels of the truth are white."""
        if sample.number not in self.chosen:
            return
        truth_HWC = self._palette_C3[np.maximum(sample.truth_HW, 0)]
        truth_HWC[sample.truth_HW == IGNORED] = _WHITE
        predicted_HWC = self._palette_C3[predicted_HW.cpu().numpy()]
        gap = np.full((len(truth_HWC), _GAP, 3), _WHITE, dtype=np.uint8)
        picture_HWC = np.concatenate([sample.image_HWC, gap, truth_HWC, gap, predicted_HWC], axis=1)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._labelled.mask_file(sample.number).relative_to(self._labelled.masks)
        Image.fromarray(picture_HWC).save(self._folder / "-".join(name.parts))


def class_colours(labelled: LabelledSet) -> npt.NDArray[np.uint8]:
    """A colour for each class: that of the palette in the first mask, or hues around the circle: uint8 (C, 3)."""
    values = labelled.legend.value_of
    with Image.open(labelled.mask_file(0)) as mask:
        palette = mask.getpalette("RGB") if mask.mode == "P" else None
    if palette is not None and len(palette) >= 3 * (max(values) + 1):
        return np.array(palette, dtype=np.uint8).reshape(-1, 3)[list(values)]
    colours = [
        colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.5 + 0.5 * (number % 2), 1 - 0.2 * (number % 3))
        for number in range(len(values))
    ]
    return (255 * np.array(colours)).round().astype(np.uint8)
