"""The step of segmentation: colours, network, cross entropy of the pixels; the rest is every task's (`train.update`).

Shape legend: B images, H and W pixels, C classes, h and w places of a map.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.config.segment import SegmentSettings
from mvp_fast.evaluate.segment.legend import IGNORED
from mvp_fast.evaluate.segment.network import AUXILIARY_CHANNELS, Noise, Segmenter, upsample
from mvp_fast.evaluate.segment.noise import change_colours, draw_colours, draw_noise, slice_noise
from mvp_fast.loaders.base import Batch
from mvp_fast.train.update import StepResult, UpdateStep


class SegmentStep(UpdateStep):
    """One optimizer step; arguments as `UpdateStep`'s."""

    model: Segmenter

    def __init__(
        self,
        model: Segmenter,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SegmentSettings,
        device: torch.device,
    ) -> None:
        super().__init__(model, forward, optimizer, config, device)
        self.segment, self.seed = config.segment, config.seed
        self.noise = Noise()
        self.colours_B4: npt.NDArray[np.float64] | None = None
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        self.statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]

    def __call__(self, batch: Batch, following: Batch | None = None) -> StepResult:
        """Take one step; one whose update is skipped leaves no trace in the batch norms' running statistics either."""
        before = [statistic.clone() for statistic in self.statistics]
        result = super().__call__(batch, following)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(torch.where(result.finite, statistic, old))
        return result

    def begin(self, batch: Batch) -> None:
        """Draw what the whole batch drops, and its colours."""
        channels = (self.model.channels, AUXILIARY_CHANNELS)
        with self.stage("copy"):
            rates, dropout = self.model.depth.rates, self.segment.dropout
            self.noise = draw_noise(batch.rows, rates, channels, dropout, self.seed, self.device)
            self.colours_B4 = draw_colours(batch.rows, self.seed) if self.segment.photometric else None

    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """The pixels' cross entropy; that of the auxiliary head is added by its weight."""
        images_BHWC = batch.images_BHWC[these]
        assert batch.target is not None
        with self.stage("patchify"):
            if self.colours_B4 is not None:
                images_BHWC = change_colours(images_BHWC, self.colours_B4[these])
        with self.stage("student forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            scores_BChw, auxiliary_BChw = self.forward(images_BHWC, slice_noise(self.noise, these))
        with self.stage("loss"):
            loss = pixel_loss(scores_BChw, batch.target[these])
            if auxiliary_BChw is not None:
                loss = loss + self.segment.auxiliary * pixel_loss(auxiliary_BChw, batch.target[these])
            return loss


def pixel_loss(scores_BChw: Tensor, target_BHW: Tensor) -> Tensor:
    """Cross entropy, the mean over all pixels; ignored ones add nothing: float32 ().

    As in mmsegmentation the divisor counts ignored pixels too: a batch without any label has a loss of 0, and means
    over micro-batches and ranks are those over the whole batch.
    """
    scores_BCHW = upsample(scores_BChw, target_BHW.shape[1:])
    total = F.cross_entropy(scores_BCHW, target_BHW.long(), ignore_index=IGNORED, reduction="sum")
    return total / target_BHW.numel()
