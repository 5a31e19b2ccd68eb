"""From a configuration to the parts of a pre-training run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError
from mvp_fast.loaders.registry import describe
from mvp_fast.models.student import Student, patch_size_of
from mvp_fast.models.teachers.base import PRECISIONS, Teacher, teacher_dtype
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.fp8 import quantise_linears
from mvp_fast.models.teachers.tower import TowerTeacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train import step_graph
from mvp_fast.train.checkpoint import read_state
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.resume import check_plan, check_settings, check_task, check_teacher
from mvp_fast.train.run import Run, build_ema, check_kernels, check_micro_batches, count_steps, open_index
from mvp_fast.train.sharding import check_optimizer, shard
from mvp_fast.train.step import TrainStep

FP8_IMAGES = 32  # whose features say what FP8 does to them


@dataclass(kw_only=True)
class PretrainRun(Run):
    """A run that pre-trains `student` against `teacher`.

    Attributes:
        fp8_cosine: with teacher.fp8, of the features with and without, the mean and the least over tokens.
    """

    task = "pretrain"
    part = "student"

    config: Config
    model: Student
    step: TrainStep
    teacher: Teacher
    fp8_cosine: tuple[float, float] | None = None

    @property
    def student(self) -> Student:
        """The model that is trained."""
        return self.model

    def about(self) -> dict[str, Any]:
        """The teacher's fingerprint, and what FP8 does to its features."""
        fp8 = {} if self.fp8_cosine is None else {"teacher_fp8_cosine": list(self.fp8_cosine)}
        return {"teacher": self.teacher.fingerprint, **fp8}

    def state(self) -> dict[str, Any]:
        """What the teacher was, and what the student's head predicts."""
        return {"teacher": self.teacher.fingerprint, "target_width": self.teacher.width}

    def whole_plan(self) -> SamplePlan:
        """The plan of the whole global batch, whichever rank this is."""
        return _plan(self.config, self.plan.index, self.plan.patch_size, 0, 1)

    def header(self, kernels: str) -> list[str]:
        """What runs, in a few lines."""
        config, ranks = self.config, self.ranks
        weights = sum(p.numel() for p in self.student.parameters()) / 1e6
        how = f"{' compiled,' if self.student.compiled else ''}{' one CUDA graph,' if self.step.graph else ''}"
        return [
            f"student   {config.student.name}, {weights:.1f} M weights, {config.train.precision},"
            f"{how} on {ranks.world} x {ranks.device_name}",
            f"teacher   {self.teacher.words}, {self.teacher.width} channels, frozen, {_how_targets_are_made(self)}",
            f"data      {len(self.plan.index):,} images, {describe(config.data, ranks.device)},"
            f" {config.data.interpolation}, batch {config.train.batch_size}",
            *_sharding(self),
            f"kernels   {kernels}",
        ]


def build_run(config: Config, ranks: Ranks, checkpoint: Path | None) -> PretrainRun:
    """Build every part, at step 0 or at `checkpoint`.

    Raises:
        ConfigError: the configuration names something that does not exist or does not fit together.
        DataError: the index, its files or the checkpoint are missing or do not fit.
        EnvironmentProblem: a kernel implementation was asked for that this machine can't run.
    """
    check_kernels(config, ranks.device)
    if config.train.step_graph:
        step_graph.check(config.optim.name, ranks.world)
    if ranks.shares(config.train):
        check_optimizer(config.optim.name)
    state = read_state(checkpoint) if checkpoint else None  # cheap, and may end the attempt before models are built
    index = open_index(config)
    plan = _plan(config, index, patch_size_of(config.student.name), ranks.rank, ranks.world)
    check_micro_batches(config, plan)
    changed: list[str] = []
    if state is not None and checkpoint is not None:
        check_task(state, PretrainRun.task, checkpoint)
        check_plan(state, plan, checkpoint)
        changed = check_settings(state, config, checkpoint)
    teacher = build_teacher(
        config.teacher,
        grid=plan.grid,
        image_size=config.data.image_size,
        cls=config.objective.cls,
        impl=config.kernels.impl,
    )
    student = Student(
        config.student,
        target_width=teacher.width,
        image_size=config.data.image_size,
        seed=config.seed,
        impl=config.kernels.impl,
    )
    teacher.to(ranks.device)
    set_up_models(student, teacher, config, ranks.device)
    if state is not None and checkpoint is not None:
        check_teacher(state, teacher, checkpoint)
    ema = build_ema(student, config)  # a copy of the weights, so before they are spread
    for model in (student,) if ema is None else (student, ema.module):
        if ranks.shares(config.train):
            shard(model, ranks, bf16=config.train.precision == "bf16")
        else:
            model.to(ranks.device)
    forward = student if ranks.shares(config.train) else ranks.wrap(student)
    optimizer = build_optimizer(student, config.optim)
    objective = Objective(config.objective, impl=config.kernels.impl)
    run = PretrainRun(
        config=config,
        ranks=ranks,
        plan=plan,
        model=student,
        ema=ema,
        teacher=teacher,
        optimizer=optimizer,
        step=TrainStep(student, forward, teacher, objective, optimizer, config, ranks.device),
        total_steps=count_steps(config, index),
        changed=changed,
    )
    if config.teacher.fp8:
        run.fp8_cosine = _quantise_teacher(run)
    if checkpoint is not None and state is not None:
        run.load(checkpoint, state)
    return run


