"""Every setting of `mvp-fast segment`, a docstring a field, and what they must satisfy. No heavy imports.

The values here are BEiT v2's recipe for ViT-B/16 on ADE20K (arXiv 2208.06366); configs/segment_*.yaml say what differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mvp_fast.config.check import check_other_task, require
from mvp_fast.config.schema import DataConfig, KernelsConfig, OptimConfig, RunConfig, TrainConfig
from mvp_fast.errors import ConfigError


@dataclass(frozen=True)
class SegmentConfig:
    """What is segmented, with which network, and how it is judged."""

    model: str = ""
    """The pre-trained network: a run's folder, a timm model's name, or a folder that `export --format timm` wrote. The
    command's first word means the same."""
    checkpoint: str = "latest"
    """Of a run: `latest`, a step number, or a checkpoint's path."""
    ema: bool = False
    """Of a run: take its averaged weights."""
    from_scratch: bool = False
    """A control: the same network with fresh weights (decided by `seed`). The option --from-scratch means the same."""
    train: str = ""
    """Images to train on: ADE20K's folder (images/training and annotations/training in it), a folder with images/ and
    masks/, a folder with masks/ beside the images (as `data scenes` writes), or the index of one."""
    val: str = ""
    """Images to judge on, as `train`; empty: the validation part of the same ADE20K folder."""
    train_masks: str = ""
    """Folder of the masks of `train`, where it is another than those above: PNG files with the images' names."""
    val_masks: str = ""
    """Folder of the masks of `val`, likewise."""
    classes: str = ""
    """A text file with a class's name a line, in the order of the mask values. Without it: the mask_legend of a
    scenes.json, or ADE20K's objectInfo150.txt, beside the images."""
    num_classes: int = 0
    """How many classes there are, where nothing names them; 0: as many as are named."""
    reduce_zero_label: Literal["auto", "yes", "no"] = "auto"
    """yes: mask value 0 is ignored and value 1 is the first class. auto: yes for ADE20K's layout."""
    ignore: tuple[int, ...] = (255,)
    """Mask values that neither train nor count."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Least and greatest factor by which an image is scaled before a crop of data.image_size is cut from it."""
    shorter_side: int = 0
    """Length that the shorter side of each image is scaled to first, in training and when judged, pixels; 0: each image
    at its own size. In either case an image smaller than a crop is scaled up to it."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue of each image, each with a chance of one half."""
    blocks: tuple[int, ...] = ()
    """The four blocks whose output is used, from 0; empty: at 1/3, 1/2, 2/3 and the end of the depth (3 5 7 11 of 12,
    7 11 15 23 of 24)."""
    decoder_channels: int = 0
    """Channels of the decoder; 0: the backbone's width."""
    auxiliary: float = 0.4
    """Weight of the loss of a small convolutional head on the third of the blocks; 0: without it."""
    dropout: float = 0.1
    """Share of the channels dropped before the last layer of each head."""
    drop_path: float = 0.15
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    layer_decay: float = 0.75
    """Each block learns this share as fast as the next one; the decoder learns at the full rate."""
    stride: int = 0
    """Step of the sliding window, pixels; 0: two thirds of data.image_size, rounded down (341 of 512)."""
    window_batch: int = 8
    """Windows of an image that go through the network at once."""
    evaluate_every: int = 16_000
    """Steps between evaluations on the whole of `val`; 0: only at the end. The end always has one."""
    predictions: int = 8
    """Images of `val` of which image, truth and prediction are written to RUN/predictions/."""


@dataclass(frozen=True)
class SegmentSettings:
    """A whole segmentation run."""

    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/segment"))
    data: DataConfig = field(default_factory=lambda: DataConfig(image_size=512))
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=5e-5,
            reference_batch_size=16,
            schedule="poly",
            min_lr=0.0,
            warmup_fraction=1500 / 160_000,
            betas=(0.9, 0.999),
            clip_grad=0.0,
        )
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=160_000, batch_size=16, log_every=50, checkpoint_every=4000)
    )
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    seed: int = 0
    """Decides order, crops, colours, drop path, dropout and initial weights."""
    resume: str = "none"
    """none starts anew (and refuses a folder that holds a run), auto goes on from the newest checkpoint of run.dir if
    there is one, or the path of a checkpoint."""


def window_stride(settings: SegmentSettings) -> int:
    """The step of the sliding window, pixels."""
    return settings.segment.stride or max(1, settings.data.image_size * 2 // 3)


def check_segment(settings: SegmentSettings) -> None:
    """Check ranges and combinations; everything that can be said before anything is loaded.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    check_other_task(settings)
    segment, data, train = settings.segment, settings.data, settings.train
    if not segment.model:
        raise ConfigError(
            "There is no network: segment.model is empty",
            fix="Give a pre-training run, an export or a timm model's name: mvp-fast segment MODEL ...",
        )
    if data.index:
        raise ConfigError(
            f"data.index is {data.index}, but segmentation has two sets of images",
            fix="Give --segment.train and --segment.val, each a folder of images or its index",
        )
    if not segment.train:
        raise ConfigError("There are no images: segment.train is empty", fix="Give --segment.train DIR")
    for name, count in (
        ("segment.num-classes", segment.num_classes),
        ("segment.shorter-side", segment.shorter_side),
        ("segment.decoder-channels", segment.decoder_channels),
        ("segment.stride", segment.stride),
        ("segment.evaluate-every", segment.evaluate_every),
        ("segment.predictions", segment.predictions),
    ):
        require(count >= 0, name, count, "0 or more")
    require(segment.window_batch >= 1, "segment.window-batch", segment.window_batch, "1 or more")
    require(segment.stride <= data.image_size, "segment.stride", segment.stride, "at most data.image-size")
    require(segment.num_classes != 1, "segment.num-classes", 1, "2 or more")
    require(segment.auxiliary >= 0, "segment.auxiliary", segment.auxiliary, "0 or more")
    for name, share in (("segment.dropout", segment.dropout), ("segment.drop-path", segment.drop_path)):
        require(0 <= share < 1, name, share, "at least 0 and below 1")
    require(0 < segment.layer_decay <= 1, "segment.layer-decay", segment.layer_decay, "above 0, at most 1")
    low, high = segment.scale
    require(0 < low <= high < math.inf, "segment.scale", segment.scale, "two factors, 0 < least <= greatest")
    require(len(segment.blocks) in (0, 4), "segment.blocks", segment.blocks, "four numbers, or none")
    require(list(segment.blocks) == sorted(segment.blocks), "segment.blocks", segment.blocks, "in ascending order")
    require(min(segment.blocks, default=0) >= 0, "segment.blocks", segment.blocks, "0 or more")
    wrong = [value for value in segment.ignore if not 0 <= value < 1 << 16]
    require(not wrong, "segment.ignore", segment.ignore, "values from 0 to 65535")
    if train.compile == "blocks":
        raise ConfigError("train.compile blocks is for pre-training alone", fix="Set train.compile to auto or off")
