"""FFCV as this project uses it: its C library without its Python package, and the package without its side effects.

FFCV 1.0.2 (its last release) works with numpy 2 and today's numba as it is. What has to be seen to, and why:

- Importing the package compiles code for 5 to 10 seconds. It also sets the threads of numba and of torch to 1 for the
  whole process (ffcv/pipeline/compiler.py, at module level), which slows down whatever else computes on the CPU. The
  loader needs the C library alone, and loads that; the converter, which needs FFCV's writer, imports the package
  through `load`.
- FFCV's decoding function keeps a TurboJPEG handle in each thread that nobody frees, and its loader throws away the
  status that the function returns, so that a corrupt JPEG leaves whatever was in the buffer. So the same function of
  the same library (TurboJPEG's tjDecompress2, with FFCV's flags and so with its pixels) is called with handles of our
  own, and its status is looked at. A warning (corrupt data, a premature end) is a failure there too.
- FFCV's loader draws order and boxes by itself, and does not give back threads when an epoch is broken off (ffcv#345,
  ffcv#393). It is not used.

Shape legend: H and W pixels, C channels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.samples.compiled import compiled

# turbojpeg.h: TJPF_RGB, and TJFLAG_FASTDCT | TJFLAG_NOREALLOC, as libffcv.cpp has them.
_RGB, _FLAGS = 0, 2048 | 1024
_FIX = (
    "`make install` compiles it, given OpenCV and TurboJPEG to compile against (Debian and Ubuntu: libopencv-core-dev, "
    "libopencv-imgproc-dev, libturbojpeg0-dev, pkg-config, g++)"
)


def need_ffcv(where: str) -> Path:
    """The folder of FFCV's package, which is not imported.

    Args:
        where: the option that asks for FFCV, for the message.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        spec = importlib.util.find_spec("ffcv")
    except (ModuleNotFoundError, ValueError):  # ValueError: it stands in sys.modules as not there
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem(
            "This needs FFCV, which is not installed", where=where, fix=f"{_FIX}; the other loaders need none of it"
        )
    return Path(spec.submodule_search_locations[0])


@functools.cache
def library() -> Any:
    """FFCV's C library, with TurboJPEG's functions in reach: it is linked against that.

    Raises:
        EnvironmentProblem: FFCV is not installed, or a library that it was compiled against is gone.
    """
    folder = need_ffcv("data.loader ffcv")
    try:
        found = [folder / f"_libffcv{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
        library = ctypes.CDLL(str(next(path for path in found if path.exists())))
        library.resize.argtypes = [ctypes.c_int64] * 11
        library.tjInitDecompress.restype = ctypes.c_void_p
        pointers = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p
        library.tjDecompress2.argtypes = [*pointers, *[ctypes.c_int] * 5]
        library.tjDestroy.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError, StopIteration) as error:
        raise EnvironmentProblem(
            f"FFCV is installed, but its library does not load: {error or 'there is none for this Python'}",
            where=str(folder),
            fix=f"Install it anew: {_FIX}",
        ) from error
    return library


def load(module: str) -> Any:
    """Import a module of FFCV's package, such as `ffcv.writer`, for its writer's side; its loader is of no use then.

    The threads of numba and torch stay as many as they were, and nothing is compiled.

    Raises:
        EnvironmentProblem: FFCV is not installed, or does not load.
    """
    need_ffcv("--to beton")
    import numba
    import torch

    threads, interpreted = (numba.get_num_threads(), torch.get_num_threads()), numba.config.DISABLE_JIT
    try:
        numba.config.DISABLE_JIT = True
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"FFCV is installed, but does not load: {error}", where=module, fix=f"Install it anew: {_FIX}"
        ) from error
    finally:
        numba.config.DISABLE_JIT = interpreted
        numba.set_num_threads(threads[0])
        torch.set_num_threads(threads[1])


class Cropper:
    """Decodes and crops with FFCV's C functions, in memory that one thread keeps; one caller at a time.

    The lock on Python's interpreter is released inside of them.
    """

    def __init__(self) -> None:
        self._library = library()
        self._handle: int | None = self._library.tjInitDecompress()
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
        decompress, target = self._library.tjDecompress2, pixels.ctypes.data
        status = decompress(self._handle, data, len(data), target, width, 0, height, _RGB, _FLAGS)
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
        box_of = y, y + height, x, x + width
        target = out_HWC.ctypes.data, out_HWC.shape[0], out_HWC.shape[1]
        self._library.resize(0, image_HWC.ctypes.data, rows, columns, *box_of, *target)
        if flip:
            mirror(out_HWC)

    def close(self) -> None:
        """Give back the decoder and the memory; may be called twice."""
        if self._handle:
            self._library.tjDestroy(self._handle)
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
