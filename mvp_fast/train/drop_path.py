"""Stochastic depth (arXiv 1603.09382) from the plan: which images drop which branch of which block.

A pure function of seed, epoch and position, so that resumed runs agree. Where each image drops by its own chance
(`scales`), ranks and batch splits agree, too. Where a fixed number of each micro-batch drops (`kept_images`), that
number belongs to the micro-batch: the images in it with the lowest of the same random numbers are kept.

Shape legend: B images, L blocks, S the two branches of a block (attention, MLP), K images that keep a branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, uniforms


def scales(rows: PlanRows, rates: Sequence[float], seed: int) -> Tensor:
    """Factors of the branches: 0 or 1 / keep, float32 (L, S, B), on the CPU.

    Args:
        rows: of the batch.
        rates: of the blocks, in [0, 1).
        seed: of the run.
    """
    keep_L11 = 1.0 - np.asarray(rates, dtype=np.float64)[:, None, None]
    uniforms_LSB = _uniforms(rows, len(rates), seed)
    return torch.from_numpy(np.where(uniforms_LSB < keep_L11, 1.0 / keep_L11, 0.0).astype(np.float32))


def kept_images(rows: PlanRows, rates: Sequence[float], seed: int) -> list[Tensor]:
    """For each block the images that keep its branches, ascending: int64 (S, K) each, on the CPU.

    K is the nearest to (1 - rate) B, at least 1. Arguments as in `scales`; the rows are of a micro-batch.
    """
    ranked_LSB = np.argsort(_uniforms(rows, len(rates), seed), axis=-1, kind="stable")
    counts = [max(1, round((1.0 - rate) * len(rows))) for rate in rates]
    return [
        torch.from_numpy(np.sort(ranked_SB[:, :count], axis=-1).astype(np.int64))
        for ranked_SB, count in zip(ranked_LSB, counts, strict=True)
    ]


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integer or float tensors of one type onto a device in one copy, for which the host does not wait."""
    if device.type != "cuda":
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _uniforms(rows: PlanRows, depth: int, seed: int) -> npt.NDArray[np.float64]:
    """In [0, 1): (L, S, B)."""
    uniforms_BX = uniforms(seed, Stream.DROP_PATH, rows.epoch_B, rows.position_B, 2 * depth)
    return uniforms_BX.reshape(-1, depth, 2).transpose(1, 2, 0)
