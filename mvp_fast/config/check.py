"""What a configuration must satisfy beyond its types; everything that can be said before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

from mvp_fast.config.schema import Config, RunSettings
from mvp_fast.errors import ConfigError


def check_config(config: Config) -> None:
    """Check the ranges and combinations of a pre-training run.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    check_run(config)
    student, mask = config.student, config.mask
    require(mask.min_block >= 1, "mask.min-block", mask.min_block, "1 or more")
    require(mask.patches >= 0, "mask.patches", mask.patches, "0 or more")
    require(0 < mask.min_aspect <= 1, "mask.min-aspect", mask.min_aspect, "above 0, at most 1")
    require(0 <= student.drop_path < 1, "student.drop-path", student.drop_path, "at least 0 and below 1")
    for name, count in (("width", student.width), ("depth", student.depth), ("heads", student.heads)):
        require(count is None or count >= 1, f"student.{name}", count, "1 or more")
    nothing_masked = config.objective.tokens == "masked" and mask.patches == 0
    if nothing_masked and not config.objective.cls:
        raise ConfigError(
            "There is no token in the loss: objective.tokens is masked, mask.patches is 0 and objective.cls is False",
            fix="Set mask.patches above 0, objective.tokens to all, or objective.cls to True",
        )


def check_run(config: RunSettings) -> None:
    """Check what all training runs have in common, whatever their task.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    data, train, optim = config.data, config.train, config.optim
    for name, value in (
        ("train.batch-size", train.batch_size),
        ("train.accumulate", train.accumulate),
        ("train.log-every", train.log_every),
        ("optim.reference-batch-size", optim.reference_batch_size),
        ("data.prefetch", data.prefetch),
        ("data.shuffle-window", data.shuffle_window),
        ("data.repeat", data.repeat),
        ("data.image-size", data.image_size),
        ("data.bad-sample-probation", data.bad_sample_probation),
    ):
        require(value >= 1, name, value, "1 or more")
    for name, value in (
        ("train.steps", train.steps),
        ("train.checkpoint-every", train.checkpoint_every),
        ("train.keep-checkpoints", train.keep_checkpoints),
        ("train.nonfinite-budget", train.nonfinite_budget),
        ("data.threads", data.threads),
        ("seed", config.seed),
    ):
        require(value >= 0, name, value, "0 or more")
    for name, rate in (
        ("optim.lr", optim.lr),
        ("optim.min-lr", optim.min_lr),
        ("optim.weight-decay", optim.weight_decay),
        ("optim.clip-grad", optim.clip_grad),
        ("train.epochs", train.epochs),
    ):
        require(math.isfinite(rate) and rate >= 0, name, rate, "a finite number, 0 or more")
    for name, share in (
        ("data.flip", data.flip),
        ("data.bad-sample-budget", data.bad_sample_budget),
        ("data.hw-decoder-load", data.hw_decoder_load),
        ("optim.warmup-fraction", optim.warmup_fraction),
    ):
        require(0 <= share <= 1, name, share, "between 0 and 1")
    for name, share in (
        ("train.ema-decay", train.ema_decay),
        ("optim.betas", max(optim.betas)),
        ("optim.betas", min(optim.betas)),
    ):
        require(0 <= share < 1, name, share, "at least 0 and below 1")
    low, high = data.crop_scale
    require(0 < low <= high <= 1, "data.crop-scale", data.crop_scale, "two shares, 0 < least <= greatest <= 1")
    low, high = data.crop_ratio
    require(0 < low <= high, "data.crop-ratio", data.crop_ratio, "two ratios, 0 < least <= greatest")
    require(train.steps > 0 or train.epochs > 0, "train.steps", 0, "above 0 where train.epochs is 0")
    if data.decode == "gpu" and data.loader not in ("auto", "dali"):
        raise ConfigError(
            f"data.decode is gpu, but data.loader {data.loader} does not decode on the GPU",
            fix="Set data.loader to dali, or data.decode to auto",
        )
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"train.batch-size {train.batch_size} can't be split into {train.accumulate} equal micro-batches",
            fix="Choose train.accumulate so that it divides train.batch-size",
        )
    check_interpolation(data.loader, data.interpolation)


def check_other_task(config: RunSettings) -> None:
    """`check_run` of a task other than pre-training, and that nothing is asked for which only pre-training has.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    check_run(config)
    if config.train.sharding != "none":
        raise ConfigError(
            "Only pre-training can spread a network over the ranks",
            where=f"train.sharding {config.train.sharding}",
            fix="Leave train.sharding at none; train.recompute and train.accumulate save memory",
        )
    if config.train.step_graph:
        raise ConfigError(
            "Only pre-training can take its step as one CUDA graph",
            where="train.step-graph True",
            fix="Leave train.step-graph at False",
        )


def check_interpolation(loader: str, interpolation: str) -> None:
    """ConfigError where a loader does not have the resize filter: it is never replaced by another in silence."""
    if loader == "ffcv" and interpolation != "area":
        raise ConfigError(
            "The loader `ffcv` resizes with OpenCV's area filter alone",
            where=f"data.interpolation is {interpolation}",
            fix="Say so with --data.interpolation area, or take another loader",
        )
    if interpolation == "area" and loader not in ("ffcv", "synthetic"):
        raise ConfigError(
            f"The loader `{loader}` has no area filter",
            where="data.interpolation is area",
            fix="Take bicubic or bilinear, or the loader ffcv",
        )


def require(holds: bool, name: str, value: Any, must_be: str) -> None:
    """ConfigError with the setting's name, its value and what it must be, unless that holds."""
    if not holds:
        raise ConfigError(f"{name} is {value}, but must be {must_be}")
