"""The step of CLIP's training: both towers, and the contrastive loss over the whole global batch (arXiv 2103.00020).

Shape legend: B images of this rank's batch, L tokens of a text, D channels of a feature.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from mvp_fast.config.fit import TeacherFitConfig
from mvp_fast.loaders.base import Batch
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.models.teachers.new_clip import MEAN, STD
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.fit.captions import Captions
from mvp_fast.train.update import StepResult, UpdateStep

GREATEST_SCALE = math.log(100.0)
"""Of the logarithm of the scale (one over the temperature), as in CLIP."""


class FitStep(UpdateStep):
    """One optimizer step.

    The loss is of the whole global batch whatever the ranks and the micro-batches. With several micro-batches, all
    features are made first without a gradient; then each micro-batch is computed again and takes its place among them
    (as in GradCache, arXiv 2101.06983, and open_clip).

    Args:
        clip: the bare model.
        forward: the module that is called: the model itself, or its DistributedDataParallel wrapper.
        captions: of the plan's index.
        optimizer: from `build_optimizer`.
        config: the resolved configuration.
        ranks: among which the features are gathered.
    """

    def __init__(
        self,
        clip: Any,
        forward: nn.Module,
        captions: Captions,
        optimizer: torch.optim.Optimizer,
        config: TeacherFitConfig,
        ranks: Ranks,
    ) -> None:
        super().__init__(clip, forward, optimizer, config, ranks.device)
        self.clip, self.captions, self.seed = clip, captions, config.seed
        self.loss = open_clip.ClipLoss(gather_with_grad=True, rank=ranks.rank, world_size=ranks.world)
        self.pixels = Normaliser(MEAN, STD).to(ranks.device)
        self._tokens_BL = torch.empty(0)
        self._fixed: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: Batch, following: Batch | None = None) -> StepResult:
        """Take one step, and keep the temperature above 1 / 100."""
        result = super().__call__(batch, following)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0.0, GREATEST_SCALE)
        return result

    def begin(self, batch: Batch) -> None:
        """Bring the captions onto the device; with several micro-batches, make the features of all."""
        with self.stage("copy"):
            tokens_BL = torch.from_numpy(self.captions.pick(batch.rows, self.seed))
            if self.device.type == "cuda":
                tokens_BL = tokens_BL.pin_memory().to(self.device, non_blocking=True)
            self._tokens_BL = tokens_BL.long()
        self._fixed = None
        if self.parts > 1:
            size = len(batch.rows) // self.parts
            with torch.no_grad(), self.stage("student forward"):
                found = [
                    self._features(self.clip, batch, slice(at, at + size)) for at in range(0, len(batch.rows), size)
                ]
            images, texts, _ = zip(*found, strict=True)
            self._fixed = torch.cat(images), torch.cat(texts)

    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """The contrastive loss of the whole batch, with a gradient for this micro-batch's features alone."""
        with self.stage("student forward"):
            image_BD, text_BD, scale = self._features(self.forward, batch, these)
        with self.stage("loss"):
            if self._fixed is None:
                loss: Tensor = self.loss(image_BD, text_BD, scale)
                return loss
            image_BD, text_BD = (
                torch.cat((whole[: these.start], own, whole[these.stop :]))
                for whole, own in zip(self._fixed, (image_BD, text_BD), strict=True)
            )
            # The temperature's gradient is whole in each micro-batch: it is taken once, when ranks average.
            scale = scale if part == self.parts - 1 else scale.detach()
            loss = self.loss(image_BD, text_BD, scale)
            # Each micro-batch has its part of the gradient of one loss: a sum, of which the caller takes the mean.
            return loss.detach() + self.parts * (loss - loss.detach())

    def _features(self, model: Any, batch: Batch, these: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Features of length 1, in the weights' type (B, D), of images and texts, and the scale of their products."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            image_BD, text_BD, scale = model(self.pixels(batch.images_BHWC[these]), self._tokens_BL[these])
        return image_BD.to(scale.dtype), text_BD.to(scale.dtype), scale
