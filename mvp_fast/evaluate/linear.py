"""Linear classifiers on frozen features: one a layer and learning rate, all trained at once.

As BEiT v2 probes (arXiv 2208.06366): a linear layer on every block's CLS token and mean of patches, joined. Before it a
batch norm without weights, as in MAE (arXiv 2111.06377): in training by the batch's statistics, after it by those of
the whole training set. AdamW, half a cosine to 0, no augmentation; weights start at 0, so only the order of the samples
is drawn.

A head sees nothing of the others: their losses are added, each has weights of its own, and AdamW treats every weight by
itself. So heads trained together are those trained alone.

Shape legend: B samples of a batch, N of the set, R learning rates, L layers, D channels, C classes, M heads'
logits of a layer (R * C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.evaluate.feature_cache import Features
from mvp_fast.evaluate.progress import Tell

if TYPE_CHECKING:
    from collections.abc import Iterator

EPS = 1e-6  # of the batch norm, as in MAE
READ = 1024  # samples at a time where nothing is trained


@dataclass(frozen=True)
class HeadSettings:
    """How heads are trained.

    Attributes:
        lrs: learning rates, not scaled by anything.
        epochs: over the training samples; the last, smaller batch of an epoch is left out where there are others.
        batch_size: samples a step; all of them where there are fewer.
        weight_decay: of the weights, not of the biases.
        seed: decides the order.
    """

    lrs: tuple[float, ...]
    epochs: int = 90
    batch_size: int = 256
    weight_decay: float = 0.0
    seed: int = 0

    def steps(self, samples: int) -> int:
        """Optimizer steps on so many samples."""
        return self.epochs * max(samples // self.batch_size, 1)


class Bank:
    """Features to train and test heads on, on a device a batch at a time; kept there whole where they fit.

    Args:
        features: of the samples.
        layers: those wanted.
        device: where batches go.
        dtype: of batches, and so of heads that are trained on them.
    """

    def __init__(
        self, features: Features, layers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._features, self._layers, self.device, self.dtype = features, list(layers), device, dtype
        row = features.gather(np.arange(1), self._layers)
        self.shape = (len(features), *row.shape[1:])
        self._resident: Tensor | None = None
        if device.type == "cuda" and len(self) * row.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            self._resident = torch.empty(self.shape, dtype=torch.from_numpy(row).dtype, device=device)
            for low in range(0, len(self), READ):
                part = np.arange(low, min(low + READ, len(self)))
                self._resident[low : low + READ] = torch.from_numpy(features.gather(part, self._layers))

    @property
    def resident(self) -> bool:
        """Whether all of it is kept on the device."""
        return self._resident is not None

    def __len__(self) -> int:
        return len(self._features)

    def batch(self, position_B: npt.NDArray[np.int64]) -> Tensor:
        """(B, L, D) of the samples at these positions."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(position_B).to(self.device)].to(self.dtype)
        return torch.from_numpy(self._features.gather(position_B, self._layers)).to(self.device).to(self.dtype)

    def pieces(self) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        """All samples in order: their positions, and (B, L, D)."""
        for low in range(0, len(self), READ):
            position_B = np.arange(low, min(low + READ, len(self)))
            yield position_B, self.batch(position_B)


@dataclass(frozen=True)
class Heads:
    """Trained heads.

    Attributes:
        weight_RLDC, bias_RL1C: after the last step.
        mean_LD, scale_LD: of the training samples; scale is 1 / sqrt(variance + EPS).
    """

    weight_RLDC: Tensor
    bias_RL1C: Tensor
    mean_LD: Tensor
    scale_LD: Tensor

    def logits(self, x_BLD: Tensor) -> Tensor:
        """(R, L, B, C)."""
        x_LBD = ((x_BLD - self.mean_LD) * self.scale_LD).transpose(0, 1)
        return x_LBD @ self.weight_RLDC + self.bias_RL1C


class Scores(NamedTuple):
    """How well each head does on a set.

    Attributes:
        correct_RL: int64, samples whose class has the greatest logit.
        loss_RL: float64, mean cross-entropy.
    """

    correct_RL: npt.NDArray[np.int64]
    loss_RL: npt.NDArray[np.float64]

    def best(self) -> tuple[int, int]:
        """Learning rate and layer with the most correct samples; of equals the one with the least loss."""
        rates, layers = self.correct_RL.shape
        each = ((rate, layer) for rate in range(rates) for layer in range(layers))
        return min(each, key=lambda at: (-int(self.correct_RL[at]), float(np.nan_to_num(self.loss_RL[at], nan=np.inf))))


