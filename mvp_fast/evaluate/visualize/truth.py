"""How well a text's map finds what the text names, where the images have masks (the synthetic scenes do).

Masks are read for this figure alone; nothing that makes the map knows of them.

Shape legend: B images, T texts, M patches.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mvp_fast.errors import DataError
from mvp_fast.evaluate.visualize.images import Shown
from mvp_fast.samples.index import Index
from mvp_fast.samples.scenes.folder import MANIFEST, MASKS
from mvp_fast.samples.scenes.vocabulary import MASK_GROUND

COVERED = 0.5
"""A patch is of a thing that covers this share of its pixels or more."""


def legend(index: Index) -> dict[str, int]:
    """The mask value of each word, without the ground's; empty where the set has no masks with a legend."""
    manifest = index.root / MANIFEST
    if index.is_synthetic or not manifest.is_file() or not (index.root / MASKS).is_dir():
        return {}
    try:
        found: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["mask_legend"]
        return {word: int(value) for value, word in found.items() if int(value) != MASK_GROUND}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"The legend of the masks can't be read: {error!r}", where=str(manifest)) from error


def named(text: str, words: dict[str, int]) -> str | None:
    """The one word of the legend that the text names, also in the plural; None where it names none or several."""
    spoken = set(re.findall(r"[^\W\d_]+", text.lower()))
    found = [word for word in words if spoken & {word, f"{word}s", f"{word}es"}]
    return found[0] if len(found) == 1 else None


def coverage(shown: Shown, value: int) -> npt.NDArray[np.float32]:
    """The share of each patch's pixels that has this mask value: (B, M), M row-major.

    Raises:
        DataError: a mask is missing, or of another size than its image.
    """
    plan = shown.plan
    assert plan is not None
    found = []
    for sample in shown.sample_B.tolist():
        path = _mask_path(plan.index, sample)
        rows = plan.rows(0, sample)
        x, y, width, height = (int(column[0]) for column in (rows.x_B, rows.y_B, rows.width_B, rows.height_B))
        mask_HW = _read(path, (int(plan.index.width[sample]), int(plan.index.height[sample])))
        part = Image.fromarray((mask_HW == value).astype(np.float32)[y : y + height, x : x + width])
        shares = part.resize((plan.grid[1], plan.grid[0]), Image.Resampling.BOX)
        found.append(np.asarray(shares, dtype=np.float32).ravel())
    return np.stack(found)


def figures(map_BTM: Tensor, shown: Shown, texts: list[str], words: dict[str, int]) -> list[dict[str, Any]]:
    """For each text that names a thing, how well its map ranks the patches of all images: those of the thing first?

    Returns:
        For each: text, word, images, images_with_it, patches (share that are of it: a random map's average precision),
        roc_auc and average_precision (None where no image has it), shares in [0, 1].
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    result = []
    for number, text in enumerate(texts):
        word = named(text, words)
        if word is None:
            continue
        truth_BM = torch.from_numpy(coverage(shown, words[word]) >= COVERED)
        score_BM = map_BTM[:, number].cpu().double()
        both = bool(truth_BM.any()) and not bool(truth_BM.all())
        # The functions squash scores outside [0, 1] by a sigmoid; a cosine is moved there, its order kept.
        arguments = ((score_BM.flatten() + 1) / 2).clamp(0, 1), truth_BM.flatten().long()
        result.append(
            {
                "text": text,
                "word": word,
                "images": len(truth_BM),
                "images_with_it": int(truth_BM.any(1).sum()),
                "patches": float(truth_BM.float().mean()),
                "roc_auc": float(binary_auroc(*arguments)) if both else None,
                "average_precision": float(binary_average_precision(*arguments)) if both else None,
            }
        )
    return result


def _mask_path(index: Index, sample: int) -> Path:
    return index.root / MASKS / PurePosixPath(index.key(sample)).with_suffix(".png")


def _read(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.size == size:
                return np.asarray(image)
            problem = f"the mask has {image.width}x{image.height} pixels, its image {size[0]}x{size[1]}"
    except (OSError, ValueError, SyntaxError) as error:
        problem = f"the mask can't be read: {error}"
    raise DataError(problem[0].upper() + problem[1:], where=str(path), fix="Draw the set anew, or leave --text out")
