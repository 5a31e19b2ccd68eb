"""A fine-tuning run: its state, its tests on the way, and what results.json says at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mvp_fast.config.finetune import FinetuneConfig
from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import DataError, Preempted
from mvp_fast.evaluate.finetune.augment import RandAugmentLoader, workers_of
from mvp_fast.evaluate.finetune.score import TOP5_FROM, Score, Stopped, count
from mvp_fast.evaluate.finetune.step import FinetuneStep
from mvp_fast.evaluate.labels import Labels
from mvp_fast.evaluate.network import Network
from mvp_fast.evaluate.results import read_results, write_results
from mvp_fast.loaders.base import Loader
from mvp_fast.loaders.registry import describe, make_loader
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.run import Run
from mvp_fast.train.sinks import Metrics

RESULTS = "results.json"
EMA = "ema"  # the averaged weights' name among the tested models
WEIGHTS = "test"  # the last weights'


@dataclass(frozen=True)
class Origin:
    """What the run began from.

    Attributes:
        network: its shape.
        words: what it was, for people.
        fingerprint: of shape and weights.
        step: of a run, how many optimizer steps it had taken.
    """

    network: Network
    words: str
    fingerprint: str
    step: int | None

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints and results.json have it, without the shape."""
        return {"words": self.words, "fingerprint": self.fingerprint, "step": self.step}


