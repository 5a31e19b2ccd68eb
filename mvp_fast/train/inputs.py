"""What the student's step takes, made from a batch: patches, mask, the tokens in the loss and their targets.

On a GPU this can run ahead: the next batch's targets on a stream of their own while the student works on this one, and
the whole of it, teacher included, as one CUDA graph. Neither changes a result.

Shape legend: B images, H and W pixels, C channels, N patches, P pixel values a patch, M masked patches, K tokens in the
loss, D channels of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mvp_fast.models.graphs import GraphedFunction
from mvp_fast.models.patches import patches_of_both
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.train.stages import StageRecorder, unrecorded


class Inputs(NamedTuple):
    """Of one micro-batch.

    Attributes:
        patches_BNP: the student's patches.
        mask_BN: bool, True where the mask token goes.
        index_BK: int64, the tokens in the loss.
        target_BKD: the teacher's features of those tokens, as they are.
    """

    patches_BNP: Tensor
    mask_BN: Tensor
    index_BK: Tensor
    target_BKD: Tensor


@dataclass(frozen=True)
class _Ahead:
    inputs: Inputs
    ready: torch.cuda.Event | None


class InputMaker:
    """Makes `Inputs`, now or ahead.

    Args:
        student, teacher, objective: whose inputs these are.
        device: where everything runs.
        autocast: whether the student runs under bf16 autocast, which decides its patches' type.
        side_stream: work on a stream of its own, which a graph needs, too; on a GPU alone.
        graph: replay a CUDA graph; on a GPU alone.

    Attributes:
        stage: told of each stage, see `TrainStep`.
        taken_ahead: how often `take` found what it wanted ready.
        graph: what replays it all, or None.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: Objective,
        device: torch.device,
        *,
        autocast: bool,
        side_stream: bool = False,
        graph: bool = False,
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self.device, self.autocast = device, autocast
        self.stage: StageRecorder = unrecorded
        self.taken_ahead = 0
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu and (side_stream or graph) else None
        # Two turns: one that the student reads, and one that is being written.
        self.graph = GraphedFunction(self._make, turns=2) if graph and on_gpu else None
        self._ahead: dict[tuple[int, int], _Ahead] = {}

    def submit(self, key: tuple[int, int], images_BHWC: Tensor, masked_BM: Tensor) -> None:
        """Make the inputs of micro-batch `key` (step, part) on the side stream; `take` will want them next.

        The tensors must be there for the current stream; on the side stream they are read later.
        """
        if self._stream is None:
            self._ahead[key] = _Ahead(self._compute(images_BHWC, masked_BM), None)
            return
        # The side stream begins after all that was queued so far: nothing that it writes is still being read.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            inputs = self._compute(images_BHWC, masked_BM)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        for tensor in (images_BHWC, masked_BM):
            tensor.record_stream(self._stream)
        self._ahead[key] = _Ahead(inputs, ready)

    def take(self, key: tuple[int, int], images_BHWC: Tensor, masked_BM: Tensor) -> Inputs:
        """The inputs of micro-batch `key`: those made ahead where there are, else made now."""
        if key in self._ahead:
            self.taken_ahead += 1
        else:
            self.submit(key, images_BHWC, masked_BM)
        ahead = self._ahead.pop(key)
        self._ahead.clear()  # of batches that never came
        if ahead.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ahead.ready)
            if self.graph is None:  # a graph's own memory is never given back
                for tensor in ahead.inputs:
                    tensor.record_stream(stream)
        return ahead.inputs

    def _compute(self, images_BHWC: Tensor, masked_BM: Tensor) -> Inputs:
        if self.graph is None:
            return Inputs(*self._make(images_BHWC, masked_BM, self.stage))
        with self.stage("teacher"):  # one replay: patches and targets are not told apart
            return Inputs(*self.graph(images_BHWC, masked_BM))

    def _make(
        self, images_BHWC: Tensor, masked_BM: Tensor, stage: StageRecorder = unrecorded
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, patches = images_BHWC.shape[0], self.student.grid[0] * self.student.grid[1]
        # No cache of cast weights: it would outlive a capture, and be read in the next.
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False)
        with torch.no_grad(), autocast:
            with stage("patchify"):
                mask_BN = torch.zeros(images, patches, dtype=torch.bool, device=self.device)
                mask_BN.scatter_(1, masked_BM, True)
                index_BK = self.objective.token_index(masked_BM, patches)
                student_BNP, teacher_BNP = patches_of_both(images_BHWC, self.student, self.teacher)
            with stage("teacher"):
                target_BKD = self.teacher(teacher_BNP, index_BK)
        return student_BNP, mask_BN, index_BK, target_BKD
