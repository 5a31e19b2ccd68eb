"""What a sample plan's settings must satisfy; ConfigError where they do not."""

from __future__ import annotations

import math

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.samples.random import BLOCKS


def check_ranks(seed: int, batch_size: int, rank: int, world: int, repeat: int) -> None:
    """Seed, global batch, ranks and groups."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError("the seed must be in 0 to 2**64 - 1", where=f"seed is {seed}")
    if batch_size < 1:
        raise ConfigError("a batch needs at least one image", where=f"train.batch_size is {batch_size}")
    if world < 1 or not 0 <= rank < world:
        raise ConfigError("the rank must be in 0 to world - 1", where=f"rank {rank} of {world}")
    if batch_size % world:
        raise ConfigError(
            f"the global batch does not divide by the {world} ranks",
            where=f"train.batch_size is {batch_size}",
            fix=f"take a multiple of {world}, such as {batch_size + world - batch_size % world}",
        )
    if repeat < 1:
        raise ConfigError("a sample comes at least once", where=f"data.repeat is {repeat}")
    if batch_size // world % repeat:
        raise ConfigError(
            f"the {batch_size // world} images of a rank's batch do not divide into groups of {repeat}",
            where=f"train.batch_size is {batch_size}, data.repeat {repeat}",
            fix=f"take a multiple of {world * repeat}",
        )


def check_crops(data: DataConfig, patch_size: int) -> None:
    """Sizes and probabilities of the crops."""
    if patch_size < 1 or data.image_size < 1 or data.image_size % patch_size:
        raise ConfigError(
            f"the crop does not divide into patches of {patch_size} pixels",
            where=f"data.image_size is {data.image_size}",
            fix=f"take a multiple of {patch_size}",
        )
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(
            "two shares of the area are needed, 0 < least <= greatest <= 1", where=f"data.crop_scale is {low} {high}"
        )
    low, high = data.crop_ratio
    if not 0 < low <= high < math.inf:
        raise ConfigError(
            "two aspect ratios are needed, 0 < least <= greatest", where=f"data.crop_ratio is {low} {high}"
        )
    if not 0 <= data.flip <= 1:
        raise ConfigError("a probability is in 0 to 1", where=f"data.flip is {data.flip}")


def check_mask(mask: MaskConfig, side: int) -> None:
    """Number and shape of masked blocks, for a grid of `side` x `side` patches."""
    if not 0 <= mask.patches <= side * side:
        raise ConfigError(
            f"an image has {side} x {side} = {side * side} patches, of which 0 to all can be masked",
            where=f"mask.patches is {mask.patches}",
        )
    if side * side > 4 * BLOCKS:
        raise ConfigError(f"masks go up to 512 x 512 patches, not {side} x {side}", where="data.image_size")
    if mask.min_block < 1:
        raise ConfigError("a masked rectangle has at least 1 patch", where=f"mask.min_block is {mask.min_block}")
    if not 0 < mask.min_aspect <= 1:
        raise ConfigError(
            "the least aspect ratio is above 0 and at most 1", where=f"mask.min_aspect is {mask.min_aspect}"
        )
