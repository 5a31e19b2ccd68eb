"""Draws a `SceneSpec`: ground, shadows, shaded objects from back to front, mottling and sensor noise.

Shape legend: H, W pixels; C the channels red, green, blue; T the side of a noise tile.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvp_fast.samples.scenes.shapes import signed_distance
from mvp_fast.samples.scenes.spec import ObjectSpec, SceneSpec, local
from mvp_fast.samples.scenes.textures import ground_light, linear, noise_pair, object_texture
from mvp_fast.samples.scenes.vocabulary import COLOURS, GROUNDS, MASK_PALETTE, MASK_VALUES

Array = NDArray[np.floating]  # float32, which the stubs of numpy lose track of

EDGE = np.float32(1.4)  # width of an edge, pixels: a lens's blur
BEVEL = 0.4  # width of an object's rounded rim, radii
MOTTLE_TILE = 256  # greatest side of the noise on objects' surfaces, pixels
SHADOW_LENGTH, SHADOW_BLUR, SHADOW_DEPTH = 0.16, 0.22, 0.55  # radii, radii, share of light taken


@dataclass(frozen=True)
class Drawing:
    """A drawn scene.

    Attributes:
        image_HWC: uint8, sRGB.
        mask_HW: uint8, MASK_GROUND or the MASK_VALUES of the shape that shows.
        instance_HW: uint8, 0 for the ground or one more than the number of the object that shows.
    """

    image_HWC: NDArray[np.uint8]
    mask_HW: NDArray[np.uint8]
    instance_HW: NDArray[np.uint8]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Of each object, from back to front: the box of what shows of it, (left, top, right, bottom), pixels;
        right and bottom are the first beyond it."""
        found = []
        for value in range(1, int(self.instance_HW.max()) + 1):
            shown_HW = self.instance_HW == value
            columns, rows = np.flatnonzero(shown_HW.any(axis=0)), np.flatnonzero(shown_HW.any(axis=1))
            found.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        return found


def draw(scene: SceneSpec) -> Drawing:
    """Draw the scene; the same spec gives the same pixels."""
    rng = np.random.Generator(np.random.Philox(key=scene.noise_key))
    ground = GROUNDS[scene.ground]
    noise_HW, other_HW = noise_pair(rng, scene.height, scene.width, ground.power, ground.stretch)
    light_CHW = ground_light(rng, ground, noise_HW, other_HW, scene.relief)
    tile = min(MOTTLE_TILE, 1 << (max(scene.width, scene.height) - 1).bit_length())
    mottle_TT, _ = noise_pair(rng, tile, tile, power=2.0)
    instance_HW = np.zeros((scene.height, scene.width), dtype=np.uint8)
    shapes = np.zeros(len(scene.objects) + 1, dtype=np.uint8)
    for number, thing in enumerate(scene.objects, start=1):
        _draw_object(light_CHW, instance_HW, number, thing, scene, mottle_TT)
        shapes[number] = MASK_VALUES[thing.shape]
    _illuminate(light_CHW, scene, rng)
    display_CHW = np.sqrt(light_CHW, out=light_CHW)
    display_CHW *= np.float32(255)
    grain_CHW = rng.standard_normal(display_CHW.shape, dtype=np.float32)
    grain_CHW *= np.float32(scene.grain)
    display_CHW += grain_CHW
    display_CHW += np.float32(0.5)
    image_CHW = np.clip(display_CHW, 0, 255, out=display_CHW).astype(np.uint8)
    return Drawing(np.ascontiguousarray(image_CHW.transpose(1, 2, 0)), shapes[instance_HW], instance_HW)


def _draw_object(
    light_CHW: Array, instance_HW: NDArray[np.uint8], number: int, thing: ObjectSpec, scene: SceneSpec, mottle_TT: Array
) -> None:
    """Put object `number` (from 1) and its shadow over what is there, within the box that they reach."""
    reach = thing.radius * (1 + SHADOW_LENGTH + SHADOW_BLUR) + 2
    left, right = max(0, int(thing.x - reach)), min(scene.width, int(thing.x + reach) + 1)
    top, bottom = max(0, int(thing.y - reach)), min(scene.height, int(thing.y + reach) + 1)
    y_HW, x_HW = np.meshgrid(
        np.arange(top, bottom, dtype=np.float32) + np.float32(0.5),
        np.arange(left, right, dtype=np.float32) + np.float32(0.5),
        indexing="ij",
        copy=False,
    )
    x_HW, y_HW = local(thing, x_HW, y_HW)
    # The noise repeats without a seam, and each object sees another part of it.
    tile_y, tile_x = np.arange(top, bottom) + 97 * number, np.arange(left, right) + 61 * number
    noise_HW = mottle_TT[(tile_y % len(mottle_TT))[:, None], (tile_x % len(mottle_TT))[None, :]]
    part = np.s_[top:bottom, left:right]
    distance_HW = signed_distance(thing.shape, x_HW, y_HW) * np.float32(thing.radius)
    here_CHW = light_CHW[:, *part]
    here_CHW *= _shadow(distance_HW, thing, scene.light)
    paint_CHW = _paint(thing, x_HW, y_HW, noise_HW, scene.relief)
    _shade(paint_CHW, distance_HW, thing, scene.light)
    cover_HW = np.clip(np.float32(0.5) - distance_HW / EDGE, 0, 1)
    paint_CHW -= here_CHW
    paint_CHW *= cover_HW
    here_CHW += paint_CHW
    instance_HW[part][distance_HW < 0] = number


