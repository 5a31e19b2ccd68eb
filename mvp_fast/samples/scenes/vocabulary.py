"""The words of a scene and what each looks like: shapes, colours, textures, sizes, grounds. Data only.

Captions, class folders, masks and columns use these words as they stand here. All of them are sorted, and the mask
value of a shape is its place in SHAPES plus one, so that adding a word is a new GENERATOR_VERSION.

Colours are sRGB, 0 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = tuple[int, int, int]

SHAPES = ("arrow", "circle", "crescent", "cross", "heart", "hexagon", "ring", "square", "star", "triangle")
TEXTURES = ("checkered", "marbled", "plain", "spotted", "striped", "zigzag")

# Greatest tilt from upright, degrees: a square or a heart stays itself only near it.
TILTS = {
    "arrow": 180.0,
    "circle": 180.0,
    "crescent": 180.0,
    "cross": 20.0,
    "heart": 25.0,
    "hexagon": 30.0,
    "ring": 180.0,
    "square": 18.0,
    "star": 36.0,
    "triangle": 25.0,
}


@dataclass(frozen=True)
class Paint:
    """What a colour word looks like: the paint itself, and the trim that textures set against it."""

    base: Colour
    trim: Colour


COLOURS = {
    "black": Paint((28, 28, 32), (112, 112, 118)),
    "blue": Paint((38, 84, 190), (168, 196, 240)),
    "brown": Paint((112, 66, 34), (196, 152, 108)),
    "green": Paint((40, 138, 60), (176, 220, 150)),
    "orange": Paint((240, 128, 24), (255, 214, 150)),
    "pink": Paint((244, 132, 176), (255, 220, 232)),
    "purple": Paint((112, 48, 150), (206, 168, 226)),
    "red": Paint((200, 32, 36), (246, 176, 164)),
    "white": Paint((242, 242, 238), (164, 168, 176)),
    "yellow": Paint((248, 214, 40), (164, 128, 20)),
}

Pair = tuple[str, str]
"""(colour, shape)"""


@dataclass(frozen=True)
class Size:
    """A size word: the object's radius as a share of the image's shorter side, and the mark that captions use."""

    low: float
    high: float
    phrase: str


SIZES = {
    "small": Size(0.1, 0.135, "small"),
    "medium": Size(0.18, 0.235, "medium-sized"),
    "large": Size(0.29, 0.38, "large"),
}

Pattern = Literal["none", "ripples", "waves", "planks", "tiles", "weave", "ridges", "blades"]


@dataclass(frozen=True)
class Ground:
    """What a ground looks like: 1/f noise and a pattern, looked up in a ramp of colours.

    Attributes:
        phrase: how captions name it.
        ramp: colours from the darkest to the brightest part of the texture.
        power: exponent of the noise's power spectrum, 1 / frequency ** power.
        stretch: how much longer the noise's features are across (x) and down (y).
        pattern: what is laid over the noise.
        weight: share of the pattern against the noise, 0 to 1.
        clash: colours that would be lost on it.
    """

    phrase: str
    ramp: tuple[Colour, ...]
    power: float
    stretch: tuple[float, float] = (1.0, 1.0)
    pattern: Pattern = "none"
    weight: float = 0.0
    clash: tuple[str, ...] = ()


GROUNDS = {
    "cloth": Ground(
        "on woven cloth", ((96, 98, 122), (140, 142, 164), (182, 184, 200)), 1.9, pattern="weave", weight=0.45
    ),
    "grass": Ground(
        "on grass",
        ((22, 40, 12), (52, 88, 26), (96, 132, 44), (158, 182, 84)),
        1.5,
        (0.7, 1.8),
        pattern="blades",
        weight=0.4,
        clash=("green",),
    ),
    "sand": Ground(
        "on sandy ground",
        ((140, 110, 76), (194, 164, 120), (222, 198, 156), (240, 224, 190)),
        1.7,
        pattern="ripples",
        weight=0.4,
        clash=("orange", "yellow", "brown"),
    ),
    "snow": Ground(
        "on snow",
        ((176, 190, 212), (216, 224, 236), (234, 239, 246), (250, 251, 252)),
        2.3,
        clash=("white",),
    ),
    "soil": Ground(
        "on bare soil",
        ((32, 22, 16), (70, 50, 36), (104, 78, 56), (146, 116, 86)),
        1.5,
        clash=("brown", "black"),
    ),
    "stone": Ground(
        "on a stone floor",
        ((58, 58, 58), (110, 110, 106), (152, 149, 142), (204, 200, 190)),
        1.9,
        pattern="ridges",
        weight=0.45,
    ),
    "tiles": Ground(
        "on a tiled floor",
        ((70, 92, 92), (126, 150, 146), (150, 174, 168), (176, 196, 188)),
        2.0,
        pattern="tiles",
        weight=0.5,
    ),
    "water": Ground(
        "on water",
        ((10, 44, 74), (26, 84, 118), (62, 128, 156), (150, 196, 208)),
        2.0,
        (2.6, 0.8),
        pattern="waves",
        weight=0.5,
        clash=("blue",),
    ),
    "wood": Ground(
        "on a wooden table",
        ((88, 54, 30), (134, 90, 54), (168, 120, 76), (196, 152, 106)),
        1.9,
        (4.0, 0.7),
        pattern="planks",
        weight=0.55,
        clash=("brown", "orange"),
    ),
}

MASK_GROUND = 0
"""Mask value of the ground."""
MASK_VALUES = {shape: value for value, shape in enumerate(SHAPES, start=1)}
"""Mask value of each shape."""
# Distinct colours to look at; the values are what counts.
MASK_PALETTE: tuple[Colour, ...] = (
    (0, 0, 0),
    (230, 60, 60),
    (60, 180, 75),
    (255, 225, 25),
    (67, 99, 216),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (191, 239, 69),
    (250, 190, 212),
)


def all_pairs() -> frozenset[Pair]:
    """Every (colour, shape). `all_pairs() - held_out` draws a training set, `held_out` its complement."""
    return frozenset((colour, shape) for colour in COLOURS for shape in SHAPES)
