"""The pre-training step: student, teacher, loss; the rest is every task's (`update`). No host synchronisation.

Shape legend: B images, H and W pixels, C channels, N patches, P pixel values a patch, M masked patches, K tokens in the
loss, D channels of a feature, L blocks, S the two branches of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvp_fast.config.schema import Config
from mvp_fast.loaders.base import Batch
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.plan import PlanRows
from mvp_fast.train import step_graph
from mvp_fast.train.drop_path import kept_images, scales, to_device
from mvp_fast.train.inputs import InputMaker, Inputs
from mvp_fast.train.optim import clear_gradients
from mvp_fast.train.stages import StageRecorder
from mvp_fast.train.step_graph import StepGraph
from mvp_fast.train.update import StepResult, UpdateStep

INPUTS = len(Inputs._fields)


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
        graph: forward, backward and update as one CUDA graph, with train.step_graph on a GPU.
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
        self._subset = config.student.drop_path_mode == "subset"
        self._drop_scale_LSB: Tensor | None = None
        self._kept_parts: list[list[Tensor] | None] = []
        super().__init__(student, forward, optimizer, config, device)
        self.graph: StepGraph | None = None
        if config.train.step_graph and device.type == "cuda":
            self.graph = StepGraph(self._update_from, self.parts)
            step_graph.prepare(optimizer, device)
        self._taken = 0

    @property
    def stage(self) -> StageRecorder:
        """Told of each stage of the step as it begins and ends; records nothing unless it is replaced."""
        return self._stage

    @stage.setter
    def stage(self, recorder: StageRecorder) -> None:
        self._stage = self.inputs.stage = recorder

    def __call__(self, batch: Batch, following: Batch | None = None) -> StepResult:
        """Take one step; see `UpdateStep`. As a CUDA graph where there is one, after some steps without."""
        self._taken += 1
        if self.graph is None or self._taken <= step_graph.WARM_UP:
            return super().__call__(batch, following)
        if self._taken == step_graph.WARM_UP + 1:
            clear_gradients(self.optimizer)  # those of the capture get places of their own, and keep them
        self.begin(batch)
        size = len(batch.rows) // self.parts
        for part in range(self.parts):
            inputs = self._take(batch, following, part, size)
            self.graph.load(part, [*inputs, *self._drops(part, size)])
        with self.stage("student forward"):
            return StepResult(*self.graph.run())

    def _update_from(self, parts: step_graph.Parts) -> tuple[Tensor, ...]:
        """The step from the tensors of its micro-batches alone: loss, grad_norm, finite."""

        def part_loss_of(part: int) -> Tensor:
            inputs, drops = Inputs(*parts[part][:INPUTS]), list(parts[part][INPUTS:])
            scale_LSB = drops[0] if drops and not self._subset else None
            return self._loss(inputs, scale_LSB, 1.0 / self.parts, drops if self._subset and drops else None)

        result = self.update(part_loss_of)
        return result.loss, result.grad_norm, result.finite

    def begin(self, batch: Batch) -> None:
        """Bring the batch's stochastic depth onto the device."""
        with self.stage("copy"):
            self._drop_scale_LSB = self._drop_scale(batch.rows)
            size = len(batch.rows) // self.parts
            parts = (batch.rows.slice(part * size, (part + 1) * size) for part in range(self.parts))
            self._kept_parts = [self._kept(rows) for rows in parts]

    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """The objective's loss; the inputs that come next are queued first, where the step works ahead."""
        inputs = self._take(batch, following, part, these.stop - these.start)
        scale_LSB = None if self._drop_scale_LSB is None else self._drop_scale_LSB[:, :, these]
        return self._loss(inputs, scale_LSB, 1.0 / self.parts, self._kept_parts[part])

    def _take(self, batch: Batch, following: Batch | None, part: int, size: int) -> Inputs:
        """The inputs of a micro-batch; those that come next are queued behind them, where the step works ahead."""
        inputs = self.inputs.take(*_micro_batch(batch, part, size))
        if self.ahead and part + 1 < self.parts:
            self.inputs.submit(*_micro_batch(batch, part + 1, size))
        elif self.ahead and following is not None:
            self.inputs.submit(*_micro_batch(following, 0, size))
        return inputs

    def _drops(self, part: int, size: int) -> list[Tensor]:
        """What a micro-batch drops, as tensors: the factors, or each block's images; none where nothing drops."""
        if self._drop_scale_LSB is not None:
            return [self._drop_scale_LSB[:, :, part * size : (part + 1) * size]]
        return self._kept_parts[part] or []

    def _loss(
        self, inputs: Inputs, drop_scale_LSB: Tensor | None, upstream: float, kept: list[Tensor] | None = None
    ) -> Tensor:
        with self.stage("student forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            predicted_BKD = self.forward(inputs.patches_BNP, inputs.mask_BN, inputs.index_BK, drop_scale_LSB, kept)
        with self.stage("loss"):
            return self.objective(predicted_BKD, inputs.target_BKD, upstream)

    def _drop_scale(self, rows: PlanRows) -> Tensor | None:
        """Factors of the branches where each image drops by its own chance, on the device; None where none drops."""
        rates = self.student.drop_path_rates
        if not any(rates) or self._subset:
            return None
        return to_device([scales(rows, rates, self.config.seed)], self.device)[0]

    def _kept(self, rows: PlanRows) -> list[Tensor] | None:
        """The images of a micro-batch that keep each block's branches, where only they are computed."""
        rates = self.student.drop_path_rates
        if not any(rates) or not self._subset:
            return None
        return to_device(kept_images(rows, rates, self.config.seed), self.device)


def _micro_batch(batch: Batch, part: int, size: int) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Key (step, part), images_BHWC and masked_BM of a part of a batch."""
    these = slice(part * size, (part + 1) * size)
    return (batch.step, part), batch.images_BHWC[these], batch.masked_BM[these]
