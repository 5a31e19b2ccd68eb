"""Small sets with masks and a small network, for the tests of segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mvp_fast.config.schema import StudentConfig
from mvp_fast.export.timm_format import write_timm
from mvp_fast.models.student import Student

STUDENT = StudentConfig(width=48, depth=4, heads=3)
# A run that takes some tens of milliseconds a step on a CPU.
TINY = {
    "data.image-size": 64,
    "data.threads": 1,
    "data.loader": "torchvision",
    "segment.decoder-channels": 16,
    "train.batch-size": 4,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.log-every": 1,
    "optim.lr": 1e-3,
    "optim.reference-batch-size": 4,
    "run.tensorboard": False,
}
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], dtype=np.uint8)
"""The colour of each class of a rendering."""


def tiny_student(image_size: int = 64, seed: int = 0) -> Student:
    student = Student(STUDENT, target_width=16, image_size=image_size, seed=seed)
    with torch.no_grad():  # fresh tables are zero, and look alike wherever they are resampled to
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return student


def export(folder: Path, image_size: int = 64) -> Path:
    """A small network in timm's format."""
    return write_timm(tiny_student(image_size), folder)


def random_mask(height: int, width: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Rectangles of the classes 0 to 4, from large ones to single pixels: uint8 (H, W)."""
    mask_HW = np.zeros((height, width), dtype=np.uint8)
    for size in (40, 20, 10, 5, 2, 1):
        for _ in range(6):
            y, x = rng.integers(0, height), rng.integers(0, width)
            mask_HW[y : y + size, x : x + size] = rng.integers(0, len(COLOURS))
    return mask_HW


def save_mask(path: Path, mask_HW: npt.NDArray[Any], kind: str = "palette") -> None:
    """A mask as a PNG file: with a palette, in grey of 8 or in grey of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "grey 16":
        Image.fromarray(mask_HW.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(mask_HW.astype(np.uint8))
    if kind == "palette":
        image.putpalette(COLOURS.tobytes())
    image.save(path)


def renderings(root: Path, count: int, kind: str = "palette", sizes: tuple[int, int] = (70, 120)) -> Path:
    """`root`/images/*.png, each the colours of its mask in `root`/masks/*.png; classes.txt names five classes."""
    rng = np.random.default_rng(7)
    (root / "images" / "some").mkdir(parents=True)
    for number in range(count):
        mask_HW = random_mask(*rng.integers(*sizes, 2), rng)
        Image.fromarray(COLOURS[mask_HW]).save(root / "images" / "some" / f"{number}.png")
        save_mask(root / "masks" / "some" / f"{number}.png", mask_HW, kind)
    (root / "classes.txt").write_text("black\nred\ngreen\nblue\nwhite\n")
    return root
