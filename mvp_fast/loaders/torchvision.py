"""The reference backend: Pillow decodes, torchvision crops and resizes, a pool of threads does both.

Written the obvious way, to be read and to be held against: the other backends' pixels are compared with these.
Resizing is antialiased, on uint8, with Pillow's bicubic (a = -0.5) or bilinear filter.

Shape legend: R crops of one image, H and W pixels, C channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from mvp_fast.loaders import encoded
from mvp_fast.loaders.pooled import Cost, PooledRun
from mvp_fast.loaders.runs import Run, ThreadedLoader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan

FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@dataclass(frozen=True)
class Crop:
    """The finished crops of one image and what they cost.

    Attributes:
        images_RHWC: uint8 RGB.
        read, decode, transform: seconds; wall time for the reading, processor time of the thread for the rest.
    """

    images_RHWC: NDArray[np.uint8]
    read: float
    decode: float
    transform: float

    @property
    def image_HWC(self) -> NDArray[np.uint8]:
        """The first crop."""
        first_HWC: NDArray[np.uint8] = self.images_RHWC[0]
        return first_HWC


def crop(image: Image.Image, row: PlanRows, image_size: int, interpolation: str) -> NDArray[np.uint8]:
    """Cut the first row's box out of an RGB image, resize and flip it: uint8 (image_size, image_size, 3)."""
    x, y, width, height = (int(column[0]) for column in (row.x_B, row.y_B, row.width_B, row.height_B))
    image = F.resized_crop(image, y, x, height, width, [image_size, image_size], FILTERS[interpolation], antialias=True)
    return np.asarray(F.hflip(image) if row.flip_B[0] else image)


def carry_out(
    index: Index, rows: PlanRows, image_size: int, interpolation: str, data: encoded.Encoded | None = None
) -> Crop:
    """Read and decode one sample with Pillow, and crop it with torchvision.

    Args:
        index, image_size, interpolation: of the plan and the configuration.
        rows: one, or several of the same sample, which is decoded once.
        data: the encoded image where it is read already.

    Raises:
        BadSampleError: the sample cannot be used.
    """
    sample = int(rows.sample_B[0])
    times = [time.perf_counter()]
    data = encoded.read(index, sample) if data is None else data
    times += [time.perf_counter(), time.thread_time()]
    image = encoded.decode(index, sample, data)
    times.append(time.thread_time())
    crops = [crop(image, rows.slice(i, i + 1), image_size, interpolation) for i in range(len(rows))]
    images_RHWC = np.stack(crops) if len(crops) > 1 else crops[0][None]
    times.append(time.thread_time())
    return Crop(images_RHWC, read=times[1] - times[0], decode=times[3] - times[2], transform=times[4] - times[3])


def carry_out_into(
    index: Index, rows: PlanRows, interpolation: str, data: encoded.Encoded, out_RHWC: NDArray[np.uint8]
) -> Cost:
    """`carry_out` of a sample that is read already, into `out_RHWC` (see `pooled.Worker`)."""
    done = carry_out(index, rows, out_RHWC.shape[1], interpolation, data)
    out_RHWC[:] = done.images_RHWC
    return Cost(done.read, done.decode, done.transform)


class TorchvisionLoader(ThreadedLoader):
    """Pillow and torchvision, one image with all its crops at a time in each of `threads` threads."""

    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        return PooledRun(self, plan, start_step, [carry_out_into] * self.threads)
