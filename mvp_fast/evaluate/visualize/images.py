"""The images that are shown: some of an index, evenly over its classes, or files by name.

Shape legend: B images, H and W pixels, C colours, K chosen samples.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders.passage import passage
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.encoded_image import BrokenImageError, check_markers, open_image, to_rgb
from mvp_fast.samples.index import Index

BATCH = 32


@dataclass(frozen=True)
class Shown:
    """Crops to look at.

    Attributes:
        names: keys or file names, one an image.
        images_BHWC: uint8, on the CPU.
        sample_B: rows of `plan.index`; empty for files.
        plan: whose boxes were cut; None for files.
    """

    names: list[str]
    images_BHWC: Tensor
    sample_B: npt.NDArray[np.int64]
    plan: CentrePlan | None


def choose(index: Index, images: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of the index: as many of each class as of any other, as far as they go; by class, then at random.

    Args:
        images: how many; all where there are fewer.
        seed: decides which, and whose turn is first where there are fewer images than classes.

    Returns:
        int64 (K,).
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(index))
    label = index.label[order]
    by_class = np.argsort(label, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(label[by_class])) + 1]
    place = np.arange(len(label)) - np.repeat(starts, np.diff(np.r_[starts, len(label)]))  # within its class
    turn = generator.permutation(len(index.classes) + 1)[label[by_class]]  # label -1: the last one
    first = np.lexsort((turn, place))[:images]
    chosen: npt.NDArray[np.int64] = order[by_class[np.sort(first)]].astype(np.int64)
    return chosen


def from_index(
    index: Index, sample_K: npt.NDArray[np.int64], data: DataConfig, patch_size: int, share: float, device: torch.device
) -> Shown:
    """The central crops of these rows; those that do not decode are left out.

    Args:
        data: loader, threads and image size.
        share: side of the crop in the image's shorter side.

    Raises:
        DataError: none decodes, or the files no longer fit the index.
    """
    part = index.subset(sample_K)
    part.check_files()
    plan = CentrePlan(
        part, batch_size=min(BATCH, len(part)), image_size=data.image_size, patch_size=patch_size, share=share
    )
    found = list(passage(plan, data, device))
    if not found:
        raise DataError("None of the chosen images decodes", where=str(index.path), fix="Index them with --verify")
    sample_B = np.concatenate([crops.sample_B for crops in found])
    images_BHWC = torch.cat([crops.images_BHWC.cpu() for crops in found])
    return Shown([part.key(int(i)) for i in sample_B], images_BHWC, sample_B, plan)


def from_files(paths: Sequence[str], image_size: int, share: float) -> Shown:
    """The central squares of image files, decoded by Pillow.

    Raises:
        DataError: one is missing or can't be used.
    """
    images = torch.stack([torch.from_numpy(_crop(Path(path).expanduser(), image_size, share)) for path in paths])
    return Shown([Path(path).name for path in paths], images, np.array([], dtype=np.int64), None)


def _crop(path: Path, image_size: int, share: float) -> npt.NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        check_markers(data)
        with open_image(io.BytesIO(data)) as image:
            picture = to_rgb(image)
    except OSError as error:
        raise DataError(f"The image can't be read: {error.strerror or error}", where=str(path)) from error
    except BrokenImageError as error:
        raise DataError(f"The image can't be used: {error}", where=str(path), fix="Give another") from error
    # As CentrePlan cuts them.
    side = max(round(share * min(picture.size)), 1)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    size = (image_size, image_size)
    return np.array(picture.resize(size, Image.Resampling.BICUBIC, (x, y, x + side, y + side)))
