"""The pre-trained network at the size of the crops, or the same with fresh weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.network import describe_folder


class Origin(NamedTuple):
    """Where a network came from, for results and checkpoints.

    Attributes:
        words: for people.
        fingerprint: of the network as it was loaded, at its own size.
        step: of a run, how many optimizer steps; None for others.
    """

    words: str
    fingerprint: str
    step: int | None


def load_at(source: BackboneSource, image_size: int, from_scratch: bool = False) -> tuple[Backbone, Origin]:
    """Load the network that `source` names and resample its position tables to another size of images.

    Args:
        source: name, checkpoint, ema and seed are used.
        image_size: side of the images, pixels.
        from_scratch: fresh weights (by source.seed) in place of the trained ones; the shape is the same.

    Raises:
        ConfigError, DataError, EnvironmentProblem: as `load_backbone`; the size does not fit the patches; the network
            can't take another size.
    """
    backbone = _fresh(source) if from_scratch else load_backbone(source)
    origin = Origin(backbone.words, backbone.fingerprint, backbone.step)
    return resized(backbone, image_size), origin


def resized(backbone: Backbone, image_size: int) -> Backbone:
    """The same network for images of another size: tables of positions are resampled as timm does it.

    Absolute tables bicubically, tables of relative positions by timm's interpolation over geometric distances; those
    of the backbone's own size stay as they are.

    Raises:
        ConfigError: the size does not fit the patches, or the network can't take another.
    """
    if image_size % backbone.patch_size:
        raise ConfigError(
            f"Images of {image_size} px can't be cut into patches of {backbone.patch_size} px",
            where="data.image-size",
            fix=f"Take a multiple of {backbone.patch_size}",
        )
    if image_size == backbone.image_size:
        return backbone
    if not hasattr(backbone.model, "set_input_size"):
        raise ConfigError(
            f"{backbone.words} can't take images of another size than {backbone.image_size} px",
            where=f"data.image-size {image_size}",
            fix=f"Set it to {backbone.image_size}, or take another network",
        )
    backbone.model.set_input_size(img_size=(image_size, image_size))
    return Backbone(backbone.model, backbone.words, backbone.step).eval()


def _fresh(source: BackboneSource) -> Backbone:
    """A network of the same shape with fresh weights."""
    path = Path(source.name).expanduser()
    if not path.is_dir():
        return load_backbone(replace(source, untrained=True))
    network = describe_folder(path, source.checkpoint)
    words = f"{network.architecture} of the shape of {path}'s, with fresh weights (seed {source.seed})"
    return Backbone(network.build(source.seed).eval(), words)