def train_heads(
    bank: Bank, label_N: npt.NDArray[np.int64], classes: int, how: HeadSettings, tell: Tell = lambda done: None
) -> Heads:
    """Train a head for each learning rate and layer of the bank.

    Args:
        bank: two samples or more.
        label_N: in [0, classes).
        tell: called with the number of steps done.
    """
    (samples, layers, width), rates = bank.shape, len(how.lrs)
    mean_LD, scale_LD = _statistics(bank)
    label_of = torch.from_numpy(label_N).to(bank.device)
    # A tensor for each learning rate, for the optimizer; joined for one product, many times as fast as one for each.
    weights, biases = (
        [torch.zeros(layers, rows, classes, device=bank.device, dtype=bank.dtype, requires_grad=True) for _ in how.lrs]
        for rows in (width, 1)
    )
    groups = [
        {"params": [parameter], "lr": lr, "weight_decay": decay}
        for lr, weight, bias in zip(how.lrs, weights, biases, strict=True)
        for parameter, decay in ((weight, how.weight_decay), (bias, 0.0))
    ]
    peaks = [lr for lr in how.lrs for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    total, size = how.steps(samples), min(how.batch_size, samples)
    per_epoch = total // how.epochs if how.epochs else 0
    with _fast_products(bank.device):
        for step in range(total):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order_N = np.random.default_rng([how.seed, epoch]).permutation(samples)
            position_B = order_N[place * size : (place + 1) * size]
            x_BLD = bank.batch(position_B)
            normed = F.batch_norm(x_BLD.flatten(1), None, None, training=True, eps=EPS)
            x_LBD = normed.view_as(x_BLD).transpose(0, 1)
            logits_LBM = torch.baddbmm(torch.cat(biases, dim=2), x_LBD, torch.cat(weights, dim=2))
            label_B1 = label_of[torch.from_numpy(position_B).to(bank.device)][:, None]
            label_LBR = label_B1.expand(layers, -1, rates)
            # The mean of each head's own losses, summed over heads.
            loss = F.cross_entropy(logits_LBM.view(-1, classes), label_LBR.flatten(), reduction="sum") / size
            loss.backward()
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
            tell(step + 1)
    with torch.no_grad():
        return Heads(torch.stack(weights), torch.stack(biases), mean_LD, scale_LD)


@torch.no_grad()
def score(heads: Heads, bank: Bank, label_N: npt.NDArray[np.int64]) -> Scores:
    """Every head on every sample of the bank."""
    rates, layers = heads.weight_RLDC.shape[:2]
    correct_RL = torch.zeros(rates, layers, dtype=torch.int64, device=heads.mean_LD.device)
    loss_RL = torch.zeros(rates, layers, dtype=torch.float64, device=heads.mean_LD.device)
    for position_B, x_BLD in bank.pieces():
        label_B = torch.from_numpy(label_N[position_B]).to(x_BLD.device)
        for rate in range(rates):  # one at a time: all heads' logits at once can be gigabytes
            logits_LBC = _of_rate(heads, rate).logits(x_BLD)[0]
            correct_RL[rate] += (logits_LBC.argmax(-1) == label_B).sum(-1)
            chosen_LB = logits_LBC.double().log_softmax(-1).gather(-1, label_B.expand(layers, -1)[..., None])[..., 0]
            loss_RL[rate] -= chosen_LB.sum(-1)
    return Scores(correct_RL.cpu().numpy(), (loss_RL / len(bank)).cpu().numpy())


@torch.no_grad()
def predict(heads: Heads, bank: Bank, top: int = 5) -> npt.NDArray[np.int64]:
    """The classes of each sample by the only head there is, the most likely first: int64 (N, min(top, C))."""
    top = min(top, heads.weight_RLDC.shape[-1])
    found = [heads.logits(x_BLD)[0, 0].topk(top, dim=-1).indices.cpu() for _, x_BLD in bank.pieces()]
    ranked_NC: npt.NDArray[np.int64] = torch.cat(found).numpy()
    return ranked_NC


def _of_rate(heads: Heads, rate: int) -> Heads:
    return Heads(heads.weight_RLDC[rate : rate + 1], heads.bias_RL1C[rate : rate + 1], heads.mean_LD, heads.scale_LD)


def _statistics(bank: Bank) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + EPS) of the samples, in two passes in float64: (L, D)."""
    total = sum(x_BLD.double().sum(0) for _, x_BLD in bank.pieces())
    mean_LD = torch.as_tensor(total) / len(bank)
    squares = sum((x_BLD.double() - mean_LD).square().sum(0) for _, x_BLD in bank.pieces())
    scale_LD = (torch.as_tensor(squares) / len(bank) + EPS).rsqrt()
    return mean_LD.to(bank.dtype), scale_LD.to(bank.dtype)


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """On a GPU float32 products through its tensor cores (TF32)."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
