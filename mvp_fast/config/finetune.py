"""Every setting of a fine-tuning run (`mvp-fast finetune --help` shows them); what is not here is as in `schema`.

The defaults are BEiT v2's recipe for ViT-B/16 on ImageNet-1k (arXiv 2208.06366); configs/finetune_*.yaml say what
differs. This module imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mvp_fast.config.check import check_other_task
from mvp_fast.config.schema import DataConfig, KernelsConfig, OptimConfig, RunConfig, TrainConfig
from mvp_fast.errors import ConfigError

RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|inc[01]|mmax\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
"""The sections that timm's rand_augment_transform knows; others it passes over in silence or stops at."""


@dataclass(frozen=True)
class ModelConfig:
    """The network that fine-tuning begins from."""

    name: str = ""
    """A run of `mvp-fast train` or `finetune`, a timm model's name, or a folder that `mvp-fast export` wrote. On the
    command line it may come first, without its name: mvp-fast finetune MODEL ..."""
    checkpoint: str = "latest"
    """Of a run: latest, a step number, or a checkpoint's path."""
    ema: bool = False
    """Of a run: its averaged weights."""
    untrained: bool = False
    """Take its shape alone, with fresh weights from `seed`: training from scratch, as a control."""
    resize: bool = False
    """Where data.image_size is not what the network was trained on: interpolate its position tables."""


@dataclass(frozen=True)
class AugmentationConfig:
    """What is done to the crops and their labels: timm's parts, every draw from seed, epoch and position."""

    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment (arXiv 1909.13719) in timm's notation; empty for none. Images are then decoded on the CPU."""
    workers: int = 0
    """Processes a rank for RandAugment; 0 takes as many as there are data.threads."""
    mixup: float = 0.8
    """Alpha of mixup (arXiv 1710.09412); 0 for none. Neighbours in the batch are mixed."""
    cutmix: float = 1.0
    """Alpha of CutMix (arXiv 1905.04899); 0 for none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    random_erasing: float = 0.25
    """Probability that a box of an image is erased (arXiv 1708.04896); 0 for none."""
    random_erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What comes in its place: noise, one random colour, or the mean colour."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""


@dataclass(frozen=True)
class FinetuningConfig:
    """The rest of the recipe, and how the result is tested."""

    test: str = ""
    """The index of the test set; its classes have the names of the training set's."""
    label_fraction: float = 1.0
    """Share of each class's training images that is used, drawn from `seed`, one at least."""
    layer_decay: float = 0.65
    """Factor of the learning rate from each block to the one before it; 1 for none."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    head_init_scale: float = 0.001
    """Factor of the new head's initial weights (normal, 0.02)."""
    evaluate_every: float = 1.0
    """Epochs between tests; 0 for one at the end alone."""
    crop_share: float = 0.875
    """Side of the centre crop in tests, as a share of the image's shorter side (224 of 256)."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole fine-tuning run."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/finetune"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(crop_scale=(0.08, 1.0)))
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    finetune: FinetuningConfig = field(default_factory=FinetuningConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=5e-4,
            reference_batch_size=1024,
            min_lr=1e-6,
            warmup_fraction=20 / 100,
            betas=(0.9, 0.999),
            clip_grad=0.0,
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=100.0, batch_size=1024))
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    seed: int = 0
    """Decides order, crops, augmentation, drop path, the part of the labels, and initial weights."""
    resume: str = "none"
    """none starts anew (and refuses a folder that holds a run), auto goes on from the newest checkpoint of run.dir if
    there is one, or the path of a checkpoint."""


def check_finetune(config: FinetuneConfig) -> None:
    """Check the ranges and combinations of a fine-tuning run.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    check_other_task(config)
    augmentation = config.augmentation
    how = "augmentation."
    for name, least, greatest in (
        (how + "workers", 0, math.inf),
        (how + "mixup", 0, math.inf),
        (how + "cutmix", 0, math.inf),
        (how + "mixup-prob", 0, 1),
        (how + "switch-prob", 0, 1),
        (how + "random-erasing", 0, 1),
        (how + "label-smoothing", 0, 0.999),
        ("finetune.label-fraction", 1e-9, 1),
        ("finetune.layer-decay", 1e-3, 1),
        ("finetune.drop-path", 0, 0.999),
        ("finetune.head-init-scale", 0, math.inf),
        ("finetune.evaluate-every", 0, math.inf),
        ("finetune.crop-share", 1e-3, 1),
    ):
        section, _, field_name = name.partition(".")
        value = getattr(getattr(config, section), field_name.replace("-", "_"))
        if not least <= value <= greatest or math.isinf(value):
            most = "" if math.isinf(greatest) else f" and at most {greatest:g}"
            raise ConfigError(f"{name} is {value}, but must be a number of at least {least:g}{most}")
    if augmentation.rand_augment and not RAND_AUGMENT.fullmatch(augmentation.rand_augment):
        raise ConfigError(
            f"timm knows no RandAugment {augmentation.rand_augment!r}",
            where="augmentation.rand-augment",
            fix="Write it as rand-m9-mstd0.5-inc1: m magnitude, n operations an image, p probability of each, mstd"
            " spread of the magnitude, mmax its bound, inc1 where all get stronger with it; or leave it empty for none",
        )
    if augmentation.rand_augment and config.data.decode == "gpu":
        raise ConfigError(
            "RandAugment works on images on the CPU, but data.decode is gpu",
            fix="Set data.decode to auto, or augmentation.rand-augment to '' for none",
        )
    _check_given(config)


def _check_given(config: FinetuneConfig) -> None:
    """ConfigError where the network or a set is not named."""
    for name, value, fix in (
        ("model.name", config.model.name, "Give a run's folder or a timm model's name: mvp-fast finetune MODEL ..."),
        ("data.index", config.data.index, "Write an index with `mvp-fast data index DIR` and give --data.index DIR"),
        ("finetune.test", config.finetune.test, "Give the index of the test set: --finetune.test DIR"),
    ):
        if not value:
            raise ConfigError(f"There is nothing in {name}", fix=fix)
