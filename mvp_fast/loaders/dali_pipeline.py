"""The DALI pipeline by itself: encoded images and boxes in, uint8 crops out, in order, several batches in flight.

    bytes --external source--> decode the box alone -> resize (antialiased) -> flip -> tensor

With `repeat` r, each encoded image has r boxes in a row. The smallest region that holds all of them is decoded once,
and each crop is cut out of it: the pixels are those of a region of its own.

DALI draws nothing by itself here, and its settings are pinned to agree with the reference backend: chroma upsampled as
libjpeg does, no EXIF rotation, and on the CPU libjpeg's accurate inverse transform. On the GPU nvJPEG has a transform
of its own, and its hardware decoder and its kernels may differ in the last bit; which image goes to which depends on
the batch. `CropPipeline` is the only place that knows on which device DALI runs.

**On the GPU** the bytes alone go there, and the crops stay there. DALI works on streams of its own. `take` copies a
batch from DALI's memory to torch's, on the stream that is current in the calling thread (the prefetcher's): that stream
waits for DALI's on the device, DALI's memory goes back to it in that stream's order, and what takes the batch over from
there has torch's own rules to go by (an event, `record_stream`).

Shape legend: B crops of G encoded images, R of each, H and W pixels, C channels.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

HINT = 1024
"""Pixels across and down for which the GPU's decoder gets memory at once: asking for more and more, as larger images
come, lets a run's memory creep. ImageNet's mean is 469 x 387."""
FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


class CropPipeline:
    """A pipeline with `depth` batches in flight. Feed `depth` batches, then take and feed in turn.

    Args:
        batch_size: encoded images in every batch fed.
        image_size: side of the crops, pixels.
        interpolation: bicubic or bilinear.
        threads: DALI's worker threads.
        depth: batches in flight.
        repeat: crops of each encoded image.
        gpu: the CUDA device to decode on, and the share of the images that its hardware decoder gets; None for the CPU.
    """

    def __init__(
        self,
        batch_size: int,
        image_size: int,
        interpolation: str,
        threads: int,
        depth: int,
        repeat: int = 1,
        gpu: tuple[torch.device, float] | None = None,
    ) -> None:
        self._depth, self._fed, self._repeat = depth, 0, repeat
        self._others = frozenset(_dali_threads())
        self._own: list[str] = []
        self._device: torch.device | None
        self._device, decoder = _decoder_of(gpu)
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if self._device is None else self._device.index,
            prefetch_queue_depth=depth,
        )
        with pipeline:
            images = fn.decoders.image_slice(
                fn.external_source(name="data", dtype=types.UINT8, ndim=1),
                start=_numbers("start"),
                shape=_numbers("shape"),
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
                **decoder,
            )
            crops = []
            for r in range(repeat):
                crop = images
                if repeat > 1:
                    crop = fn.slice(images, start=_numbers(f"start{r}"), shape=_numbers(f"shape{r}"), axis_names="HW")
                size = (image_size, image_size)
                crop = fn.resize(crop, size=size, interp_type=FILTERS[interpolation], antialias=True)
                crops.append(fn.flip(crop, horizontal=_numbers(f"flip{r}", ndim=0), vertical=0))
            pipeline.set_outputs(fn.stack(*crops) if repeat > 1 else crops[0])
        pipeline.build()
        self._pipeline: Any = pipeline

    def feed(self, data: list[bytes], boxes_B4: NDArray[np.int32], flip_B: NDArray[np.bool_]) -> None:
        """Hand over a batch (copied): G encoded images, boxes as x, y, width, height in pixels, and which to flip."""

        def feed(name: str, numbers: NDArray[np.int32]) -> None:
            self._pipeline.feed_input(name, np.ascontiguousarray(numbers))  # DALI takes no strides

        self._pipeline.feed_input("data", [np.frombuffer(image, np.uint8) for image in data])
        start_GR2 = boxes_B4[:, [1, 0]].reshape(len(data), self._repeat, 2)
        shape_GR2 = boxes_B4[:, [3, 2]].reshape(len(data), self._repeat, 2)
        first_G2 = start_GR2.min(axis=1)
        feed("start", first_G2)
        feed("shape", (start_GR2 + shape_GR2).max(axis=1) - first_G2)
        for r in range(self._repeat):
            if self._repeat > 1:
                feed(f"start{r}", start_GR2[:, r] - first_G2)
                feed(f"shape{r}", shape_GR2[:, r])
            feed(f"flip{r}", flip_B[r :: self._repeat].astype(np.int32))
        self._fed += 1
        if self._fed >= self._depth:  # the first call starts `depth` batches, each later one starts one
            self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The oldest batch in flight, uint8 (B, H, W, 3), in memory that the tensor owns; waits for it.

        On the GPU the host waits until the batch's decoding is known to be in order, and the tensor is ready in the
        order of the current stream.

        Raises:
            Exception: DALI failed on this batch (which type depends on the fault); close the pipeline then.
        """
        if self._device is None:
            (made,) = self._pipeline.outputs()  # BHWC, or GRHWC
            images: torch.Tensor = torch.utils.dlpack.from_dlpack(made.as_tensor())
        else:
            stream = torch.cuda.current_stream(self._device)
            (made,) = self._pipeline.outputs(cuda_stream=stream)
            dense = made.as_tensor()
            images = torch.empty(dense.shape(), dtype=torch.uint8, device=self._device)
            feed_ndarray(dense, images, cuda_stream=stream)
        return images.flatten(0, 1) if self._repeat > 1 else images

    def cpu_seconds(self) -> float:
        """Processor time of DALI's threads so far: decoding, resizing and flipping, which it does not tell apart."""
        if not self._own:  # not at once after building: the threads name themselves a little later
            self._own = [thread for thread in _dali_threads() if thread not in self._others]
        return sum(_thread_seconds(thread) for thread in self._own)

    def close(self) -> None:
        """Let DALI end its threads; tensors taken stay valid, batches in flight are dropped."""
        self._pipeline = None


def _numbers(name: str, ndim: int = 1) -> Any:
    """Whole numbers that are fed under this name, one or a vector for each sample."""
    return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)


def _decoder_of(gpu: tuple[torch.device, float] | None) -> tuple[torch.device | None, dict[str, Any]]:
    """The device with its number, and what the decoder is told beyond what it is told on the CPU."""
    if gpu is None:
        return None, {"device": "cpu"}
    device, load = gpu
    number: int | None = device.index
    device = torch.device(device.type, torch.cuda.current_device() if number is None else number)
    hints = {"preallocate_width_hint": HINT, "preallocate_height_hint": HINT}
    return device, {"device": "mixed", "hw_decoder_load": load, **hints}


def _dali_threads() -> list[str]:
    """The ids of this process's threads that DALI started."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/comm") as file:
                if file.read().startswith("[DALI]"):
                    found.append(thread)
        except OSError:  # it ended meanwhile
            continue
    return found


def _thread_seconds(thread: str) -> float:
    """Processor seconds that a thread has used; 0 where the kernel keeps no such figures."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0
