"""FFCV as this project uses it: imported without its side effects, and its C functions with their status.

FFCV 1.0.2 (its last release) works with numpy 2 and today's numba as it is. What has to be seen to, and why:

- Importing it sets the threads of numba and of torch to 1 for the whole process (`ffcv.pipeline.compiler` does so at
  module level), which would slow down everything else that computes on the CPU. Their numbers are put back.
- Its decoding function keeps a TurboJPEG handle in each thread that nobody frees, and FFCV's own loader throws away
  the status it returns, so that a corrupt JPEG leaves whatever was in the buffer. So the same function of the same
  library (TurboJPEG's tjDecompress2, with FFCV's flags and so with its pixels) is called with handles of our own, and
  its status is looked at. A warning (corrupt data, a premature end) is a failure there too.
- Its loader draws order and boxes by itself, and does not give back threads when an epoch is broken off (ffcv#345,
  ffcv#393). It is not used: reader, writer, file format and C functions are.

Shape legend: H and W pixels, C channels.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.samples.compiled import compiled

RAW, JPEG = 1, 0
"""FFCV's numbers for how a sample's pixels are stored (`ffcv.fields.rgb_image.IMAGE_MODES`)."""
# turbojpeg.h: TJPF_RGB, and TJFLAG_FASTDCT | TJFLAG_NOREALLOC, as libffcv.cpp has them.
_RGB, _FLAGS = 0, 2048 | 1024


def need_ffcv(where: str) -> None:
    """EnvironmentProblem, about the option `where`, if FFCV is not installed."""
    try:
        found = importlib.util.find_spec("ffcv") is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: sys.modules says that it is not there
        found = False
    if not found:
        raise EnvironmentProblem("FFCV is needed, which is not installed", where=where, fix=_FIX)


_FIX = (
    "`make install` compiles it where pkg-config finds opencv4 and libturbojpeg (Debian and Ubuntu: libopencv-dev, "
    "libturbojpeg0-dev, pkg-config), or take the same images as files with --data.loader dali"
)


def load(module: str) -> Any:
    """Import a module of FFCV, such as `ffcv.reader`; the threads of numba and torch stay as many as they were.

    Raises:
        EnvironmentProblem: FFCV is not installed, or does not load.
    """
    need_ffcv(module)
    import numba
    import torch

    threads = numba.get_num_threads(), torch.get_num_threads()
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(f"FFCV is installed but does not load: {error}", where=module, fix=_FIX) from error
    finally:
        numba.set_num_threads(threads[0])
        torch.set_num_threads(threads[1])


class Cropper:
    """Decodes and crops with FFCV's C functions, in memory that one thread keeps; one caller at a time.

    The lock on Python's interpreter is released inside of them.
    """

    def __init__(self) -> None:
        library = load("ffcv.libffcv")
        # FFCV's extension is linked against libturbojpeg, so that its handle finds that library's functions too.
        turbo = library.lib
        self._resize = library.ctypes_resize
        self._decompress = turbo.tjDecompress2
        self._decompress.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p),
            *[ctypes.c_int] * 5,
        ]
        self._destroy = turbo.tjDestroy
        self._destroy.argtypes = [ctypes.c_void_p]
        turbo.tjInitDecompress.restype = ctypes.c_void_p
        self._handle: int | None = turbo.tjInitDecompress()
        if not self._handle:
            raise MemoryError("libjpeg-turbo has no memory for a decoder")
        self._memory = np.empty(0, np.uint8)

    def memory(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of this thread's memory, the same at each call: uint8 (size,), what it holds is undefined."""
        if len(self._memory) < size:
            self._memory = np.empty(size + size // 4, np.uint8)
        return self._memory[:size]

    def decode(self, data: bytes, width: int, height: int) -> NDArray[np.uint8] | None:
        """Decode a JPEG whose header says `width` and `height`, pixels, to uint8 RGB (height, width, 3), in `memory`.

        None where libjpeg-turbo fails or warns; what the memory holds then is of no use.
        """
        pixels = self.memory(3 * width * height)
        status = self._decompress(
            self._handle, data, len(data), pixels.ctypes.data, width, 0, height, _RGB, _FLAGS
        )
        return pixels.reshape(height, width, 3) if status == 0 else None

    def crop(self, image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int], flip: bool, out_HWC: Any) -> None:
        """Resize a box into `out_HWC` with OpenCV's area filter, and flip it from left to right where asked.

        Args:
            image_HWC: uint8 RGB, contiguous.
            box: x, y, width and height, pixels.
            flip: whether to flip.
            out_HWC: uint8 RGB, contiguous; all of it is written.

        Raises:
            ValueError: the box is not inside the image: OpenCV would end the process.
        """
        x, y, width, height = box
        rows, columns, _ = image_HWC.shape
        if not (0 <= x < x + width <= columns and 0 <= y < y + height <= rows):
            raise ValueError(f"the box {box} is not inside {columns}x{rows} pixels")
        target = out_HWC.shape[0], out_HWC.shape[1]
        self._resize(0, image_HWC.ctypes.data, rows, columns, y, y + height, x, x + width, out_HWC.ctypes.data, *target)
        if flip:
            mirror(out_HWC)

    def close(self) -> None:
        """Give back the decoder and the memory; may be called twice."""
        if self._handle:
            self._destroy(self._handle)
        self._handle, self._memory = None, np.empty(0, np.uint8)


@compiled
def mirror(image_HWC):  # type: ignore[no-untyped-def]
    """Flip from left to right, in place: uint8 (H, W, C)."""
    height, width, channels = image_HWC.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                other = image_HWC[y, width - 1 - x, c]
                image_HWC[y, width - 1 - x, c] = image_HWC[y, x, c]
                image_HWC[y, x, c] = other
