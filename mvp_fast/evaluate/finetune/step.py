"""The fine-tuning step: erase, mix, classify; the rest is every task's (`train.update`). No host synchronisation.

Shape legend: B images, H and W pixels, C colours, K classes, N training images, L blocks, S branches of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from mvp_fast.config.finetune import FinetuneConfig
from mvp_fast.evaluate.drop_path import PlannedDepth
from mvp_fast.evaluate.finetune.mixing import Erasing, Mixing
from mvp_fast.loaders.base import Batch
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.train.drop_path import scales, to_device
from mvp_fast.train.update import UpdateStep


class FinetuneStep(UpdateStep):
    """One optimizer step of fine-tuning.

    Args:
        model: the bare model.
        forward: the model itself, or its DistributedDataParallel wrapper.
        optimizer: from `build_optimizer`.
        config: the resolved configuration.
        device: where everything runs.
        label_N: class of each sample of the plan's index.
        classes: K.
        normalise: pixels to what the model takes.
        depth: the model's stochastic depth.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: FinetuneConfig,
        device: torch.device,
        *,
        label_N: npt.NDArray[np.int64],
        classes: int,
        normalise: Normaliser,
        depth: PlannedDepth,
    ) -> None:
        super().__init__(model, forward, optimizer, config, device)
        how = config.augmentation
        self.seed, self.label_N, self.normalise, self.depth = config.seed, label_N, normalise, depth
        self.erasing = Erasing(how.random_erasing, how.random_erasing_mode, config.seed, device)
        self.erases = how.random_erasing > 0
        self.mixing = Mixing(how, classes, config.seed, config.data.repeat) if how.mixup or how.cutmix else None
        self.soft_loss, self.hard_loss = SoftTargetCrossEntropy(), LabelSmoothingCrossEntropy(how.label_smoothing)
        self._label_B: Tensor | None = None
        self._scale_LSB: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Bring the batch's classes and stochastic depth onto the device."""
        with self.stage("copy"):
            label_B = torch.from_numpy(self.label_N[batch.rows.sample_B])
            (self._label_B,) = to_device([label_B], self.device)
            if self.depth.rates:
                (self._scale_LSB,) = to_device([scales(batch.rows, self.depth.rates, self.seed)], self.device)

    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """Cross entropy with the mixed or smoothed classes."""
        assert self._label_B is not None
        with self.stage("patchify"), torch.no_grad():
            images_BCHW, target_B = self.normalise(batch.images_BHWC[these]), self._label_B[these]
            if self.erases:
                self.erasing(images_BCHW, batch.rows.slice(these.start, these.stop))
            if self.mixing is not None:
                images_BCHW, target_BK = self.mixing(images_BCHW, target_B, batch.step)
        if self._scale_LSB is not None:
            self.depth.set(self._scale_LSB[:, :, these])
        with self.stage("student forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits_BK = self.forward(images_BCHW)
        with self.stage("loss"):
            loss: Tensor
            if self.mixing is not None:
                loss = self.soft_loss(logits_BK.float(), target_BK)
            else:
                loss = self.hard_loss(logits_BK.float(), target_B)
            return loss
