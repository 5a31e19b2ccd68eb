"""What a scene is, as data: the `Profile` that scenes of a set share, and the `SceneSpec` that decides one image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mvp_fast.errors import ConfigError
from mvp_fast.samples.scenes.shapes import signed_distance
from mvp_fast.samples.scenes.vocabulary import COLOURS, GROUNDS, SHAPES, TEXTURES, Pair, all_pairs

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Profile:
    """What the scenes of a set have in common.

    Attributes:
        number: goes into the seed of every image.
        sizes: (width, height, weight) in pixels; the weights sum to 1.
        objects: probability of 1, 2, ... objects.
        grain: least and greatest standard deviation of the sensor noise, 8-bit levels.
        relief: contrast of the ground's texture, and of the mottling of objects, against full contrast.
        quality: least and greatest JPEG quality.
        full_chroma: share of files with 4:4:4 chroma; the others have 4:2:0.
        progressive: share of progressive files.
        textures, grounds: that there may be.
        alone, leading: probability of each size of the main object, from small to large, where it is the only one and
            where there are others (which are smaller, so that it can't be small).
        tilt: greatest tilt of objects, as a share of what their shapes allow.
    """

    name: str
    number: int
    sizes: tuple[tuple[int, int, float], ...]
    objects: tuple[float, ...]
    grain: tuple[float, float]
    relief: float
    quality: tuple[int, int]
    full_chroma: float
    progressive: float
    textures: tuple[str, ...] = TEXTURES
    grounds: tuple[str, ...] = tuple(GROUNDS)
    alone: tuple[float, float, float] = (0.15, 0.35, 0.5)
    leading: tuple[float, float, float] = (0.0, 0.4, 0.6)
    tilt: float = 1.0


PROFILES = {
    "imagenet": Profile(
        name="imagenet",
        number=0,
        sizes=(
            (500, 375, 0.56),
            (375, 500, 0.20),
            (500, 333, 0.09),
            (333, 500, 0.05),
            (500, 500, 0.04),
            (400, 300, 0.03),
            (640, 480, 0.015),
            (1024, 768, 0.01),
            (1200, 900, 0.005),
        ),
        objects=(0.2, 0.35, 0.3, 0.15),
        grain=(3.0, 9.0),
        relief=1.0,
        quality=(91, 97),
        full_chroma=0.1,
        progressive=0.03,
    ),
    "small": Profile(
        name="small",
        number=1,
        sizes=((96, 96, 1.0),),
        objects=(0.3, 0.4, 0.3),
        grain=(1.0, 3.0),
        relief=0.6,
        quality=(92, 96),
        full_chroma=1.0,
        progressive=0.0,
    ),
    "plain": Profile(
        name="plain",
        number=2,
        sizes=((96, 96, 1.0),),
        objects=(0.6, 0.4),
        grain=(1.0, 2.0),
        relief=0.25,
        quality=(92, 96),
        full_chroma=1.0,
        progressive=0.0,
        textures=("plain",),
        grounds=("cloth", "stone", "tiles"),  # neither light nor dark, and no colour is lost on them
        alone=(0.0, 0.3, 0.7),
        leading=(0.0, 0.2, 0.8),
        tilt=0.3,
    ),
}


@dataclass(frozen=True)
class ObjectSpec:
    """One object: words (keys of the vocabulary), and where it lies.

    Attributes:
        x, y: its centre, pixels from the left and the top edge of the image.
        radius: of the circle about it, pixels.
        angle: its tilt, radians clockwise.
        shade: brightness of its paint against the colour's, about 1.
        gloss: strength of its highlights, 0 to 1.
    """

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    shade: float
    gloss: float


@dataclass(frozen=True)
class SceneSpec:
    """All that decides an image: `draw` and `caption` read nothing else.

    Attributes:
        objects: from the back to the front.
        main: number of the main object in `objects`, the largest; its shape is the image's class.
        ground: key of GROUNDS.
        light: where the light comes from, radians clockwise from the right.
        grain: standard deviation of the sensor noise, 8-bit levels.
        relief: contrast of textures, see Profile.
        quality, full_chroma, progressive: how the JPEG file is written.
        noise_key: 128-bit key of the drawing's noise.
    """

    width: int
    height: int
    objects: tuple[ObjectSpec, ...]
    main: int
    ground: str
    light: float
    grain: float
    relief: float
    quality: int
    full_chroma: bool
    progressive: bool
    noise_key: int

    @property
    def label(self) -> str:
        """The class: the main object's shape."""
        return self.objects[self.main].shape


def find_profile(name: str) -> Profile:
    """The profile called `name`; ConfigError where there is none."""
    if name not in PROFILES:
        raise ConfigError(f"there is no profile {name!r}", fix=f"take one of {', '.join(PROFILES)}")
    return PROFILES[name]


def check_pairs(pairs: frozenset[Pair]) -> None:
    """ConfigError where `pairs` is empty or has a word that is neither a colour nor a shape."""
    unknown = sorted(pairs - all_pairs())
    if unknown:
        fix = f"pairs are (colour, shape) of the colours {', '.join(COLOURS)} and the shapes {', '.join(SHAPES)}"
        raise ConfigError(f"there is no {unknown[0][0]!r} {unknown[0][1]!r}", where="pairs", fix=fix)
    if not pairs:
        raise ConfigError("no pair of colour and shape is left to draw", where="pairs", fix="hold out fewer pairs")


def covers(thing: ObjectSpec, x: Array, y: Array) -> Mask:
    """Which of the points (x, y), pixels, the object covers: bool, their shape."""
    return signed_distance(thing.shape, *local(thing, x, y)) < 0


def local(thing: ObjectSpec, x: Array, y: Array) -> tuple[Array, Array]:
    """Pixel coordinates in the object's frame: upright, about its centre, in units of its radius."""
    cos, sin = np.float32(math.cos(thing.angle) / thing.radius), np.float32(math.sin(thing.angle) / thing.radius)
    x, y = x - np.float32(thing.x), y - np.float32(thing.y)
    return x * cos + y * sin, y * cos - x * sin


def coarse_grid(width: int, height: int) -> tuple[Array, Array]:
    """Points about a 72th of the shorter side apart: enough to see who hides whom."""
    step = max(1.0, min(width, height) / 72)
    y, x = np.meshgrid(np.arange(0.5, height, step), np.arange(0.5, width, step), indexing="ij")
    return x.astype(np.float32), y.astype(np.float32)
