"""What a process that augments images does: RandAugment on a part of a batch, in place, in memory that it shares.

timm's RandAugment draws from Python's and numpy's global states, so it runs in processes, not threads. Each image is
drawn from seeds of its own: neither the number of processes nor what they did before changes it.

Nothing heavy is imported: of timm the one file, without the package around it, which would bring torch along.

Shape legend: B images of a part, H and W pixels, C colours.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvp_fast.samples.workers import start_worker

# Pillow shears and rotates with these; `area` is for making images smaller.
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BILINEAR,
}

_memory: npt.NDArray[np.uint8] | None = None
_transform: Any = None


def make_transform(policy: str, image_size: int, mean: tuple[float, ...], interpolation: str) -> Any:
    """timm's RandAugment as timm's training transforms set it up; what an image leaves bare gets the mean colour.

    Args:
        policy: in timm's notation.
        image_size: side, pixels.
        mean: of values in [0, 1].
        interpolation: the filter of rotation, shear and translation.
    """
    transform = _auto_augment().rand_augment_transform
    return transform(
        policy,
        {
            "translate_const": int(image_size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": FILTERS[interpolation],
        },
    )


def _auto_augment() -> ModuleType:
    """timm/data/auto_augment.py as a module of its own; it needs Pillow and numpy alone.

    At its greatest magnitude timm asks for posterizing to 0 bits, which made an image black until Pillow began to
    refuse it; here it still does.
    """
    package = importlib.util.find_spec("timm")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("mvp_fast_auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    posterize = module.posterize

    def any_bits(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
        if bits < 1:
            return Image.new(image.mode, image.size)
        posterized: Image.Image = posterize(image, bits, **settings)
        return posterized

    module.NAME_TO_OP.update({name: any_bits for name, op in module.NAME_TO_OP.items() if op is posterize})
    return module


def augment(transform: Any, image_HWC: npt.NDArray[np.uint8], seed_4: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """One image through `transform`, with both global states set from four random words."""
    random.seed(int.from_bytes(seed_4.astype("<u4").tobytes(), "little"))
    np.random.seed(seed_4)  # noqa: NPY002 (timm draws from it)
    return np.asarray(transform(Image.fromarray(image_HWC)))


def start(memory: Any, shape: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Initializer of a process.

    Args:
        memory: shared by all: uint8, slots of a batch each.
        shape: of `memory`: slots, B, H, W, C.
        arguments: for `make_transform`.
    """
    global _memory, _transform
    start_worker()
    _memory = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
    _transform = make_transform(*arguments)


def work(slot: int, start: int, seeds_B4: npt.NDArray[np.uint32]) -> float:
    """Augment images `start`, start + 1, ... of a slot; returns the processor seconds it took."""
    assert _memory is not None
    begin = time.process_time()
    for number, seed_4 in enumerate(seeds_B4, start):
        image_HWC = _memory[slot, number]
        image_HWC[:] = augment(_transform, image_HWC, seed_4)
    return time.process_time() - begin
