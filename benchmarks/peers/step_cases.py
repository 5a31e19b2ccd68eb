"""Sizes at which the training step and the teacher are compared, ours and the plain ones built from the same weights.

Shape legend: B images, H and W pixels, C channels, M masked patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from counts import flops_of
from peers.plain_step import PlainStep

from mvp_fast.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from mvp_fast.loaders.base import Batch
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.build import set_up_models
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.step import TrainStep

AGREE = 1e-4  # of the loss, in float32; ten times that of the gradient norm
COMPILED_AGREES = 0.02  # of the loss, in the precision that is timed and with stochastic depth
COMPILED = "torch.compile"
BATCHES = 4  # resident; the steps go round


@dataclass(frozen=True)
class Case:
    """A configuration and where it runs."""

    config: Config
    device: str

    def of(self, batch_size: int) -> Case:
        """The same with another batch size."""
        return replace(self, config=replace(self.config, train=replace(self.config.train, batch_size=batch_size)))


SMALL = Case(
    Config(
        data=DataConfig(image_size=112),
        mask=MaskConfig(patches=19, min_block=4),
        student=StudentConfig(width=384, depth=4, heads=6),
        teacher=TeacherConfig("ViT-S-16", "random"),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(batch_size=8, precision="fp32"),  # many CPUs have no fast bf16
    ),
    device="cpu",
)
B16 = Case(
    Config(
        teacher=TeacherConfig("ViT-B-16", "random"),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(batch_size=256, precision="bf16"),
    ),
    device="cuda",
)


class Steps(NamedTuple):
    """Ours, and plain steps by name ("eager", "torch.compile"), all from the same weights."""

    ours: TrainStep
    plain: dict[str, PlainStep]


def make_steps(case: Case, compiled: bool = False) -> Steps:
    """Build ours, the eager one and, where it is asked for, the compiled one."""
    config, device = case.config, torch.device(case.device)
    side = config.data.image_size // 16
    teacher = build_teacher(config.teacher, grid=(side, side), image_size=config.data.image_size).to(device)
    student = Student(config.student, target_width=teacher.width, image_size=config.data.image_size).to(device)
    plain = {"eager": PlainStep(student, teacher, config, device)}
    if compiled:
        plain[COMPILED] = PlainStep(student, teacher, config, device, compiled=True)
    set_up_models(student, teacher, config, device)
    optimizer = build_optimizer(student, config.optim)
    ours = TrainStep(student, student, teacher, Objective(config.objective), optimizer, config, device)
    return Steps(ours, plain)


def make_batches(case: Case) -> list[Batch]:
    """Resident batches, each with its own pixels and masks."""
    config = case.config
    plan = SamplePlan(Index.synthetic(), seed=0, batch_size=config.train.batch_size, data=config.data, mask=config.mask)
    generator, batches = torch.Generator().manual_seed(0), []
    for step in range(BATCHES):
        rows, side = plan.step(step), config.data.image_size
        images_BHWC = torch.randint(0, 256, (len(rows), side, side, 3), dtype=torch.uint8, generator=generator)
        masked_BM = torch.from_numpy(rows.masked_BM())
        batches.append(Batch(step, images_BHWC.to(case.device), masked_BM.to(case.device), rows))
    return batches


def exact(case: Case) -> Case:
    """The case in float32, without what is random or differs on purpose: stochastic depth; the plain optimizer decays
    biases and norms, too."""
    config = replace(
        case.config,
        student=replace(case.config.student, drop_path=0.0),
        train=replace(case.config.train, precision="fp32", batch_size=4),
        optim=replace(case.config.optim, weight_decay=0.0),
    )
    return replace(case, config=config)


def full_float32() -> AbstractContextManager[Any]:
    """No TF32, whose rounding would hide a difference."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if torch.cuda.is_available() else nullcontext()


def check_steps(case: Case) -> None:
    """Same weights and batches, `exact`: the same losses and gradient norms, step after step."""
    case = exact(case)
    ours, plain = make_steps(case)
    with full_float32():
        for batch in make_batches(case)[:2]:
            result, (loss, norm) = ours(batch), plain["eager"](batch.images_BHWC, batch.masked_BM)
            found = result.loss.item(), result.grad_norm.item()
            assert found[0] == pytest.approx(loss, rel=AGREE), f"step {batch.step}: loss {found[0]}, eager's {loss}"
            assert found[1] == pytest.approx(norm, rel=10 * AGREE), (
                f"step {batch.step}: gradient norm {found[1]}, eager's {norm}"
            )


def check_compiled(plain: dict[str, PlainStep], batch: Batch) -> None:
    """As they will be timed, so that nothing is compiled for this alone: the first loss of the same weights."""
    losses = {name: step(batch.images_BHWC, batch.masked_BM)[0] for name, step in plain.items()}
    assert losses[COMPILED] == pytest.approx(losses["eager"], rel=COMPILED_AGREES), f"the first loss: {losses}"


def work(step: Callable[[Batch, Batch], Any], batches: list[Batch], steps: int) -> Callable[[], None]:
    """A round: so many steps, each told the batch that follows, which begins the next round."""
    position = itertools.cycle(itertools.pairwise([*batches, batches[0]]))

    def run() -> None:
        for batch, following in itertools.islice(position, steps):
            step(batch, following)

    return run


def plainly(step: PlainStep) -> Callable[[Batch, Batch], Any]:
    """The plain step, called with batches as ours is."""
    return lambda batch, following: step(batch.images_BHWC, batch.masked_BM)


def flops_an_image(case: Case) -> float:
    """Floating-point operations of an image in the plain step: every token in every layer, forward and backward.

    So what ours leaves out counts in its favour, and shares of the limit can be compared with those of other projects.
    """
    two = case.of(2)
    return flops_of(work(plainly(make_steps(two).plain["eager"]), make_batches(two), 1)) / 2
