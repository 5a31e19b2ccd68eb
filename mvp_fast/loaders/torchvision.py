"""The reference backend: Pillow decodes, torchvision crops and resizes, a pool of threads does both.

Written the obvious way, to be read and to be held against: the other backends' pixels are compared with these.
Resizing is antialiased, on uint8, with Pillow's bicubic (a = -0.5) or bilinear filter.

Shape legend: B images, R crops of one image, H and W pixels, C channels.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from mvp_fast.loaders import encoded
from mvp_fast.loaders.base import Batch, StageStats
from mvp_fast.loaders.failures import Settled, settle
from mvp_fast.loaders.runs import IN_FLIGHT, Run, ThreadedLoader
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


def book(stats: StageStats, done: Crop) -> None:
    """Add one image's times to the loader's."""
    stats.add("read", done.read, 1)
    stats.add("decode", done.decode, 1)
    stats.add("transform", done.transform, len(done.images_RHWC))


@dataclass(frozen=True)
class _Step:
    """A batch in flight: one future a group, each of which writes its crops into `images_BHWC`."""

    step: int
    rows: PlanRows
    images_BHWC: torch.Tensor
    futures: list[Future[Settled[Crop]]]


class _TorchvisionRun:
    """One passage through a plan: a pool of threads, and at most IN_FLIGHT batches in it."""

    def __init__(self, loader: TorchvisionLoader, plan: SamplePlan, start_step: int) -> None:
        self._plan, self._next_step = plan, start_step
        self._interpolation = loader.config.interpolation
        self._stats, self._failures = loader.stats(), loader.failures
        self._steps: deque[_Step] = deque()
        self._pool = ThreadPoolExecutor(loader.threads, thread_name_prefix="mvp-torchvision")

    def _submit(self) -> _Step:
        plan, step = self._plan, self._next_step
        self._next_step += 1
        rows = plan.step(step)
        images_BHWC = torch.empty((len(rows), plan.image_size, plan.image_size, 3), dtype=torch.uint8)
        out_BHWC = images_BHWC.numpy()

        def attempt(group: PlanRows) -> Crop:
            return carry_out(plan.index, group, plan.image_size, self._interpolation)

        def work(i: int) -> Settled[Crop]:
            settled = settle(plan, step, rows, i, attempt, count=plan.repeat)
            if settled.value is not None:
                out_BHWC[i : i + plan.repeat] = settled.value.images_RHWC
            return settled

        futures = [self._pool.submit(work, i) for i in range(0, len(rows), plan.repeat)]
        return _Step(step, rows, images_BHWC, futures)

    def next(self) -> Batch:
        while len(self._steps) < IN_FLIGHT:
            self._steps.append(self._submit())
        step = self._steps.popleft()
        rows = step.rows
        for group, future in enumerate(step.futures):
            settled = future.result()
            self._failures.account(settled)
            if settled.value is not None:
                book(self._stats, settled.value)
            if settled.failures:
                rows = rows.replace_rows(group * self._plan.repeat, settled.rows)
        return Batch(step.step, step.images_BHWC, torch.from_numpy(rows.masked_BM()), rows)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()


class TorchvisionLoader(ThreadedLoader):
    """Pillow and torchvision, one image and all its crops a task, `threads` threads."""

    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        return _TorchvisionRun(self, plan, start_step)