@dataclass(kw_only=True)
class FinetuneRun(Run):
    """A run that trains a classifier.

    Attributes:
        origin: the network that it began from.
        labels: classes of both sets; of the training set, those of the plan's index.
        available: images of the training set, before the share of the labels was taken.
        test: index of the test set.
        scores: of the last test by model, and the step it was taken at.
    """

    task = "finetune"
    part = "model"

    config: FinetuneConfig
    step: FinetuneStep
    origin: Origin
    labels: Labels
    available: int
    test: Index
    scores: dict[str, Score] = field(default_factory=dict)
    scored_at: int = -1
    failure: DataError | None = None
    broken_off: bool = False

    def about(self) -> dict[str, Any]:
        """The network that the run began from."""
        return {"backbone": self.origin.to_dict()}

    def state(self) -> dict[str, Any]:
        """What the model is rebuilt from, and what it began from."""
        return {
            "network": self.origin.network.to_dict(),
            "classes": self.labels.classes,
            "backbone": self.origin.to_dict(),
        }

    def whole_plan(self) -> SamplePlan:
        """The plan of the whole global batch, whichever rank this is."""
        return training_plan(self.config, self.plan.index, self.plan.patch_size, 0, 1)

    def header(self, kernels: str) -> list[str]:
        """What runs, in a few lines; the kernels have no part in it."""
        config, ranks, how = self.config, self.ranks, self.config.augmentation
        weights = sum(p.numel() for p in self.model.parameters()) / 1e6
        images, share = len(self.plan.index), config.finetune.label_fraction
        part = "" if share == 1 else f" ({100 * share:g} % of {self.available:,})"
        mixing = [f"{name} {value:g}" for name, value in (("mixup", how.mixup), ("cutmix", how.cutmix)) if value]
        erasing = [f"erasing {how.random_erasing:g}"] if how.random_erasing else []
        changes = [*filter(None, [how.rand_augment]), *mixing, *erasing, f"label smoothing {how.label_smoothing:g}"]
        return [
            f"network   {self.origin.words}, {weights:.1f} M weights, {config.train.precision},"
            f"{' compiled,' if compiles(config, ranks.device) else ''} on {ranks.world} x {ranks.device_name}",
            f"data      {images:,} images{part} of {len(self.labels.classes):,} classes,"
            f" {describe(self._training_data(), self._loading_device())}, batch {config.train.batch_size}",
            f"test      {len(self.test):,} images, centre crops of {config.finetune.crop_share:g}",
            f"recipe    layer decay {config.finetune.layer_decay:g}, drop path {config.finetune.drop_path:g},"
            f" {', '.join(changes)}",
        ]

    def build_loader(self, ledger: Path | None) -> Loader:
        """The loader that the configuration names, with RandAugment around it where there is some."""
        data, ranks, how = self._training_data(), self.ranks, self.config.augmentation
        loader = make_loader(
            data.loader,
            data,
            seed=self.config.seed,
            local_ranks=ranks.local_world,
            ledger=ledger,
            device=self._loading_device(),
        )
        if not how.rand_augment:
            return loader
        return RandAugmentLoader(
            loader,
            how.rand_augment,
            mean=self.origin.network.mean,
            interpolation=data.interpolation,
            seed=self.config.seed,
            workers=workers_of(how.workers, data.threads, ranks.local_world),
        )

    def _training_data(self) -> DataConfig:
        """RandAugment is on the CPU, so images are decoded there."""
        data = self.config.data
        return replace(data, decode="cpu") if self.config.augmentation.rand_augment else data

    def _loading_device(self) -> torch.device:
        return torch.device("cpu") if self.config.augmentation.rand_augment else self.ranks.device

    def evaluation_due(self) -> bool:
        """Whether this step completed so many epochs, or the run."""
        every = self.config.finetune.evaluate_every
        if self.steps_done == self.total_steps:
            return True
        if not every:
            return False
        before, now = (
            step * self.config.train.batch_size // (every * len(self.plan.index))
            for step in (self.steps_done - 1, self.steps_done)
        )
        return now > before

    def evaluate(self, stopped: Callable[[], bool]) -> Metrics:
        """Accuracy on the test set, of the averaged weights too where there are some.

        A test set that fails does not stop training: the last test tells, when all is saved.
        """
        failure: DataError | None = None
        counts = {}
        try:
            counts = self._count(stopped)
        except Stopped:
            self.broken_off = True
        except DataError as error:
            failure = error
        trouble = self.ranks.agree(2 if failure else int(self.broken_off))
        self.broken_off = trouble == 1
        if trouble:
            if trouble == 2:
                self.failure = failure or DataError("Another rank's test images failed", fix="Its message says how")
                if self.ranks.is_main and self.steps_done < self.total_steps:
                    print(f"the test failed, training goes on: {self.failure}", file=sys.stderr, flush=True)
            return {}
        self.failure = None
        self.scores = {name: Score.of(each, self.ranks) for name, each in counts.items()}
        self.scored_at = self.steps_done
        figures: Metrics = {}
        for name, score in self.scores.items():
            figures[f"{name}_top1"] = score.accuracy
            if len(self.labels.classes) >= TOP5_FROM:
                figures[f"{name}_top5"] = score.accuracy_top5
            figures[f"{name}_loss"] = score.loss
        return figures

    def _count(self, stopped: Callable[[], bool]) -> dict[str, Any]:
        config, ranks = self.config, self.ranks
        models = {WEIGHTS: self.model} if self.ema is None else {WEIGHTS: self.model, EMA: self.ema.module}
        plan = CentrePlan(
            self.test,
            batch_size=config.train.batch_size // config.train.accumulate,
            image_size=config.data.image_size,
            patch_size=self.plan.patch_size,
            share=config.finetune.crop_share,
            rank=ranks.rank,
            world=ranks.world,
        )
        return count(
            models,
            self.step.normalise,
            plan,
            config.data,
            self.labels.test_N,
            len(self.labels.classes),
            ranks.device,
            autocast=config.train.precision == "bf16",
            local_ranks=ranks.local_world,
            ledger=Path(config.run.dir) / f"bad_test_samples{'' if ranks.world == 1 else f'.rank{ranks.rank}'}.jsonl",
            stopped=stopped,
        )

    def finish(self) -> dict[str, Any]:
        """Test the run's last weights, unless that is done, and write results.json. Every rank must call this.

        Returns:
            What results.json holds.

        Raises:
            Preempted: a signal broke the test off; all that was trained is saved.
            DataError: the test set failed.
        """
        path = Path(self.config.run.dir) / RESULTS
        if self.broken_off:
            raise Preempted(
                "A signal came during the last test; the run's last checkpoint is written",
                where=str(path.parent),
                fix="The same command with --resume auto tests it and writes results.json",
            )
        identity = self._identity()
        done = self.scored_at != self.steps_done and _same(path, identity)
        if self.ranks.agree(int(not done)) and self.scored_at != self.steps_done and self.failure is None:
            self.evaluate(lambda: False)
        if self.failure is not None:
            raise self.failure
        if self.scored_at == self.steps_done and self.ranks.is_main:
            images = max(score.images for score in self.scores.values())
            content = {
                **identity,
                "settings": config_to_dict(self.config),
                "images": {"train": len(self.plan.index), "test": images},
                "undecoded": {"test": len(self.test) - images},
                **{name: score.figures(self.labels.classes) for name, score in self.scores.items()},
            }
            write_results(path, "finetune", content)
        self.ranks.barrier()
        return read_results(path)

    def _identity(self) -> dict[str, Any]:
        """What tells whose results they are."""
        share = self.config.finetune.label_fraction
        return {
            "backbone": self.origin.to_dict(),
            "step": self.steps_done,
            "data": {
                "train": {**_about(self.plan.index), "of": self.available, "label_fraction": share},
                "test": {**_about(self.test), "crop_share": self.config.finetune.crop_share},
            },
        }


def _about(index: Index) -> dict[str, Any]:
    return {"index": str(index.path), "fingerprint": index.fingerprint(), "images": len(index)}


def _same(path: Path, identity: dict[str, Any]) -> bool:
    """Whether results of this very run, step and test set are there already."""
    try:
        content = read_results(path)
    except DataError:
        return False
    return content.get("verb") == "finetune" and all(content.get(name) == part for name, part in identity.items())


def compiles(config: FinetuneConfig, device: torch.device) -> bool:
    """Whether the network goes through torch.compile."""
    return config.train.compile == "blocks" or (config.train.compile == "auto" and device.type == "cuda")


def training_plan(config: FinetuneConfig, index: Index, patch_size: int, rank: int, world: int) -> SamplePlan:
    """A rank's part of the plan; nothing is masked."""
    return SamplePlan(
        index,
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=config.data,
        mask=MaskConfig(patches=0),
        patch_size=patch_size,
        rank=rank,
        world=world,
    )
