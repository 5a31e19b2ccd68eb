"""The shapes that scenes are made of, as signed distance functions: negative inside, positive outside.

Every shape lies within the unit circle, upright (y grows downwards, as in images). The distances are exact or a
lower bound of the exact ones, never steeper than one, so that an edge drawn from them is soft over a known width.

Shape legend: `...` any shape; all arrays float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]  # float32, which the stubs of numpy lose track of


def _fold(x: Array, y: Array, sectors: int) -> tuple[Array, Array]:
    """Coordinates (along, across) in the sector that a point lies in; all `sectors` sectors map to one.

    The axis of the first sector points up; `across` is never negative.
    """
    angle = np.arctan2(x, -y)
    sector = np.float32(2 * math.pi / sectors)
    angle -= np.round(angle / sector) * sector
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.abs(np.sin(angle))


def _regular_polygon(x: Array, y: Array, sides: int) -> Array:
    """A regular polygon with its corners on the unit circle and an edge at the bottom."""
    along, _ = _fold(x, -y, sides)
    return along - np.float32(math.cos(math.pi / sides))


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """An upright box about the origin."""
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _arrow(x: Array, y: Array) -> Array:
    """Points right: a shaft and a triangular head of half-height 0.64, from x = 0.05 to the tip at x = 1."""
    y = np.abs(y)
    run, rise = ARROW_TIP - ARROW_NECK, ARROW_HEAD
    slope = ((x - np.float32(ARROW_NECK)) * np.float32(rise) + (y - np.float32(rise)) * np.float32(run)) / np.float32(
        math.hypot(run, rise)
    )
    head = np.maximum(slope, np.float32(ARROW_NECK) - x)
    end = ARROW_NECK + 0.1  # inside the head, so that the two overlap
    shaft = _box(x - np.float32((ARROW_TAIL + end) / 2), y, (end - ARROW_TAIL) / 2, ARROW_SHAFT)
    union: Array = np.minimum(head, shaft)
    return union


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(1)


def _crescent(x: Array, y: Array) -> Array:
    """The unit disc without the disc of radius CRESCENT_BITE whose centre is CRESCENT_SHIFT to the right."""
    bite = np.float32(CRESCENT_BITE) - np.hypot(x - np.float32(CRESCENT_SHIFT), y)
    left: Array = np.maximum(_circle(x, y), bite)
    return left


def _cross(x: Array, y: Array) -> Array:
    """A plus sign."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(CROSS_ARM), np.minimum(x, y) - np.float32(CROSS_WIDTH))


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner with half a disc on each of its two upper edges."""
    x = np.abs(x)
    y = y - np.float32(HEART_LIFT)
    half = HEART_HALF_SIDE
    diagonal = np.float32(math.sqrt(0.5))
    square = _box((x + y) * diagonal, (x - y) * diagonal, half, half)
    lobe = np.hypot(x - diagonal * np.float32(half), y + diagonal * np.float32(half)) - np.float32(half)
    union: Array = np.minimum(square, lobe)
    return union


def _ring(x: Array, y: Array) -> Array:
    middle, half = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
    return np.abs(np.hypot(x, y) - np.float32(middle)) - np.float32(half)


def _star(x: Array, y: Array) -> Array:
    """Five points; the inner corners lie at radius STAR_INNER."""
    along, across = _fold(x, y, 5)
    corner_along, corner_across = STAR_INNER * math.cos(math.pi / 5), STAR_INNER * math.sin(math.pi / 5)
    run, rise = 1 - corner_along, corner_across
    return ((along - np.float32(1)) * np.float32(rise) + across * np.float32(run)) / np.float32(math.hypot(run, rise))


ARROW_TAIL, ARROW_NECK, ARROW_TIP, ARROW_HEAD, ARROW_SHAFT = -0.95, 0.05, 1.0, 0.64, 0.24
CRESCENT_BITE, CRESCENT_SHIFT = 0.82, 0.5
CROSS_ARM, CROSS_WIDTH = 0.94, 0.32
HEART_HALF_SIDE, HEART_LIFT = 0.545, 0.16
RING_HOLE = 0.55
STAR_INNER = 0.45

DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "hexagon": lambda x, y: _regular_polygon(x, y, 6),
    "ring": _ring,
    "square": lambda x, y: _regular_polygon(x, y, 4),
    "star": _star,
    "triangle": lambda x, y: _regular_polygon(x, y, 3),
}


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Distance of points to the edge of the unit-sized `shape`, negative inside.

    Args:
        shape: a key of DISTANCES.
        x: float32 (...), to the right, in units of the shape's radius.
        y: float32 (...), downwards.

    Returns:
        float32 (...), in the same units.
    """
    return DISTANCES[shape](x, y)
