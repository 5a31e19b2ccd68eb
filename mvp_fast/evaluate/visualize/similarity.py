"""How similar the features of one patch are to all others of its image.

Shape legend: B images, M patches, K chosen patches, D channels.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.errors import ConfigError

_PLACE = re.compile(r"(?P<row>\d+),(?P<column>\d+)|x=(?P<x>\d+),y=(?P<y>\d+)")


class Patch(NamedTuple):
    """A patch of the grid, from 0."""

    row: int
    column: int


def find_patch(words: str, grid: tuple[int, int], patch_size: int) -> Patch:
    """The patch that `ROW,COLUMN` names, counted from 0, or the pixel `x=X,y=Y` of the crop lies in.

    Raises:
        ConfigError: it can't be read, or lies outside the grid.
    """
    found = _PLACE.fullmatch(words.replace(" ", ""))
    if not found:
        raise ConfigError(
            f"{words!r} names no patch",
            where="--patch",
            fix="Say ROW,COLUMN counted from 0, such as 7,4, or a pixel of the crop, such as x=120,y=88",
        )
    if found["row"] is not None:
        patch = Patch(int(found["row"]), int(found["column"]))
    else:
        patch = Patch(int(found["y"]) // patch_size, int(found["x"]) // patch_size)
    if patch.row >= grid[0] or patch.column >= grid[1]:
        raise ConfigError(
            f"The patch {words} lies outside the grid of {grid[0]} rows and {grid[1]} columns"
            f" ({grid[0] * patch_size} x {grid[1] * patch_size} px)",
            where="--patch",
            fix=f"Rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}",
        )
    return patch


def usual_patches(grid: tuple[int, int]) -> list[Patch]:
    """Three to look at where none were named: the centre, and half-way from it to two corners."""
    rows, columns = grid
    places = [(rows // 2, columns // 2), (rows // 4, columns // 4), (3 * rows // 4, 3 * columns // 4)]
    return [Patch(*place) for place in dict.fromkeys(places)]


def similarity(features_BMD: Tensor, patches: list[Patch], grid: tuple[int, int]) -> Tensor:
    """The cosine of each chosen patch with every patch of its image: (B, K, M)."""
    unit_BMD = F.normalize(features_BMD.double(), dim=-1)
    number_K = torch.tensor([patch.row * grid[1] + patch.column for patch in patches], device=unit_BMD.device)
    return unit_BMD[:, number_K] @ unit_BMD.transpose(1, 2)
