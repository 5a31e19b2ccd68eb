"""The fast path on the CPU: nvImageCodec decodes the box alone, torch resizes it, a pool of threads does both.

- nvImageCodec (it comes with DALI) wraps libjpeg-turbo: rows above the box are skipped after their entropy decoding,
  columns beside it are left out, and nothing below it is read. With accurate inverse transform and libjpeg's chroma
  upsampling its pixels are Pillow's, bit by bit.
- torch's antialiased resize of uint8 is vectorised (AVX2) where channels are interleaved in memory, as the decoder
  leaves them; it agrees with Pillow's to 1 of 255.

Whatever is not a plain JPEG, and JPEGs that the decoder refuses, go through Pillow, with the reference's very pixels;
Pillow has the last word on what is bad. As in the loader `dali`, damage below the box goes unnoticed, where the
reference, which decodes everything, may call the sample bad.

With data.repeat, the smallest region that holds all boxes of an image is decoded once.

Shape legend: R crops of one image, H and W pixels, C channels.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

# Refused images are no news: Pillow gets them. The library reads this when it is imported.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

from mvp_fast.loaders.encoded import Encoded
from mvp_fast.loaders.pooled import Cost, PooledRun
from mvp_fast.loaders.runs import Run, ThreadedLoader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan

OPTIONS = ":fancy_upsampling=1 libjpeg_turbo_decoder:fast_idct=0"
"""The reference's pixels. The faster settings of both save a few percent and cost up to 100 levels at single pixels."""
_GRAIN = 32768
"""Elements up to which torch works in the calling thread; above, it would start threads of its own in each of ours."""


class RegionCropper:
    """Decodes boxes and resizes them in the thread that calls it: a `pooled.Worker`."""

    def __init__(self) -> None:
        self._decoder: Any = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the caller's own
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
            options=OPTIONS,
        )
        self._params: Any = nvimgcodec.DecodeParams(
            apply_exif_orientation=False,
            color_spec=nvimgcodec.ColorSpec.SRGB,
            sample_format=nvimgcodec.SampleFormat.I_RGB,
        )
        self._image: Any = None  # decoded into again and again: it stays in the processor's cache

    def __call__(
        self, index: Index, rows: PlanRows, interpolation: str, data: Encoded, out_RHWC: NDArray[np.uint8]
    ) -> Cost:
        """The rows' crops, all of one sample, into `out_RHWC`.

        Raises:
            BadSampleError: the sample cannot be used.
        """
        times = [time.thread_time()]
        left, top = int(rows.x_B.min()), int(rows.y_B.min())
        region_HWC = self.decode(data.data, rows) if data.plain_jpeg else None
        if region_HWC is None:
            from mvp_fast.loaders import torchvision  # takes a second to import, which most data sets never need

            return torchvision.carry_out_into(index, rows, interpolation, data, out_RHWC)
        times.append(time.thread_time())
        for i, out_HWC in enumerate(out_RHWC):
            x, y = int(rows.x_B[i]) - left, int(rows.y_B[i]) - top
            box_HWC = region_HWC[y : y + int(rows.height_B[i]), x : x + int(rows.width_B[i])]
            resize_into(out_HWC, box_HWC, interpolation, bool(rows.flip_B[i]))
        times.append(time.thread_time())
        return Cost(0.0, times[1] - times[0], times[2] - times[1])

    def decode(self, data: bytes, rows: PlanRows) -> NDArray[np.uint8] | None:
        """The pixels of the smallest region that holds the rows' boxes, uint8 RGB (H, W, 3), until the next call.

        None where the decoder refuses the image.
        """
        right, bottom = int((rows.x_B + rows.width_B).max()), int((rows.y_B + rows.height_B).max())
        region = nvimgcodec.Region(int(rows.y_B.min()), int(rows.x_B.min()), bottom, right)
        try:
            stream = nvimgcodec.CodeStream(data).get_sub_code_stream(region=region)
            self._image = self._decoder.decode(stream, image=self._image, params=self._params)
        except Exception:  # whatever it raises: Pillow will tell
            self._image = None
        return None if self._image is None else np.asarray(self._image)


def resize_into(out_HWC: NDArray[np.uint8], box_HWC: NDArray[np.uint8], interpolation: str, flip: bool) -> None:
    """Resize a box to the size of `out_HWC`, antialiased, flipped horizontally where asked."""
    box_1CHW = torch.from_numpy(box_HWC)[None].permute(0, 3, 1, 2)
    image_1CHW = F.interpolate(box_1CHW, size=out_HWC.shape[:2], mode=interpolation, antialias=True)
    image_HWC = image_1CHW[0].permute(1, 2, 0)
    if not flip:
        out_HWC[:] = image_HWC.numpy()
        return
    rows = max(1, _GRAIN // (3 * out_HWC.shape[1]))
    for top in range(0, len(out_HWC), rows):
        out_HWC[top : top + rows] = image_HWC[top : top + rows].flip(1).numpy()


class CpuLoader(ThreadedLoader):
    """nvImageCodec and torch, one image at a time in each of `threads` threads."""

    def _start(self, plan: SamplePlan, start_step: int) -> Run:
        return PooledRun(self, plan, start_step, [RegionCropper() for _ in range(self.threads)])
