"""A segmentation run: its parts, built from the settings, and its evaluation on the way; the loop is `train.loop`'s."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mvp_fast.config.segment import SegmentSettings, window_stride
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.backbone import BackboneSource
from mvp_fast.evaluate.progress import progress
from mvp_fast.evaluate.segment.folders import open_sets
from mvp_fast.evaluate.segment.judge import Judge
from mvp_fast.evaluate.segment.loader import MaskLoader
from mvp_fast.evaluate.segment.masks import LabelledSet
from mvp_fast.evaluate.segment.network import Segmenter
from mvp_fast.evaluate.segment.plan import SegmentPlan
from mvp_fast.evaluate.segment.scores import Confusion
from mvp_fast.evaluate.segment.source import Origin, load_at
from mvp_fast.evaluate.segment.step import SegmentStep
from mvp_fast.loaders.base import Loader
from mvp_fast.loaders.registry import describe
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.checkpoint import read_state
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.parts import Parts
from mvp_fast.train.resume import check_plan, check_settings, check_task
from mvp_fast.train.run import Run, build_ema, check_kernels, check_micro_batches, count_steps
from mvp_fast.train.sinks import Metrics

INDEXES = "indexes"
"""Folder of the run for indexes of images that have none."""


@dataclass(kw_only=True)
class SegmentRun(Run):
    """A run that trains UPerNet on a backbone.

    Attributes:
        training, judged: the two sets.
        origin: the backbone, as it was loaded.
    """

    task = "segment"
    part = "segmenter"

    config: SegmentSettings
    plan: SegmentPlan
    model: Segmenter
    step: SegmentStep
    training: LabelledSet
    judged: LabelledSet
    origin: Origin

    def header(self, kernels: str) -> list[str]:
        """What runs, in a few lines."""
        config, ranks, model = self.config, self.ranks, self.model
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        blocks = " ".join(map(str, model.blocks))
        size, grid = config.data.image_size, model.backbone.grid
        return [
            f"backbone  {self.origin.words}",
            f"model     UPerNet on blocks {blocks}, {model.channels} channels, {weights:.1f} M weights,"
            f" {size} px ({grid[0]} x {grid[1]} patches), {config.train.precision},"
            f" on {ranks.world} x {ranks.device_name}",
            f"data      {len(self.training):,} images, {describe(config.data, ranks.device)},"
            f" {config.data.interpolation}, batch {config.train.batch_size}",
            f"judged    {len(self.judged):,} images, {len(self.judged.legend)} classes, windows of {size} px every"
            f" {window_stride(config)}",
        ]

    def whole_plan(self) -> SamplePlan:
        """The plan of the whole global batch, whichever rank this is."""
        return self.plan.part(0, 1)

    def about(self) -> dict[str, Any]:
        """The backbone, and what was trained and judged on."""
        return {"backbone": self.origin._asdict(), "judged": self.judged.index.fingerprint()}

    def state(self) -> dict[str, Any]:
        """Which backbone the run began with, and the classes of its outputs."""
        return {"backbone": self.origin.fingerprint, "classes": list(self.training.legend.names)}

    def build_loader(self, ledger: Path | None) -> Loader:
        """The images by the loader that the configuration names, the masks beside them."""
        return MaskLoader(super().build_loader(ledger), self.training, self.threads)

    @property
    def threads(self) -> int:
        """Threads for masks and for images to judge on."""
        return self.config.data.threads or max(1, len(os.sched_getaffinity(0)) // self.ranks.local_world)

    @property
    def trained(self) -> Segmenter:
        """The model whose figures count: the averaged one, where weights are averaged."""
        averaged: Segmenter = self.model if self.ema is None else self.ema.module
        return averaged

    def evaluation_due(self) -> bool:
        """Every `evaluate_every` steps; the end has an evaluation of its own (see `finish`)."""
        every = self.config.segment.evaluate_every
        return bool(every) and self.steps_done % every == 0 and self.steps_done < self.total_steps

    def judge(self) -> Judge:
        """What judges this run's model."""
        return Judge(self.judged, self.config, self.ranks.device, self.threads)

    def share(self) -> range:
        """The rows of the judged set that this rank judges."""
        return range(self.ranks.rank, len(self.judged), self.ranks.world)

    def evaluate(self, stopped: Callable[[], bool]) -> Metrics:
        """miou, pixel_accuracy and mean_accuracy on the judged set. Every rank must call this."""
        self.agree_on_statistics()
        confusion = Confusion(len(self.judged.legend), self.ranks.device)
        # Plain lines also on a terminal, where the bar of the training stands.
        console = Console(stderr=True, force_terminal=False, quiet=not self.ranks.is_main)
        with progress("evaluating", len(self.share()), console=console) as tell:
            counter = itertools.count(1)
            done = self.judge()(self.trained, self.share(), confusion, stopped, lambda *seen: tell(next(counter)))
        if self.ranks.agree(int(not done)):
            return {}
        confusion.counts_CC = self.ranks.sum(confusion.counts_CC)
        figures = confusion.figures()
        return {
            "miou": figures.miou,
            "pixel_accuracy": figures.pixel_accuracy,
            "mean_accuracy": figures.mean_accuracy,
        }

    def checkpoint_parts(self) -> Parts:
        """The tensors that a checkpoint holds, after the ranks' running statistics are made one."""
        self.agree_on_statistics()
        return super().checkpoint_parts()

    def agree_on_statistics(self) -> None:
        """Give all ranks the mean of their batch norms' running statistics. Every rank must call this.

        The statistics are linear in those of the batches, so when and how often this happens does not matter.
        """
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for module in (module for model in models for module in model.modules()):
            if self.ranks.world > 1 and isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        statistic.copy_(self.ranks.mean(statistic))