def _shadow(distance_HW: Array, thing: ObjectSpec, light: float) -> Array:
    """Share of light left by the object's soft shadow, which falls away from the light."""
    across = -round(math.cos(light) * SHADOW_LENGTH * thing.radius)
    down = -round(math.sin(light) * SHADOW_LENGTH * thing.radius)
    height, width = distance_HW.shape
    # The object moved by (across, down); what comes in from outside the box is as far away as the box's edge.
    moved_HW = distance_HW[
        np.clip(np.arange(height) - down, 0, height - 1)[:, None],
        np.clip(np.arange(width) - across, 0, width - 1)[None, :],
    ]
    blur = np.float32(SHADOW_BLUR * thing.radius)
    share_HW = np.clip(np.float32(0.5) - moved_HW / (2 * blur), 0, 1)
    share_HW = np.square(share_HW) * (3 - 2 * share_HW)
    left_HW: Array = 1 - share_HW * np.float32(SHADOW_DEPTH)
    return left_HW


def _paint(thing: ObjectSpec, x_HW: Array, y_HW: Array, noise_HW: Array, relief: float) -> Array:
    """Light that the object's textured surface sends back under even light: float32 (C, H, W)."""
    paint = COLOURS[thing.colour]
    base, trim = linear(paint.base) * np.float32(thing.shade), linear(paint.trim) * np.float32(thing.shade)
    share_HW = object_texture(thing.texture, x_HW, y_HW, noise_HW, thing.radius, phase=thing.x)
    surface_CHW = base[:, None, None] + (trim - base)[:, None, None] * share_HW
    surface_CHW *= 1 + noise_HW * np.float32(0.1 * relief)  # mottled
    return surface_CHW


def _shade(paint_CHW: Array, distance_HW: Array, thing: ObjectSpec, light: float) -> None:
    """Light the object from the side, in place: a flat top with a rounded rim, and a highlight."""
    slope_y_HW, slope_x_HW = np.gradient(distance_HW)
    lean_HW = np.clip(1 + distance_HW / np.float32(BEVEL * thing.radius), 0, 1) * np.float32(0.9)
    toward_HW = (slope_x_HW * np.float32(math.cos(light)) + slope_y_HW * np.float32(math.sin(light))) * lean_HW
    up_HW = np.sqrt(1 - np.square(lean_HW))
    facing_HW = toward_HW * np.float32(0.6) + up_HW * np.float32(0.8)  # the light stands 53 degrees high
    paint_CHW *= np.float32(0.35) + np.float32(0.85) * np.clip(facing_HW, 0, None)
    glint_HW = np.clip(toward_HW * np.float32(0.32) + up_HW * np.float32(0.95), 0, 1) ** 32
    paint_CHW += glint_HW * np.float32(0.25 * thing.gloss)


def _illuminate(light_CHW: Array, scene: SceneSpec, rng: np.random.Generator) -> None:
    """Uneven light over the scene, in place: it falls off away from the light and towards the corners."""
    x_W = np.linspace(-1, 1, scene.width, dtype=np.float32)
    y_H = np.linspace(-1, 1, scene.height, dtype=np.float32)
    side, corner = rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.25)
    exposure = rng.uniform(0.85, 1.15)
    side_H = y_H * np.float32(math.sin(scene.light) * side) + np.float32(1)
    side_W = x_W * np.float32(math.cos(scene.light) * side)
    fall_HW = side_H[:, None] + side_W[None, :]
    fall_HW *= 1 - np.float32(corner / 2) * (np.square(y_H)[:, None] + np.square(x_W)[None, :])
    light_CHW *= fall_HW * np.float32(exposure)
    np.clip(light_CHW, 0, 1, out=light_CHW)


def encode_image(drawing: Drawing, scene: SceneSpec) -> bytes:
    """The image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(drawing.image_HWC).save(
        file,
        "JPEG",
        quality=scene.quality,
        subsampling="4:4:4" if scene.full_chroma else "4:2:0",
        progressive=scene.progressive,
    )
    return file.getvalue()


def encode_mask(drawing: Drawing) -> bytes:
    """The mask as a PNG file of palette indices."""
    file = io.BytesIO()
    picture = Image.fromarray(drawing.mask_HW, mode="P")
    picture.putpalette([value for colour in MASK_PALETTE for value in colour])
    picture.save(file, "PNG", compress_level=3)
    return file.getvalue()
