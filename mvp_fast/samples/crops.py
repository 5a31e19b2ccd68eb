"""Crop boxes and flips, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip draw them.

Up to 10 attempts a sample: an area uniform in a range of shares of the image's, an aspect ratio log-uniform in a range,
a position uniform among those where the box fits. Where no attempt fits, the largest central box whose aspect ratio is
in the range. Words of Philox block a of Stream.CROP: area, aspect ratio, top, left of attempt a.

Shape legend: B samples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mvp_fast.samples.random import Stream, below, draws

ATTEMPTS = 10

Int32Array = npt.NDArray[np.int32]


def crop_boxes(
    seed: int,
    epoch_B: npt.NDArray[np.int64],
    position_B: npt.NDArray[np.int64],
    image_width_B: npt.NDArray[np.int32],
    image_height_B: npt.NDArray[np.int32],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """One random resized crop a sample.

    Args:
        seed, epoch_B, position_B: as in `draws`.
        image_width_B, image_height_B: sizes of the images, pixels, at least 1.
        scale: least and greatest share of the image's area.
        ratio: least and greatest aspect ratio, width / height.

    Returns:
        x_B, y_B, width_B, height_B: int32, pixels; every box has 1 pixel or more and lies inside its image.
    """
    image_w, image_h = image_width_B.astype(np.int64), image_height_B.astype(np.int64)
    x_B, y_B, w_B, h_B = central_boxes(image_w, image_h, ratio)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    open_K = np.arange(len(image_w))  # the samples (K of B) for which no attempt has fitted yet
    for attempt in range(ATTEMPTS):
        if not len(open_K):
            break
        words_K4 = draws(seed, Stream.CROP, epoch_B[open_K], position_B[open_K], attempt)
        share_K, log_aspect_K = words_K4[:, 0] * 2.0**-32, words_K4[:, 1] * 2.0**-32
        area_K = (image_w[open_K] * image_h[open_K]) * (scale[0] + share_K * (scale[1] - scale[0]))
        aspect_K = np.exp(log_low + log_aspect_K * (log_high - log_low))
        # rint rounds halves to even, as Python's round does.
        w_K = np.rint(np.sqrt(area_K * aspect_K)).astype(np.int64)
        h_K = np.rint(np.sqrt(area_K / aspect_K)).astype(np.int64)
        fits_K = (w_K > 0) & (w_K <= image_w[open_K]) & (h_K > 0) & (h_K <= image_h[open_K])
        done, w, h, words = open_K[fits_K], w_K[fits_K], h_K[fits_K], words_K4[fits_K]
        w_B[done], h_B[done] = w, h
        y_B[done] = below(words[:, 2], image_h[done] - h + 1)
        x_B[done] = below(words[:, 3], image_w[done] - w + 1)
        open_K = open_K[~fits_K]
    return x_B.astype(np.int32), y_B.astype(np.int32), w_B.astype(np.int32), h_B.astype(np.int32)


def central_boxes(
    image_width_B: npt.NDArray[np.int64], image_height_B: npt.NDArray[np.int64], ratio: tuple[float, float]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The fallback: the largest central box with an aspect ratio in `ratio`.

    Arguments and results as in `crop_boxes`.
    """
    image_ratio_B = image_width_B / image_height_B
    w_B = np.where(image_ratio_B > ratio[1], np.rint(image_height_B * ratio[1]), image_width_B).astype(np.int64)
    h_B = np.where(image_ratio_B < ratio[0], np.rint(image_width_B / ratio[0]), image_height_B).astype(np.int64)
    # Only ranges that leave out 1 can round a side of a tiny image down to nothing.
    w_B, h_B = np.maximum(w_B, 1), np.maximum(h_B, 1)
    return (image_width_B - w_B) // 2, (image_height_B - h_B) // 2, w_B, h_B


def flips(
    seed: int, epoch_B: npt.NDArray[np.int64], position_B: npt.NDArray[np.int64], probability: float
) -> npt.NDArray[np.bool_]:
    """Whether each sample is flipped left to right: bool (B,), true with `probability` (exactly, at 0 and 1)."""
    return draws(seed, Stream.FLIP, epoch_B, position_B, 0)[:, 0] * 2.0**-32 < probability
