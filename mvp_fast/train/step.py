"""The pre-training step: student, teacher, loss; the rest is every task's (`update`). No host synchronisation.

Shape legend: B images, H and W pixels, C channels, N patches, P pixel values a patch, M masked patches, K tokens in the
loss, D channels of a feature, L blocks, S the two branches of a block (attention, MLP).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import Config
from mvp_fast.loaders.base import Batch
from mvp_fast.models.student import Student
from mvp_fast.models.teacher import Teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, uniforms
from mvp_fast.train.inputs import InputMaker, Inputs
from mvp_fast.train.stages import StageRecorder
from mvp_fast.train.update import UpdateStep


class TrainStep(UpdateStep):
    """One optimizer step of pre-training.

    Args:
        student: the bare student (its parameters are what `optimizer` updates).
        forward: the module that is called: the student itself, or its DistributedDataParallel wrapper.
        teacher: frozen; its features are the targets.
        objective: which tokens, which normalisation, which loss.
        optimizer: from `build_optimizer`; its learning rate is set by the caller.
        config: the resolved configuration.
        device: where everything runs.

    Attributes:
        inputs: makes the student's inputs and targets, ahead where `ahead` says so.
        ahead: whether the inputs of the next micro-batch are made beside the student's work on this one.
    """

    def __init__(
        self,
        student: Student,
        forward: nn.Module,
        teacher: Teacher,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
    ) -> None:
        self.student, self.teacher, self.objective, self.config = student, teacher, objective, config
        self.ahead = device.type == "cuda" and config.teacher.ahead
        self.inputs = InputMaker(
            student,
            teacher,
            objective,
            device,
            autocast=config.train.precision == "bf16",
            side_stream=self.ahead,
            graph=config.teacher.graph,
        )
        self._drop_scale_LSB: Tensor | None = None
        super().__init__(student, forward, optimizer, config, device)

    @property
    def stage(self) -> StageRecorder:
        """Told of each stage of the step as it begins and ends; records nothing unless it is replaced."""
        return self._stage

    @stage.setter
    def stage(self, recorder: StageRecorder) -> None:
        self._stage = self.inputs.stage = recorder

    def begin(self, batch: Batch) -> None:
        """Bring the batch's stochastic depth onto the device."""
        with self.stage("copy"):
            self._drop_scale_LSB = self._drop_scale(batch.rows)

    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """The objective's loss; the inputs that come next are queued first, where the step works ahead."""
        size = these.stop - these.start
        inputs = self.inputs.take(*_micro_batch(batch, part, size))
        if self.ahead and part + 1 < self.parts:
            self.inputs.submit(*_micro_batch(batch, part + 1, size))
        elif self.ahead and following is not None:
            self.inputs.submit(*_micro_batch(following, 0, size))
        scale_LSB = None if self._drop_scale_LSB is None else self._drop_scale_LSB[:, :, these]
        return self._loss(inputs, scale_LSB, 1.0 / self.parts)

    def _loss(self, inputs: Inputs, drop_scale_LSB: Tensor | None, upstream: float) -> Tensor:
        with self.stage("student forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            predicted_BKD = self.forward(inputs.patches_BNP, inputs.mask_BN, inputs.index_BK, drop_scale_LSB)
        with self.stage("loss"):
            return self.objective(predicted_BKD, inputs.target_BKD, upstream)

    def _drop_scale(self, rows: PlanRows) -> Tensor | None:
        """Stochastic depth (arXiv 1603.09382) from the plan: 0 or 1 / keep for each block, branch and image.

        A pure function of seed, epoch and position, so that ranks, batch splits and resumed runs agree.
        """
        rates_L = np.asarray(self.student.drop_path_rates, dtype=np.float64)
        if not rates_L.any():
            return None
        depth = len(rates_L)
        uniforms_BLS = uniforms(self.config.seed, Stream.DROP_PATH, rows.epoch_B, rows.position_B, 2 * depth)
        uniforms_LSB = uniforms_BLS.reshape(-1, depth, 2).transpose(1, 2, 0)
        keep_L11 = 1.0 - rates_L[:, None, None]
        scale_LSB = torch.from_numpy(np.where(uniforms_LSB < keep_L11, 1.0 / keep_L11, 0.0).astype(np.float32))
        if self.device.type == "cuda":
            return scale_LSB.pin_memory().to(self.device, non_blocking=True)
        return scale_LSB


def _micro_batch(batch: Batch, part: int, size: int) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Key (step, part), images_BHWC and masked_BM of a part of a batch."""
    these = slice(part * size, (part + 1) * size)
    return (batch.step, part), batch.images_BHWC[these], batch.masked_BM[these]
