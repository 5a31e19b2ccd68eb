"""Principal components of patch features as colours, jointly over all images shown, as DINOv2 (arXiv 2304.07193) does.

Shape legend: B images, M patches, D channels; R patches of all images that count, K components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvp_fast.errors import ConfigError

COLOURS = 3
# Shares of the patches that may lie outside the range of colours at either end: one odd patch must not pale the others.
TAIL = 0.01


class Components(NamedTuple):
    """What `colours` found.

    Attributes:
        colour_BM3: float64 in [0, 1]; 0 on the background.
        foreground_BM: bool; all True without a threshold.
        explained_K: share of the variance of each component, descending.
    """

    colour_BM3: Tensor
    foreground_BM: Tensor
    explained_K: Tensor


def colours(features_BMD: Tensor, grid: tuple[int, int], foreground: float | None = None) -> Components:
    """The first three components of all patches as red, green and blue.

    Args:
        features_BMD: patch features.
        grid: patches down and across.
        foreground: in (0, 1): only patches whose first component, scaled to [0, 1] over all, exceeds it are shown, and
            the colours are the components of those alone. None shows all.

    Raises:
        ConfigError: fewer than four patches, or channels than colours, are left to compute with.
    """
    features_BMD = features_BMD.double()
    foreground_BM = torch.ones(features_BMD.shape[:2], dtype=torch.bool, device=features_BMD.device)
    if foreground is not None:
        first_BM = principal(features_BMD.flatten(0, 1), 1)[0].view(features_BMD.shape[:2])
        first_BM = inwards(first_BM, grid)
        low, high = first_BM.min(), first_BM.max()
        foreground_BM = (first_BM - low) / (high - low).clamp_min(1e-12) > foreground
    chosen_RD = features_BMD[foreground_BM]
    if min(chosen_RD.shape) <= COLOURS:
        raise ConfigError(
            f"{chosen_RD.shape[0]} patches of {chosen_RD.shape[1]} channels are too few for {COLOURS} components",
            where="--foreground" if foreground is not None else "",
            fix="Lower the threshold, or show more images",
        )
    score_RK, explained_K = principal(chosen_RD, COLOURS)
    low_K, high_K = (score_RK.quantile(share, dim=0) for share in (TAIL, 1 - TAIL))
    colour_BM3 = features_BMD.new_zeros(*foreground_BM.shape, COLOURS)
    colour_BM3[foreground_BM] = ((score_RK - low_K) / (high_K - low_K).clamp_min(1e-12)).clamp(0, 1)
    return Components(colour_BM3, foreground_BM, explained_K)


def principal(features_RD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components of the rows.

    A component's sign is free; here its greatest loading is positive, so that a picture is the same each time.

    Returns:
        score_RK: float64, each row's place along each component.
        explained_K: each component's share of the variance.
    """
    centred_RD = features_RD.double() - features_RD.double().mean(0)
    # By the covariance: D is a few hundred where R is thousands.
    variance_D, axis_DD = torch.linalg.eigh(centred_RD.T @ centred_RD)
    variance_K, axis_DK = variance_D.flip(0)[:count], axis_DD.flip(1)[:, :count]
    greatest_K = axis_DK.gather(0, axis_DK.abs().argmax(0, keepdim=True)).sign()
    total = variance_D.sum().clamp_min(1e-300)
    return centred_RD @ (axis_DK * greatest_K), variance_K.clamp_min(0) / total


def inwards(value_BM: Tensor, grid: tuple[int, int]) -> Tensor:
    """The values, or their negatives, so that the images' borders are lower than their insides: things are inside."""
    border_Y, border_X = (torch.zeros(n, dtype=torch.bool, device=value_BM.device) for n in grid)
    border_Y[[0, -1]] = border_X[[0, -1]] = True
    border_M = (border_Y[:, None] | border_X).flatten()
    if border_M.all() or value_BM[:, border_M].mean() <= value_BM[:, ~border_M].mean():
        return value_BM
    return -value_BM
