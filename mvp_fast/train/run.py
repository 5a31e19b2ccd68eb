"""What every training run is made of, whatever its task: pre-training, fine-tuning, segmentation.

The loop (`loop`) knows a run by this alone. A task says how its parts are built, what its step does, what else its
checkpoints hold, and what there is to evaluate on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.loaders.base import Loader
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.checkpoint import load_weights
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.optim import load_optimizer_tensors, optimizer_tensors
from mvp_fast.train.parts import Parts, read_part
from mvp_fast.train.sharding import gather
from mvp_fast.train.sinks import Metrics
from mvp_fast.train.telemetry import Interval
from mvp_fast.train.update import UpdateStep
from mvp_kernels import dispatch, registry


@dataclass(kw_only=True)
class Run(ABC):
    """Everything a run is made of, and the state it has reached.

    Attributes:
        plan: this rank's part of the plan.
        model: that is trained, bare.
        ema: timm's ModelEmaV3 around the model, or None.
        total_steps: optimizer steps in the whole run.
        changed: settings that are no longer those of the checkpoint the run goes on from, in words.
        steps_done: optimizer steps taken so far.
        skipped: updates skipped so far.
        replaced: images trained on so far that stood in for a bad sample; on rank 0 with what came before a resume.
        interval: results since the last metric line.
        task: what the run does, as its checkpoints say.
        part: what checkpoints call the model's weights.
    """

    task: ClassVar[str]
    part: ClassVar[str]

    config: RunSettings
    ranks: Ranks
    plan: SamplePlan
    model: nn.Module
    ema: Any
    optimizer: torch.optim.Optimizer
    step: UpdateStep
    total_steps: int
    changed: list[str]
    steps_done: int = 0
    skipped: int = 0
    replaced: int = 0
    interval: Interval = field(default_factory=Interval)

    @abstractmethod
    def header(self, kernels: str) -> list[str]:
        """What runs, in a few lines: a word, then what there is to say of it from column 10 on."""

    @abstractmethod
    def whole_plan(self) -> SamplePlan:
        """The plan of the whole global batch, whichever rank this is."""

    def about(self) -> dict[str, Any]:
        """What environment.json says of the task."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the task's checkpoints say beside what all of them do; JSON-able."""
        return {}

    def build_loader(self, ledger: Path | None) -> Loader:
        """The loader that the configuration names; `ledger` takes the samples that did not decode."""
        data, ranks = self.config.data, self.ranks
        return make_loader(
            data.loader,
            data,
            seed=self.config.seed,
            local_ranks=ranks.local_world,
            ledger=ledger,
            device=ranks.device,
        )

    def evaluation_due(self) -> bool:
        """Whether `evaluate` is to be called after the step just taken; the same on all ranks."""
        return False

    def evaluate(self, stopped: Callable[[], bool]) -> Metrics:
        """Figures of the model as it stands, such as `test_top1`. Every rank must call this.

        Args:
            stopped: whether the run is to end; then an evaluation may break off and return nothing.
        """
        return {}

    def parameter_names(self) -> dict[Tensor, str]:
        """The name of each of the model's parameters."""
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def checkpoint_parts(self) -> Parts:
        """The tensors that a checkpoint holds, whole, in named parts; on rank 0.

        Every rank must call this: it takes a mean over them, and gathers what is spread over them.
        """
        parts = {
            self.part: self.model.state_dict(),
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
            "task": self.task,
            "config": config_to_dict(self.config),
            "plan": self.plan.state(),
            "total_steps": self.total_steps,
            "skipped": self.skipped,
            **self.state(),
        }

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint whose `state` was found to fit.

        Raises:
            DataError: it is damaged, or of another model.
        """
        load_weights(self.model, checkpoint, self.part)
        load_optimizer_tensors(self.optimizer, self.parameter_names(), read_part(checkpoint, "optimizer"))
        if self.ema is not None:
            # A run that begins to average now averages from the weights it has.
            load_weights(self.ema.module, checkpoint, "ema" if (checkpoint / "ema").is_dir() else self.part)
        progress = read_part(checkpoint, "progress")
        self.interval.load_state(progress, self.ranks.device)
        self.replaced = int(progress["replaced"]) if self.ranks.is_main else 0
        self.steps_done, self.skipped = int(state["step"]), int(state["skipped"])


def open_index(config: RunSettings) -> Index:
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


def count_steps(config: RunSettings, index: Index) -> int:
    """Optimizer steps in a whole run."""
    train = config.train
    return train.steps or max(1, round(train.epochs * len(index) / train.batch_size))


def check_micro_batches(config: RunSettings, plan: SamplePlan) -> None:
    """ConfigError where a rank's images can't be split into the micro-batches."""
    if plan.local_batch_size % config.train.accumulate:
        raise ConfigError(
            f"A rank's {plan.local_batch_size} images can't be split into {config.train.accumulate} micro-batches",
            where="train.accumulate",
        )


def check_kernels(config: RunSettings, device: torch.device) -> None:
    """EnvironmentProblem where the kernels that are asked for can't run here."""
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


def build_ema(model: nn.Module, config: RunSettings) -> Any:
    """timm's ModelEmaV3 around the model, or None where nothing is averaged."""
    if config.train.ema_decay == 0:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=config.train.ema_decay)
