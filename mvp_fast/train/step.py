"""One optimizer step: student, teacher, loss, backward, clip, update. No input or output, no host synchronisation.

Shape legend: B images, H and W pixels, C channels, N patches, P pixel values a patch, M masked patches, K tokens in the
loss, D channels of a feature, L blocks, S the two branches of a block (attention, MLP).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import Config
from mvp_fast.loaders.base import Batch
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, uniforms
from mvp_fast.train.inputs import InputMaker, Inputs
from mvp_fast.train.optim import apply_update, clear_gradients, clip_scale
from mvp_fast.train.sharding import is_sharded, norm_of_shards, sync_gradients
from mvp_fast.train.stages import StageRecorder, unrecorded


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; reading it makes the host wait.

    Attributes:
        loss: float32 (), mean over this rank's images.
        grad_norm: float32 (), norm of the whole gradient before clipping (over all ranks).
        finite: bool (), whether loss and gradient were finite, so that the update was taken.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor


class TrainStep:
    """The step as a callable: `step(batch, following) -> StepResult`.

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
        self.student, self.forward, self.teacher = student, forward, teacher
        self.objective, self.optimizer, self.config, self.device = objective, optimizer, config, device
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.autocast = config.train.precision == "bf16"
        self.sharded = is_sharded(student)
        self.ahead = device.type == "cuda" and config.teacher.ahead
        self.inputs = InputMaker(
            student,
            teacher,
            objective,
            device,
            autocast=self.autocast,
            side_stream=self.ahead,
            graph=config.teacher.graph,
        )
        self.stage = unrecorded

    @property
    def stage(self) -> StageRecorder:
        """Told of each stage of the step as it begins and ends; records nothing unless it is replaced."""
        return self._stage

    @stage.setter
    def stage(self, recorder: StageRecorder) -> None:
        self._stage = self.inputs.stage = recorder

    def __call__(self, batch: Batch, following: Batch | None = None) -> StepResult:
        """Take one step.

        Args:
            batch: on the device.
            following: the batch that comes next, where it is there already.
        """
        clear_gradients(self.optimizer)
        parts = self.config.train.accumulate
        size = len(batch.rows) // parts
        with self.stage("copy"):
            drop_scale_LSB = self._drop_scale(batch.rows)
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            inputs = self.inputs.take(*_micro_batch(batch, part, size))
            if self.ahead and part + 1 < parts:
                self.inputs.submit(*_micro_batch(batch, part + 1, size))
            elif self.ahead and following is not None:
                self.inputs.submit(*_micro_batch(following, 0, size))
            these = slice(part * size, (part + 1) * size)
            with self._gradient_sync(last=part == parts - 1):
                part_loss = self._loss(
                    inputs, None if drop_scale_LSB is None else drop_scale_LSB[:, :, these], 1.0 / parts
                )
                # A non-finite loss can have a finite gradient (smooth L1 of an infinite target). Made NaN here, the
                # gradient tells every rank after its all-reduce, and all of them skip the same update.
                with self.stage("backward"):
                    finite = torch.isfinite(part_loss.detach())
                    factor = part_loss.new_full((), torch.nan).masked_fill_(finite, 1.0 / parts)
                    (part_loss * factor).backward()
            loss += part_loss.detach() / parts
        with self.stage("clip"):
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            grad_norm = norm_of_shards(gradients) if self.sharded else nn.utils.get_total_norm(gradients)
            grad_scale = clip_scale(grad_norm, self.config.optim.clip_grad)
        with self.stage("optimizer"):
            finite = torch.isfinite(grad_norm)
            apply_update(self.optimizer, finite, grad_scale)
        return StepResult(loss, grad_norm, finite)

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

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks average their gradients in the last micro-batch only."""
        if self.sharded:
            sync_gradients(self.student, last=last)
        if not last and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()


def _micro_batch(batch: Batch, part: int, size: int) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Key (step, part), images_BHWC and masked_BM of a part of a batch."""
    these = slice(part * size, (part + 1) * size)
    return (batch.step, part), batch.images_BHWC[these], batch.masked_BM[these]
