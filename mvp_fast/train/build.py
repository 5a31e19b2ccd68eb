"""From a configuration to the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.loaders.base import Loader
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.student import Student, patch_size_of
from mvp_fast.models.teachers.base import Teacher, teacher_dtype
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.checkpoint import load_weights, read_state
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from mvp_fast.train.parts import Parts, read_part
from mvp_fast.train.resume import check_plan, check_settings, check_teacher
from mvp_fast.train.sharding import check_optimizer, gather, shard
from mvp_fast.train.step import TrainStep
from mvp_fast.train.telemetry import Interval
from mvp_kernels import dispatch, registry


@dataclass
class Run:
    """Everything a run is made of, and the state it has reached.

    Attributes:
        plan: this rank's part of the plan.
        ema: timm's ModelEmaV3 around the student, or None.
        total_steps: optimizer steps in the whole run.
        changed: settings that are no longer those of the checkpoint the run goes on from, in words.
        steps_done: optimizer steps taken so far.
        skipped: updates skipped so far.
        replaced: images trained on so far that stood in for a bad sample; on rank 0 with what came before a resume.
        interval: results since the last metric line.
    """

    config: Config
    ranks: Ranks
    plan: SamplePlan
    student: Student
    ema: Any
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    step: TrainStep
    total_steps: int
    changed: list[str]
    steps_done: int = 0
    skipped: int = 0
    replaced: int = 0
    interval: Interval = field(default_factory=Interval)

    def parameter_names(self) -> dict[Tensor, str]:
        """The name of each of the student's parameters."""
        return {parameter: name for name, parameter in self.student.named_parameters()}

    def checkpoint_parts(self) -> Parts:
        """The tensors that a checkpoint holds, whole, in named parts; on rank 0.

        Every rank must call this: it takes a mean over them, and gathers what is spread over them.
        """
        parts = {
            "student": self.student.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.parameter_names()),
            "progress": {**self.interval.state(self.ranks), "replaced": self.all_replaced().reshape(1)},
        }
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        return {name: gather(tensors, keep=self.ranks.is_main) for name, tensors in parts.items()}

    def all_replaced(self) -> Tensor:
        """`replaced` over all ranks, int64 (), on the host. Every rank must call this."""
        return self.ranks.sum(torch.tensor(self.replaced))

    def checkpoint_state(self) -> dict[str, Any]:
        """What must fit when a run goes on from a checkpoint, and what it needs besides tensors."""
        return {
            "config": config_to_dict(self.config),
            "plan": self.plan.state(),
            "teacher": self.teacher.fingerprint,
            "target_width": self.teacher.width,
            "total_steps": self.total_steps,
            "skipped": self.skipped,
        }


def build_run(config: Config, ranks: Ranks, checkpoint: Path | None) -> Run:
    """Build every part, at step 0 or at `checkpoint`.

    Raises:
        ConfigError: the configuration names something that does not exist or does not fit together.
        DataError: the index, its files or the checkpoint are missing or do not fit.
        EnvironmentProblem: a kernel implementation was asked for that this machine can't run.
    """
    _check_kernels(config, ranks.device)
    if ranks.shares(config.train):
        check_optimizer(config.optim.name)
    state = read_state(checkpoint) if checkpoint else None  # cheap, and may end the attempt before models are built
    index = open_index(config)
    plan = SamplePlan(
        index,
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=config.data,
        mask=config.mask,
        patch_size=patch_size_of(config.student.name),
        rank=ranks.rank,
        world=ranks.world,
    )
    if plan.local_batch_size % config.train.accumulate:
        raise ConfigError(
            f"A rank's {plan.local_batch_size} images can't be split into {config.train.accumulate} micro-batches",
            where="train.accumulate",
        )
    changed: list[str] = []
    if state is not None and checkpoint is not None:
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
    ema = _build_ema(student, config)  # a copy of the weights, so before they are spread
    for model in (student,) if ema is None else (student, ema.module):
        if ranks.shares(config.train):
            shard(model, ranks, bf16=config.train.precision == "bf16")
        else:
            model.to(ranks.device)
    forward = student if ranks.shares(config.train) else ranks.wrap(student)
    optimizer = build_optimizer(student, config.optim)
    objective = Objective(config.objective, impl=config.kernels.impl)
    step = TrainStep(student, forward, teacher, objective, optimizer, config, ranks.device)
    total = config.train.steps or max(1, round(config.train.epochs * len(index) / config.train.batch_size))
    run = Run(config, ranks, plan, student, ema, teacher, optimizer, step, total, changed)
    if checkpoint is not None and state is not None:
        _load(run, checkpoint, state)
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


def open_index(config: Config) -> Index:
    """The data set's index, spot-checked against its files; a stand-in of ImageNet's size for `synthetic`."""
    if not config.data.index:
        if config.data.loader == "synthetic":
            return Index.synthetic()
        raise ConfigError(
            "There is no data set: data.index is empty",
            fix="Write an index with `mvp-fast data index DIR` and give --data.index DIR,"
            " or try --data.loader synthetic",
        )
    index = Index.open(config.data.index)
    if config.data.loader != "synthetic":
        index.check_files()
    return index


def build_loader(run: Run, ledger: Path | None) -> Loader:
    """The loader that the configuration names; `ledger` takes the samples that did not decode."""
    return make_loader(
        run.config.data.loader,
        run.config.data,
        seed=run.config.seed,
        local_ranks=run.ranks.local_world,
        ledger=ledger,
        device=run.ranks.device,
    )


def _check_kernels(config: Config, device: torch.device) -> None:
    impl, variable = config.kernels.impl, registry.ENVIRONMENT
    try:
        dispatch.resolve(impl, device.type)
    except dispatch.KernelUnavailable as error:
        by_variable = impl == "auto"  # auto itself can always be met
        raise EnvironmentProblem(
            str(error),
            where=f"the environment variable {variable}" if by_variable else f"kernels.impl {impl}",
            fix=f"Unset {variable}, or set it to reference" if by_variable else "Set kernels.impl to auto or reference",
        ) from error


def _build_ema(student: Student, config: Config) -> Any:
    if config.train.ema_decay == 0:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(student, decay=config.train.ema_decay)


def _load(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    load_weights(run.student, checkpoint, "student")
    load_optimizer_tensors(run.optimizer, run.parameter_names(), read_part(checkpoint, "optimizer"))
    if run.ema is not None:
        # A run that begins to average now averages from the weights it has.
        load_weights(run.ema.module, checkpoint, "ema" if (checkpoint / "ema").is_dir() else "student")
    progress = read_part(checkpoint, "progress")
    run.interval.load_state(progress, run.ranks.device)
    run.replaced = int(progress["replaced"]) if run.ranks.is_main else 0
    run.steps_done, run.skipped = int(state["step"]), int(state["skipped"])
