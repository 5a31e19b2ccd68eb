"""One optimizer step of any task: micro-batches, backward, clip, update. No input or output, no host synchronisation.

A task says what the loss of a micro-batch is; all else is the same for all of them.

Shape legend: B images.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvp_fast.config.schema import RunSettings
from mvp_fast.loaders.base import Batch
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


class UpdateStep(ABC):
    """The step as a callable: `step(batch, following) -> StepResult`.

    Args:
        model: the bare model (its parameters are what `optimizer` updates).
        forward: the module that is called: the model itself, or its DistributedDataParallel wrapper.
        optimizer: from `build_optimizer`; its learning rate is set by the caller.
        config: the resolved configuration.
        device: where everything runs.

    Attributes:
        ahead: whether the step wants to see the batch that follows, to work ahead on it.
    """

    ahead = False

    def __init__(
        self,
        model: nn.Module,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunSettings,
        device: torch.device,
    ) -> None:
        self.model, self.forward, self.optimizer, self.device = model, forward, optimizer, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parts, self.clip_grad = config.train.accumulate, config.optim.clip_grad
        self.autocast = config.train.precision == "bf16"
        self.sharded = is_sharded(model)
        self.stage = unrecorded

    @property
    def stage(self) -> StageRecorder:
        """Told of each stage of the step as it begins and ends; records nothing unless it is replaced."""
        return self._stage

    @stage.setter
    def stage(self, recorder: StageRecorder) -> None:
        self._stage = recorder

    def begin(self, batch: Batch) -> None:
        """What a task makes once of the whole batch, before its first micro-batch."""
        return

    @abstractmethod
    def part_loss(self, batch: Batch, following: Batch | None, part: int, these: slice) -> Tensor:
        """The mean loss over a micro-batch's images, float32 (), with its graph; autocast is the task's own.

        Args:
            batch: on the device.
            following: the batch that comes next, where it is there already.
            part: number of the micro-batch.
            these: its rows of the batch.
        """

    def __call__(self, batch: Batch, following: Batch | None = None) -> StepResult:
        """Take one step.

        Args:
            batch: on the device.
            following: the batch that comes next, where it is there already.
        """
        clear_gradients(self.optimizer)
        size = len(batch.rows) // self.parts
        self.begin(batch)
        return self.update(lambda part: self.part_loss(batch, following, part, slice(part * size, (part + 1) * size)))

    def update(self, part_loss_of: Callable[[int], Tensor]) -> StepResult:
        """Forward and backward of each micro-batch, then the update; the gradients must have been cleared.

        Args:
            part_loss_of: from a micro-batch's number to its mean loss, float32 (), with its graph.
        """
        parts = self.parts
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            with self._gradient_sync(last=part == parts - 1):
                part_loss = part_loss_of(part)
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
            grad_scale = clip_scale(grad_norm, self.clip_grad)
        with self.stage("optimizer"):
            finite = torch.isfinite(grad_norm)
            apply_update(self.optimizer, finite, grad_scale)
        return StepResult(loss, grad_norm, finite)

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks average their gradients in the last micro-batch only."""
        if self.sharded:
            sync_gradients(self.model, last=last)
        if not last and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()