def set_up_models(student: Student, teacher: Teacher, config: Config, device: torch.device) -> None:
    """Put into effect how the models run on a device: types, compiler, memory for the backward pass.

    The weights that a checkpoint holds stay float32.
    """
    if config.train.recompute:
        student.recompute_blocks()
    if config.train.compile == "blocks" or (config.train.compile == "auto" and device.type == "cuda"):
        student.compile_blocks()
    dtype = teacher_dtype(config.teacher.precision, config.train.precision, device)
    if dtype != torch.float32:
        teacher.lower(dtype)


def _plan(config: Config, index: Index, patch_size: int, rank: int, world: int) -> SamplePlan:
    """The plan of one rank of so many."""
    return SamplePlan(
        index,
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=config.data,
        mask=config.mask,
        patch_size=patch_size,
        rank=rank,
        world=world,
    )


def _quantise_teacher(run: PretrainRun) -> tuple[float, float]:
    """Put the teacher's linear layers into FP8; mean and least cosine of a batch's features with and without."""
    teacher = run.teacher
    if not isinstance(teacher, TowerTeacher) or not teacher.lowered:
        what = f"computes in {teacher.dtype}".replace("torch.", "") if isinstance(teacher, TowerTeacher) else "has none"
        raise ConfigError(
            f"FP8 is for the linear layers of a tower in fp16 or bf16, and this teacher {what}",
            where="teacher.fp8",
            fix="Set teacher.precision to fp16 or bf16, or leave teacher.fp8 off",
        )
    loader = run.build_loader(None)
    with closing(loader), closing(loader.batches(run.plan, 0)) as batches:  # type: ignore[type-var]
        images_BHWC = next(batches).images_BHWC[:FP8_IMAGES].to(run.ranks.device)
    patches_BNP = teacher.patches(images_BHWC)
    tokens = torch.arange(int(not teacher.has_cls), 1 + patches_BNP.shape[1], device=run.ranks.device)
    index_BM = tokens.expand(len(images_BHWC), -1).contiguous()
    before_BMD = teacher(patches_BNP, index_BM)
    quantise_linears(teacher.blocks)
    cosine_BM = F.cosine_similarity(teacher(patches_BNP, index_BM).float(), before_BMD.float(), dim=-1)
    return float(cosine_BM.mean()), float(cosine_BM.min())


def _how_targets_are_made(run: PretrainRun) -> str:
    """Precision, then how it runs: `fp16, CUDA graph, one batch ahead`, `fp32, eager`."""
    teacher = run.config.teacher
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == run.teacher.dtype)
    on_gpu = run.ranks.device.type == "cuda"
    how = "CUDA graph" if on_gpu and teacher.graph else "eager"
    if run.fp8_cosine is not None:
        mean, least = run.fp8_cosine
        precision = f"fp8 (cosine to {precision} features {mean:.4f}, least {least:.4f})"
    return f"{precision}, {how}{', one batch ahead' if run.step.ahead else ''}"


def _sharding(run: PretrainRun) -> list[str]:
    ranks, train = run.ranks, run.config.train
    if run.step.sharded:
        return [f"sharding  full: weights, gradients and optimizer state in {ranks.world} parts"]
    return ["sharding  full has no effect: there is one rank"] if train.sharding == "full" else []
