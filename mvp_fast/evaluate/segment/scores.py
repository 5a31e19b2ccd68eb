"""Figures of a segmentation, by torchmetrics: mIoU, pixel accuracy, mean class accuracy, IoU of each class.

All of them come from one confusion matrix over all pixels of a set. A class that is in neither truth nor prediction has
no IoU and is left out of the mean; one that is not in the truth has no accuracy and is left out of that mean.

Shape legend: H and W pixels, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mvp_fast.evaluate.segment.legend import IGNORED


@dataclass(frozen=True)
class Figures:
    """What came of a set; shares in [0, 1].

    Attributes:
        miou: mean IoU of the classes that are there.
        pixel_accuracy: share of the labelled pixels that are right.
        mean_accuracy: mean over classes of the share of their pixels that is right.
        iou, accuracy: of each class; None where it has none.
        pixels: of each class, in the truth.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: list[float | None]
    accuracy: list[float | None]
    pixels: list[int]


class Confusion:
    """Counts of pixels by true (rows) and predicted class (columns).

    Args:
        classes: how many.
        device: of the masks that are added.

    Attributes:
        counts_CC: int64 (C, C); may be replaced by counts from elsewhere.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.counts_CC = torch.zeros((classes, classes), dtype=torch.int64, device=device)

    def add(self, predicted_HW: Tensor, truth_HW: Tensor) -> None:
        """Count an image; pixels whose truth is IGNORED do not count."""
        self.counts_CC += multiclass_confusion_matrix(
            predicted_HW,
            truth_HW.long(),
            num_classes=len(self.counts_CC),
            ignore_index=IGNORED,
            validate_args=False,  # it would read the masks back to the host
        )

    def figures(self) -> Figures:
        """What came of it; where no pixel counts, all figures are 0."""
        nothing, whole_CC = torch.zeros(0, dtype=torch.int64), self.counts_CC.cpu()
        metric = MulticlassJaccardIndex(len(whole_CC), average="none", ignore_index=IGNORED, sync_on_compute=False)
        metric.update(nothing, nothing)
        metric.confmat = whole_CC  # its state by its name
        iou_C, counts_CC = metric.compute().double(), whole_CC.double()
        right_C, true_C, said_C = counts_CC.diagonal(), counts_CC.sum(1), counts_CC.sum(0)
        there_C, asked_C = true_C + said_C > 0, true_C > 0
        accuracy_C = right_C / true_C.clamp(min=1)
        return Figures(
            miou=_mean(iou_C[there_C]),
            pixel_accuracy=float(right_C.sum() / true_C.sum().clamp(min=1)),
            mean_accuracy=_mean(accuracy_C[asked_C]),
            iou=_known(iou_C, there_C),
            accuracy=_known(accuracy_C, asked_C),
            pixels=whole_CC.sum(1).tolist(),
        )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _known(values_C: Tensor, known_C: Tensor) -> list[float | None]:
    return [value if known else None for value, known in zip(values_C.tolist(), known_C.tolist(), strict=True)]
