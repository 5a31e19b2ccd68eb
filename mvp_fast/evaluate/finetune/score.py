"""How many images of a test set a classifier names rightly: one passage over centre crops, spread over the ranks.

Shape legend: B images, H and W pixels, C colours, K classes, N images of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders.passage import passage
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.train.distributed import Ranks

TOP5_FROM = 10
"""Classes from which an answer among the first five says something."""


@dataclass
class Counts:
    """What one model answered, summed on the device.

    Attributes:
        seen_K, right_K: int64, images of each class, and those that were named rightly.
        right5: int64 (), images whose class is among the first five.
        loss: float64 (), sum of the cross entropies, without smoothing.
    """

    seen_K: Tensor
    right_K: Tensor
    right5: Tensor
    loss: Tensor

    @classmethod
    def none(cls, classes: int, device: torch.device) -> Counts:
        """Of no image."""
        of_class_K = torch.zeros(classes, dtype=torch.int64, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return cls(of_class_K, of_class_K.clone(), none, none.double())

    def add(self, logits_BK: Tensor, label_B: Tensor) -> None:
        """Take in a batch; the host reads nothing."""
        hit_B = logits_BK.argmax(1) == label_B
        self.seen_K.index_add_(0, label_B, torch.ones_like(label_B))
        self.right_K.index_add_(0, label_B, hit_B.long())
        among_BX = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == label_B[:, None]
        self.right5 += among_BX.sum()
        self.loss += F.cross_entropy(logits_BK.float(), label_B, reduction="none").double().sum()


@dataclass(frozen=True)
class Score:
    """What came of a test.

    Attributes:
        images: that decoded.
        accuracy, accuracy_top5: shares in [0, 1].
        loss: mean cross entropy, without smoothing.
        per_class: accuracy of each class; None where none of its images decoded.
    """

    images: int
    accuracy: float
    accuracy_top5: float
    loss: float
    per_class: list[float | None] = field(repr=False)

    @classmethod
    def of(cls, counts: Counts, ranks: Ranks) -> Score:
        """The counts of all ranks. Every rank must call this.

        Raises:
            DataError: no image decoded.
        """
        seen_K, right_K, right5, loss = (
            ranks.sum(each) for each in (counts.seen_K, counts.right_K, counts.right5, counts.loss)
        )
        images = int(seen_K.sum())
        if not images:
            raise DataError("No image of the test set could be decoded")
        return cls(
            images=images,
            accuracy=int(right_K.sum()) / images,
            accuracy_top5=int(right5) / images,
            loss=float(loss) / images,
            per_class=[
                right / seen if seen else None for right, seen in zip(right_K.tolist(), seen_K.tolist(), strict=True)
            ],
        )

    def figures(self, classes: list[str]) -> dict[str, Any]:
        """As results.json has them."""
        found: dict[str, Any] = {"accuracy": self.accuracy, "loss": self.loss, "images": self.images}
        if len(classes) >= TOP5_FROM:
            found["accuracy_top5"] = self.accuracy_top5
        found["per_class"] = dict(zip(classes, self.per_class, strict=True))
        return found


class Stopped(Exception):
    """The test was broken off."""


def count(
    models: Mapping[str, nn.Module],
    normalise: Callable[[Tensor], Tensor],
    plan: CentrePlan,
    data: DataConfig,
    label_N: npt.NDArray[np.int64],
    classes: int,
    device: torch.device,
    *,
    autocast: bool = False,
    local_ranks: int = 1,
    ledger: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Counts]:
    """What each of some models answers to this rank's part of a test set; they are in training mode afterwards, if so
    before.

    Args:
        models: by name; called as they are written, not as compiled for training.
        normalise: uint8 crops to what the models take.
        plan: this rank's.
        data: how images are loaded.
        label_N: class of each image.
        classes: K.
        autocast: compute in bf16.
        ledger: JSON-lines file for images that do not decode.
        stopped: asked before each batch.

    Raises:
        Stopped: `stopped` said so.
        DataError: more images were bad than the budget allows, or the files no longer fit the index.
    """
    counts = {name: Counts.none(classes, device) for name in models}
    were_training = [model for model in models.values() if model.training]
    for model in models.values():
        model.eval()
    crops = passage(plan, data, device, local_ranks=local_ranks, ledger=ledger)
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for images_BHWC, sample_B in crops:
                if stopped():
                    raise Stopped
                label_B = torch.from_numpy(label_N[sample_B]).to(device, non_blocking=True)
                images_BCHW = normalise(images_BHWC)
                for name, model in models.items():
                    counts[name].add(model.forward(images_BCHW), label_B)
    finally:
        crops.close()
        for model in were_training:
            model.train()
    return counts
