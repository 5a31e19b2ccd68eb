"""The settings of `mvp-fast study`: which students are compared, and how. Light imports."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from mvp_fast.config.check import require
from mvp_fast.errors import ConfigError

SAID_BY_THE_STUDY = frozenset(
    f"--{name}"
    for name in (
        *("config", "seed", "resume", "run.dir", "data.index", "finetune.test", "finetune.label-fraction"),
        *("fit.test", "fit.held-out", "segment.train", "segment.val", "model.name", "segment.model"),
        *("train", "test", "out", "features", "print-config", "overwrite"),
    )
)
TARGETS = ("clip", "supervised", "self", "random", "pixels", "hog", "scratch")


@dataclass(frozen=True)
class ScenesConfig:
    """The sets that are drawn; training set and test set have the same pairs of colour and shape."""

    images: int = 8000
    """Scenes to train on."""
    test: int = 1000
    """Scenes to test on, of pairs that were trained on."""
    held_out: int = 1000
    """Scenes to test on, of pairs that were not."""
    profile: Literal["imagenet", "small", "plain"] = "small"
    """As `mvp-fast data scenes --profile`."""


@dataclass(frozen=True)
class LabelsConfig:
    """Fine-tuning with a part of the labels."""

    fraction: float = 1.0
    """Share of each class's labels, above 0, at most 1."""
    epochs: float = 10.0
    """Times that each of these images is seen; more for a smaller part."""


@dataclass(frozen=True)
class AblationConfig:
    """A student that differs in one thing from the one that learns from CLIP."""

    name: str = ""
    """What differs, in words for the table; also the run's folder, with dashes."""
    options: tuple[str, ...] = ()
    """Of `mvp-fast train`: what makes the difference."""


@dataclass(frozen=True)
class StudyConfig:
    """A whole study: everything is made in its folder, and made once."""

    folder: str = "runs/study"
    """Where sets, runs and results go."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    clip: str = "configs/mini/clip.yaml"
    """Settings of `teacher fit`, for the CLIP that is the teacher."""
    student: str = "configs/mini/student.yaml"
    """Settings of `train`, for all students; what they learn from is said by `targets`."""
    finetune: str = "configs/mini/finetune.yaml"
    """Settings of `finetune`; epochs and share of the labels are said by `labels`."""
    segment: str = "configs/mini/segment.yaml"
    """Settings of `segment`."""
    clip_options: tuple[str, ...] = ()
    """More options of `teacher fit`, over its settings."""
    student_options: tuple[str, ...] = ()
    """More options of `train`."""
    finetune_options: tuple[str, ...] = ()
    """More options of `finetune`."""
    segment_options: tuple[str, ...] = ()
    """More options of `segment`."""
    probe_options: tuple[str, ...] = ()
    """More options of `probe`."""
    targets: tuple[str, ...] = TARGETS
    """What students learn from. clip: the small CLIP. supervised: a network trained on all labels. self: a student
    that was pre-trained on pixels. random: the CLIP's tower with fresh weights. pixels, hog: the patches' own. scratch
    is the control: nothing, fresh weights."""
    supervised_epochs: float = 20.0
    """Times that the teacher of `supervised` sees each image."""
    seeds: int = 3
    """Students of each kind: initial weights, order, crops and masks differ."""
    labels: tuple[LabelsConfig, ...] = ()
    """Parts of the labels to fine-tune with."""
    ablations: tuple[AblationConfig, ...] = ()
    """Students that learn from CLIP and differ in one thing; they are probed."""
    ablation_seeds: int = 1
    """Students of each of these."""
    texts: tuple[str, ...] = ("a red square", "a blue circle", "a yellow star")
    """Looked up among the patches of the first student that learns from CLIP; empty for no pictures."""
    processes: int = 0
    """Steps at a time, each on its share of the cores; 0: one on a GPU, else one a core."""


def ablation_folder(ablation: AblationConfig) -> str:
    """The run's name: the words with dashes."""
    return "-".join("".join(letter if letter.isalnum() or letter in ".-" else " " for letter in ablation.name).split())


def check_study(config: StudyConfig) -> None:
    """Check ranges and combinations.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    for name, value, least in (
        ("scenes.images", config.scenes.images, 100),
        ("scenes.test", config.scenes.test, 10),
        ("scenes.held-out", config.scenes.held_out, 10),
        ("seeds", config.seeds, 1),
        ("ablation-seeds", config.ablation_seeds, 1),
        ("processes", config.processes, 0),
    ):
        require(value >= least, name, value, f"{least} or more")
    _check_options(config)
    unknown = [name for name in config.targets if name not in TARGETS]
    require(not unknown, "targets", unknown, f"some of {', '.join(TARGETS)}")
    require(len(set(config.targets)) == len(config.targets) > 0, "targets", config.targets, "different, at least one")
    if "supervised" in config.targets and "scratch" not in config.targets:
        raise ConfigError(
            "targets has supervised, whose teacher has the shape of scratch's students, which are not there",
            fix="Add scratch, or leave supervised out",
        )
    for part in config.labels:
        require(0 < part.fraction <= 1, "labels.fraction", part.fraction, "above 0, at most 1")
        require(0 < part.epochs < math.inf, "labels.epochs", part.epochs, "above 0")
    require(0 < config.supervised_epochs < math.inf, "supervised-epochs", config.supervised_epochs, "above 0")
    if (config.ablations or config.texts) and "clip" not in config.targets:
        raise ConfigError("ablations and texts are of students that learn from CLIP", fix="Add clip to targets")
    for names, field_name in (
        ([f"{part.fraction:g}" for part in config.labels], "labels"),
        ([ablation_folder(each) for each in config.ablations], "ablations"),
    ):
        require(len(set(names)) == len(names) and all(names), field_name, names, "named, and different")
    taken = [each.name for each in config.ablations if each.name in TARGETS]
    require(not taken, "ablations.name", taken, "other words than a target's")
    require(bool(config.folder.strip()), "folder", repr(config.folder), "the name of a folder")
    for path in (config.clip, config.student, config.finetune, config.segment):
        if not os.path.isfile(path):
            raise ConfigError("There is no such file of settings", where=path, fix="Call it from the checkout's root")


def _check_options(config: StudyConfig) -> None:
    """ConfigError where options say what the study itself says: all its runs would be one."""
    for name, options in (
        ("clip-options", config.clip_options),
        ("student-options", config.student_options),
        ("finetune-options", config.finetune_options),
        ("segment-options", config.segment_options),
        ("probe-options", config.probe_options),
        *((f"ablations, {each.name}", each.options) for each in config.ablations),
    ):
        wrong = [word for word in options if word.partition("=")[0].replace("_", "-") in SAID_BY_THE_STUDY]
        if wrong:
            raise ConfigError(f"{wrong[0]} is among the {name}, but the study decides it itself", fix="Leave it out")
