"""What must fit when a run goes on from a checkpoint, and what is told where it may differ.

The samples, the teacher, the objective and the optimizer stay what they were; a learning rate, a precision or a length
may be changed on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.samples.plan import SamplePlan

# Settings of the run's surroundings, which change nothing in what is trained.
_FREE = (
    *("run.", "resume", "data.index", "data.threads", "data.prefetch", "kernels.", "train.device"),
    *("teacher.kind", "teacher.name", "teacher.pretrained", "teacher.seed"),  # its fingerprint tells
    *("teacher.graph", "teacher.ahead", "train.compile", "train.recompute", "train.step_graph"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.nonfinite_budget"),
    *("train.sharding", "augmentation.workers", "finetune.test", "finetune.evaluate_every"),
    *("segment.model", "segment.checkpoint", "segment.ema"),  # the backbone's fingerprint tells
    *("segment.train", "segment.val", "segment.train_masks", "segment.val_masks", "segment.classes"),
    *("segment.evaluate_every", "segment.window_batch", "segment.predictions"),
    "fit.",  # what is measured; the captions' fingerprint tells
)
_KEPT = ("objective.", "optim.name", "model.", "segment.auxiliary", "segment.blocks")
# What plans were before they could be otherwise; see SamplePlan.state.
_PLAN_BEFORE: dict[str, Any] = {"repeat": 1, "order": "shuffled"}
_FIX = "Give the settings in the run's config.yaml, or start anew in another --run.dir"


def check_task(state: dict[str, Any], task: str, checkpoint: Path) -> None:
    """A run goes on only with what it does.

    Raises:
        ConfigError: the checkpoint is of a run that does something else.
    """
    before = state.get("task", "pretrain")  # what all did that did not say
    if before != task:
        raise ConfigError(
            f"The checkpoint is of a run that does something else: {before}, not {task}",
            where=str(checkpoint),
            fix="Give the verb that the run began with, or another --run.dir",
        )


def check_plan(state: dict[str, Any], plan: SamplePlan, checkpoint: Path) -> None:
    """A run goes on only with the same samples, boxes and masks.

    Raises:
        ConfigError: a setting of the plan differs.
        DataError: the data set does.
    """
    before, now = ({**_PLAN_BEFORE, **state} for state in (state["plan"], plan.state()))
    differs = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differs == ["index"]:
        raise DataError(
            "The checkpoint was trained on another data set: the index's fingerprint differs",
            where=f"{plan.index.path} and {checkpoint}",
            fix="Give the index that the run began with, or start anew in another --run.dir",
        )
    if differs:
        told = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in differs)
        raise ConfigError(
            f"The run can't go on with other samples, boxes or masks than it began with: {told}",
            where=str(checkpoint),
            fix=_FIX,
        )


def check_teacher(state: dict[str, Any], teacher: Teacher, checkpoint: Path) -> None:
    """A run goes on only against the same teacher.

    Raises:
        DataError: its fingerprint differs.
    """
    if state["teacher"] != teacher.fingerprint:
        raise DataError(
            f"The checkpoint was trained against another teacher than {teacher.words}: its fingerprint is"
            f" {state['teacher'][:12]}, this one's {teacher.fingerprint[:12]}",
            where=str(checkpoint),
            fix="Give the teacher.* settings in the config.yaml of that run, or start anew in another --run.dir",
        )


def check_settings(state: dict[str, Any], config: RunSettings, checkpoint: Path) -> list[str]:
    """A run goes on only with the same objective, the same kind of optimizer and the network that it began with.

    Returns:
        The other settings that are no longer those of the checkpoint, in words.

    Raises:
        ConfigError: the objective, the optimizer or the network differs.
    """
    # A setting that came after the checkpoint had its default.
    before, now = {**_flat(config_to_dict(type(config)())), **_flat(state["config"])}, _flat(config_to_dict(config))
    changed = [name for name in now if before.get(name) != now[name] and not name.startswith(_FREE)]
    told = {name: f"{name} was {before.get(name)}, is {now[name]}" for name in changed}
    if kept := [told[name] for name in changed if name.startswith(_KEPT)]:
        raise ConfigError(
            f"The run can't go on with another objective, optimizer or network than it began with: {'; '.join(kept)}",
            where=str(checkpoint),
            fix=_FIX,
        )
    return list(told.values())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