def build_segment_run(config: SegmentSettings, ranks: Ranks, checkpoint: Path | None) -> SegmentRun:
    """Build every part, at step 0 or at `checkpoint`.

    Raises:
        ConfigError: the settings name something that does not exist or does not fit together.
        DataError: images, masks, the backbone or the checkpoint are missing or do not fit.
        EnvironmentProblem: weights can't be downloaded, or kernels were asked for that can't run here.
    """
    check_kernels(config, ranks.device)
    segment, data = config.segment, config.data
    state = read_state(checkpoint) if checkpoint else None
    if state is not None and checkpoint is not None:
        check_task(state, SegmentRun.task, checkpoint)
    store = Path(config.run.dir) / INDEXES
    training, judged = open_sets(segment, store, ranks.is_main, checkpoint is None, ranks.barrier)
    source = BackboneSource(segment.model, segment.checkpoint, segment.ema, seed=config.seed)
    backbone, origin = load_at(source, data.image_size, segment.from_scratch)
    plan = SegmentPlan(
        training.index,
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=data,
        scale=segment.scale,
        shorter_side=segment.shorter_side,
        patch_size=backbone.patch_size,
        rank=ranks.rank,
        world=ranks.world,
    )
    check_micro_batches(config, plan)
    synchronised = ranks.device.type == "cuda" and ranks.world > 1
    _check_batch_norm(config, plan, synchronised)
    changed: list[str] = []
    if state is not None and checkpoint is not None:
        check_plan(state, plan, checkpoint)
        _check_backbone(state, origin, training, checkpoint)
        changed = check_settings(state, config, checkpoint)
    model: Any = Segmenter(
        backbone,
        len(training.legend),
        blocks=segment.blocks,
        channels=segment.decoder_channels,
        auxiliary=segment.auxiliary > 0,
        drop_path=segment.drop_path,
        seed=config.seed,
    )
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.train.recompute:
        model.backbone.model.set_grad_checkpointing(True)
    model.to(ranks.device).train()
    ema = build_ema(model, config)
    optimizer = build_optimizer(model, config.optim, layer_decay=segment.layer_decay)
    run = SegmentRun(
        config=config,
        ranks=ranks,
        plan=plan,
        model=model,
        ema=ema,
        optimizer=optimizer,
        step=SegmentStep(model, ranks.wrap(model), optimizer, config, ranks.device),
        total_steps=count_steps(config, training.index),
        changed=changed,
        training=training,
        judged=judged,
        origin=origin,
    )
    if checkpoint is not None and state is not None:
        run.load(checkpoint, state)
    return run


def _check_batch_norm(config: SegmentSettings, plan: SegmentPlan, synchronised: bool) -> None:
    """The pyramid pooling's coarsest map is one pixel an image: of one image alone it has no variance."""
    size = plan.local_batch_size // config.train.accumulate
    if size < 2 and not synchronised:
        raise ConfigError(
            "Batch norm needs 2 images or more in each micro-batch of a rank, and there is 1",
            where=f"train.batch-size {config.train.batch_size}, train.accumulate {config.train.accumulate},"
            f" {plan.world} ranks",
            fix="Raise the first or lower the second",
        )


def _check_backbone(state: dict[str, Any], origin: Origin, training: LabelledSet, checkpoint: Path) -> None:
    """A run goes on only with the network that it began with, and the same classes."""
    if state["backbone"] != origin.fingerprint:
        raise DataError(
            f"The run began with another network than {origin.words}: its fingerprint is {state['backbone'][:12]},"
            f" this one's {origin.fingerprint[:12]}",
            where=str(checkpoint),
            fix="Give the segment.model, segment.checkpoint, segment.ema and segment.from-scratch that it began with,"
            " or another --run.dir",
        )
    if state["classes"] != list(training.legend.names):
        raise DataError(
            "The run began with other classes",
            where=str(checkpoint),
            fix="Give the classes that it began with, or another --run.dir",
        )
