"""A run that trains a CLIP on images and their captions, and the folder that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvp_fast.config.fit import TeacherFitConfig
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.loaders.registry import describe
from mvp_fast.models.teachers.clip_settings import IN_RUN
from mvp_fast.models.teachers.new_clip import clip_settings, new_clip, write_clip
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.checkpoint import find_checkpoint, read_state
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.fit.captions import Captions, captions_file, read_captions
from mvp_fast.train.fit.measure import Figures, TestSet, measure, prompt_tokens
from mvp_fast.train.fit.scene_truth import check_held_out, read_truth, scenes_table
from mvp_fast.train.fit.step import FitStep
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.parts import read_part
from mvp_fast.train.resume import check_plan, check_settings, check_task
from mvp_fast.train.run import Run, build_ema, check_kernels, check_micro_batches, count_steps, open_index
from mvp_fast.train.sinks import Metrics


@dataclass(kw_only=True)
class FitRun(Run):
    """A run that trains `model`, an open_clip.CLIP.

    Attributes:
        settings: open_clip's, of the model.
        captions: of the training set.
        tests: what is measured on.
        figures: what was measured last, and at which step; empty before that.
    """

    task = "teacher fit"
    part = "clip"

    config: TeacherFitConfig
    settings: dict[str, Any]
    captions: Captions
    tests: list[TestSet]
    figures: Figures = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """The model's settings."""
        return {"model": self.settings}

    def state(self) -> dict[str, Any]:
        """What the model and the captions were, and what was measured on them last."""
        return {
            "model": self.settings,
            "captions": self.captions.fingerprint(),
            "figures": self.figures,
            "chances": {name: chance for test in self.tests for name, chance in test.chances().items()},
            "tests": {test.name: {"index": test.index.fingerprint(), "images": len(test.index)} for test in self.tests},
        }

    def whole_plan(self) -> SamplePlan:
        """The plan of the whole global batch, whichever rank this is."""
        return _plan(self.config, self.plan.index, self.plan.patch_size, 0, 1)

    def header(self, kernels: str) -> list[str]:
        """What runs, in a few lines."""
        config, ranks, vision, text = self.config, self.ranks, self.settings["vision_cfg"], self.settings["text_cfg"]
        weights = sum(p.numel() for p in self.model.parameters()) / 1e6
        count = len(self.plan.index)
        several = f" of {len(self.captions.texts):,}" if len(self.captions.texts) > count else ""
        lines = [
            f"clip      {config.model.name}, {weights:.1f} M weights, {self.settings['embed_dim']} channels,"
            f" {config.train.precision}, on {ranks.world} x {ranks.device_name}",
            f"images    {vision['layers']} blocks of width {vision['width']}, {vision['image_size']} px in patches of"
            f" {vision['patch_size']}",
            f"texts     {text['layers']} blocks of width {text['width']}, {text['context_length']} tokens",
            f"data      {count:,} images, one caption each{several}, {describe(config.data, ranks.device)},"
            f" {config.data.interpolation}, batch {config.train.batch_size}",
        ]
        return lines + [f"measured  on {len(test.index):,} images, {test.name}" for test in self.tests]

    def evaluation_due(self) -> bool:
        """Every fit.evaluate_every steps, and at the end."""
        every, last = self.config.fit.evaluate_every, self.steps_done == self.total_steps
        return bool(self.tests) and (last or (every > 0 and self.steps_done % every == 0))

    def evaluate(self, stopped: Callable[[], bool]) -> Metrics:
        """Zero-shot accuracy and recall of the weights that would be written now."""
        last = self.steps_done == self.total_steps  # what the run is for: not broken off
        clip = self.model if self.ema is None else self.ema.module
        figures = measure(clip, self.tests, self.config, self.ranks, (lambda: False) if last else stopped)
        if figures:
            self.figures = {"step": self.steps_done, **figures}
        return {**figures}

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint whose `state` was found to fit."""
        super().load(checkpoint, state)
        self.figures = dict(state["figures"])


def build_fit(config: TeacherFitConfig, ranks: Ranks, checkpoint: Path | None) -> FitRun:
    """Build every part, at step 0 or at `checkpoint`.

    Raises:
        ConfigError: the configuration names something that does not exist or does not fit together.
        DataError: the index, its files, the captions or the checkpoint are missing or do not fit.
    """
    check_kernels(config, ranks.device)
    state = read_state(checkpoint) if checkpoint else None
    settings = clip_settings(config.model, config.data.image_size)
    index = open_index(config)
    plan = _plan(config, index, settings["vision_cfg"]["patch_size"], ranks.rank, ranks.world)
    check_micro_batches(config, plan)
    changed: list[str] = []
    if state is not None and checkpoint is not None:
        check_task(state, FitRun.task, checkpoint)
        check_plan(state, plan, checkpoint)
        _check_model(state, settings, checkpoint)
        changed = check_settings(state, config, checkpoint)
    length = settings["text_cfg"]["context_length"]
    table = captions_file(index, config.fit.captions, "fit.captions")
    captions = read_captions(index, table, length, config.fit.brief)
    if state is not None and state["captions"] != captions.fingerprint():
        raise DataError(
            "The checkpoint was trained with other captions",
            where=str(checkpoint),
            fix="Give the captions that the run began with, or start anew in another --run.dir",
        )
    tests = open_tests(config, index, length)
    clip = new_clip(settings, config.seed)
    _set_up(clip, config, ranks.device)
    ema = build_ema(clip, config)
    for model in (clip,) if ema is None else (clip, ema.module):
        model.to(ranks.device)
    optimizer = build_optimizer(clip, config.optim)
    run = FitRun(
        config=config,
        ranks=ranks,
        plan=plan,
        model=clip,
        ema=ema,
        optimizer=optimizer,
        step=FitStep(clip, ranks.wrap(clip), captions, optimizer, config, ranks),
        total_steps=count_steps(config, index),
        changed=changed,
        settings=settings,
        captions=captions,
        tests=tests,
    )
    if checkpoint is not None and state is not None:
        run.load(checkpoint, state)
    return run


def open_tests(config: TeacherFitConfig, train: Index, length: int) -> list[TestSet]:
    """The sets that are measured on: `test` and `held_out`, as far as they are given."""
    fit, tests = config.fit, []
    for name, given, captions in (("test", fit.test, fit.test_captions), ("held_out", fit.held_out, "")):
        if not given:
            continue
        index = Index.open(given)
        index.check_files()
        scenes = scenes_table(index)
        if name == "held_out":
            if scenes is None:
                raise DataError("The set held out is no set of scenes", where=f"fit.held-out {given}")
            check_held_out(scenes_table(train), scenes)
        found = read_captions(index, captions_file(index, captions, "fit.test-captions"), length)
        if scenes is not None:
            prompt_tokens(length)  # too long for the model? Better now than when it is trained
        tests.append(TestSet(name, index, found, None if scenes is None else read_truth(index, scenes)))
    return tests


def write_model(run: Path) -> Path:
    """Write the model of a run's newest checkpoint, its averaged weights where it has some, into RUN/model.

    Returns:
        the folder.

    Raises:
        DataError: there is no checkpoint.
        EnvironmentProblem: the folder can't be written.
    """
    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    check_task(state, FitRun.task, checkpoint)
    tensors = read_part(checkpoint, "ema" if (checkpoint / "ema").is_dir() else FitRun.part)
    write_clip(run / IN_RUN, state["model"], tensors)
    return run / IN_RUN


def _plan(config: TeacherFitConfig, index: Index, patch_size: int, rank: int, world: int) -> SamplePlan:
    data: DataConfig = config.data
    return SamplePlan(
        index,
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=data,
        mask=MaskConfig(patches=0),
        patch_size=patch_size,
        rank=rank,
        world=world,
    )


def _set_up(clip: Any, config: TeacherFitConfig, device: torch.device) -> None:
    """Put into effect how the model runs on a device; the names of its weights stay."""
    if config.train.recompute:
        clip.set_grad_checkpointing(True)
    if config.train.compile == "blocks" or (config.train.compile == "auto" and device.type == "cuda"):
        for tower in (clip.visual.transformer, clip.transformer):
            for block in tower.resblocks:
                block.compile(fullgraph=True)


def _check_model(state: dict[str, Any], settings: dict[str, Any], checkpoint: Path) -> None:
    """ConfigError where the checkpoint is of a model with other settings; not all of them show in its weights."""
    before, now = (json.loads(json.dumps(each)) for each in (state["model"], settings))
    if before != now:
        raise ConfigError(
            "The checkpoint is of another model",
            where=str(checkpoint),
            fix="Give the model.* settings in the run's config.yaml, or start anew in another --run.dir",
        )
