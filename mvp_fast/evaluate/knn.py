"""Weighted k-nearest-neighbour classification of frozen features, in pieces of bounded size.

As in Wu et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294): each of the k most similar training samples votes for
its class with weight exp(cos / T), T = 0.07.

Products are in float64 and then whole numbers: a similarity is a multiple of 2**-32, a vote one of 2**-32 of the
nearest neighbour's. So nothing depends on the order of summation or the size of the pieces, and ties have a rule: of
equally similar samples the first in the training set comes first, of classes with equal votes the first in the list.

Shape legend: Q queries, B of them at a time, N training samples, M of them at a time, D channels, K neighbours,
C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.progress import Tell

STEP = 2.0**-32  # of similarities and of votes


class Rows(Protocol):
    """A matrix that is read by slices of rows; numpy arrays are such."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and channels."""
        ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]: ...


class Neighbours(NamedTuple):
    """The most similar training samples of each query, the most similar first.

    Attributes:
        row_QK: int64, rows of the training set.
        similarity_QK: float64, cosines.
    """

    row_QK: npt.NDArray[np.int64]
    similarity_QK: npt.NDArray[np.float64]


def neighbours(
    query_QD: Rows,
    bank_ND: Rows,
    k: int,
    *,
    device: torch.device | str = "cpu",
    query_chunk: int = 1024,
    bank_chunk: int = 16384,
    tell: Tell = lambda done: None,
) -> Neighbours:
    """Find them; at most query_chunk * bank_chunk similarities are in memory at once, and the bank is read once.

    Args:
        query_QD, bank_ND: finite, any float type; a row of zeros is as far from everything as at a right angle.
        k: neighbours; all of the bank where it has fewer.
        tell: called with the number of rows of the bank that are done.

    Raises:
        ConfigError: k is below 1, or the bank is empty.
    """
    (queries, _), (rows, _) = query_QD.shape, bank_ND.shape
    if k < 1 or rows < 1:
        raise ConfigError(f"There are no {k} neighbours among {rows} samples", where="k", fix="Take 1 or more")
    k = min(k, rows)
    # A neighbour is one whole number, its similarity above its row, so that no two are equal.
    best_QK = torch.full((queries, k), torch.iinfo(torch.int64).min, device=device)
    for low in range(0, rows, bank_chunk):
        part_MD = _unit(bank_ND[low : low + bank_chunk], device)
        last_M = rows - 1 - torch.arange(low, low + len(part_MD), device=device)
        for first in range(0, queries, query_chunk):
            here = slice(first, min(first + query_chunk, queries))
            similarity_QM = (_unit(query_QD[here], device) @ part_MD.T).div_(STEP).round_()
            key_QM = similarity_QM.to(torch.int64).mul_(rows).add_(last_M)
            both = torch.cat((best_QK[here], key_QM), dim=1)
            best_QK[here] = both.topk(k, dim=1).values
        tell(low + len(part_MD))
    key_QK = best_QK.cpu().numpy()
    return Neighbours(rows - 1 - key_QK % rows, (key_QK // rows) * STEP)


def _unit(part_MD: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """Rows of length one, float64, on the device."""
    values_MD = torch.from_numpy(np.ascontiguousarray(part_MD)).to(device).double()
    length_M1: Tensor = values_MD.norm(dim=1, keepdim=True)
    return values_MD / length_M1.clamp_min(torch.finfo(torch.float64).tiny)


def vote(
    found: Neighbours,
    label_N: npt.NDArray[np.int64],
    classes: int,
    k: int,
    temperature: float = 0.07,
    *,
    top: int = 5,
    query_chunk: int = 4096,
) -> npt.NDArray[np.int64]:
    """The classes by the votes of the first k neighbours, the most likely first: int64 (Q, min(top, classes)).

    Args:
        found: k or fewer of each query.
        label_N: classes of the training samples, in [0, classes).
        temperature: T.

    Raises:
        ConfigError: the temperature is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"The temperature is {temperature:g}, but must be above 0", where="--temperature")
    ranked = []
    for low in range(0, len(found.row_QK), query_chunk):
        row_BK, similarity_BK = (each[low : low + query_chunk, :k] for each in found)
        weight_BK = np.rint(np.exp((similarity_BK - similarity_BK[:, :1]) / temperature) / STEP).astype(np.int64)
        votes_BC = np.zeros((len(row_BK), classes), dtype=np.int64)
        np.add.at(votes_BC, (np.arange(len(row_BK))[:, None], label_N[row_BK]), weight_BK)
        ranked.append(np.argsort(-votes_BC, axis=1, kind="stable")[:, :top])
    return np.concatenate(ranked)
