"""Noise with natural statistics, the textures of grounds and the textures of objects.

Shape legend: H, W pixels of an image or of a part of it; C the three channels red, green, blue. Light is linear: the
display value (0 to 1) is its square root, a gamma of 2 that stands for sRGB's 2.2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mvp_fast.samples.scenes.vocabulary import Colour, Ground

Array = NDArray[np.floating]  # float32, which the stubs of numpy lose track of

PI = np.float32(math.pi)
RAMP_STEPS = 1024


def linear(colour: Colour) -> Array:
    """Light of an sRGB colour: float32 (C,), 0 to 1."""
    light_C: Array = np.square(np.asarray(colour, dtype=np.float32) / np.float32(255))
    return light_C


def noise_pair(
    rng: np.random.Generator, height: int, width: int, power: float, stretch: tuple[float, float] = (1.0, 1.0)
) -> tuple[Array, Array]:
    """Two independent Gaussian fields whose power spectrum falls as 1 / frequency ** power (natural images: about 2,
    Field 1987, doi 10.1364/JOSAA.4.002379).

    Both come from one transform: they are the real and the imaginary part of the same complex field.

    Args:
        stretch: how much longer than isotropic features are across and down.

    Returns:
        float32 (H, W) each, with mean 0 and standard deviation 1.
    """
    across = np.fft.fftfreq(width).astype(np.float32) * np.float32(stretch[0])
    down = np.fft.fftfreq(height).astype(np.float32) * np.float32(stretch[1])
    squared_HW = np.square(down)[:, None] + np.square(across)[None, :]
    squared_HW[0, 0] = 1
    amplitude_HW = np.exp(np.log(squared_HW) * np.float32(-power / 4))
    amplitude_HW[0, 0] = 0  # no mean
    spectrum_HW = rng.standard_normal((height, width, 2), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum_HW *= amplitude_HW
    field_HW = np.fft.ifft2(spectrum_HW)
    first, second = np.ascontiguousarray(field_HW.real), np.ascontiguousarray(field_HW.imag)
    first /= first.std()
    second /= second.std()
    return first, second


def ramp(value_HW: Array, colours: tuple[Colour, ...]) -> Array:
    """Light of `colours` read at `value_HW`: 0 is the first colour, 1 the last, linear in display value between.

    Returns:
        float32 (C, H, W).
    """
    stops = np.linspace(0, 1, len(colours))
    steps = np.linspace(0, 1, RAMP_STEPS)
    at_HW = np.clip(value_HW * np.float32(RAMP_STEPS - 1), 0, RAMP_STEPS - 1).astype(np.int16)
    display = np.asarray(colours, dtype=np.float64).T / 255
    return np.stack([np.square(np.interp(steps, stops, row)).astype(np.float32)[at_HW] for row in display])


def ground_light(rng: np.random.Generator, ground: Ground, noise_HW: Array, other_HW: Array, relief: float) -> Array:
    """Light of a textured ground.

    Args:
        noise_HW, other_HW: the two fields of `noise_pair`, as the ground wants them.
        relief: contrast, 0 (one flat colour) to 1.

    Returns:
        float32 (C, H, W).
    """
    height, width = noise_HW.shape
    short = min(height, width)
    y_HW, x_HW = np.meshgrid(
        np.arange(height, dtype=np.float32) / np.float32(short),
        np.arange(width, dtype=np.float32) / np.float32(short),
        indexing="ij",
        copy=False,
    )
    pattern_HW = _pattern(rng, ground, x_HW, y_HW, noise_HW, other_HW)
    weight = np.float32(ground.weight)
    value_HW = noise_HW * (1 - weight) + pattern_HW * weight if ground.pattern != "none" else noise_HW
    return ramp(np.float32(0.5) + value_HW * np.float32(0.24 * relief), ground.ramp)


def _pattern(
    rng: np.random.Generator, ground: Ground, x_HW: Array, y_HW: Array, noise_HW: Array, other_HW: Array
) -> Array:
    """The ground's own pattern, about -2 to 2; x and y are in units of the shorter side."""
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    tilt = rng.uniform(-0.4, 0.4)
    u_HW = x_HW * np.float32(math.cos(tilt)) + y_HW * np.float32(math.sin(tilt))
    v_HW = y_HW * np.float32(math.cos(tilt)) - x_HW * np.float32(math.sin(tilt))
    pattern = ground.pattern
    if pattern == "ripples":  # of wind on sand: bent by the noise
        return np.sin(v_HW * np.float32(rng.uniform(60, 110)) + other_HW * np.float32(1.8) + phase)
    if pattern == "waves":  # of water: two trains that cross, with sharp crests
        first = np.sin(v_HW * np.float32(rng.uniform(40, 70)) + other_HW * np.float32(2.2) + phase)
        second = np.sin((v_HW + u_HW * np.float32(0.35)) * np.float32(31) + noise_HW * np.float32(1.5))
        crests_HW: Array = np.abs(first + second) * np.float32(1.2) - np.float32(1)
        return crests_HW
    if pattern == "planks":  # boards with grain along them and dark seams
        boards = np.float32(rng.uniform(3, 6))
        board = np.floor(y_HW * boards)
        tone = rng.standard_normal(int(board.max()) + 1).astype(np.float32)[board.astype(np.int16)]
        grain = np.sin((y_HW * np.float32(70) + other_HW * np.float32(2.5)) + tone * 9)
        seam = np.abs(y_HW * boards - board - np.float32(0.5)) > np.float32(0.485)
        boards_HW: Array = tone + grain * np.float32(0.7) - seam * np.float32(3)
        return boards_HW
    if pattern == "tiles":  # square tiles, each with its own tone, and pale joints
        count = np.float32(rng.uniform(3.2, 6))
        column, row = np.floor(u_HW * count), np.floor(v_HW * count)
        number = (column * 7 + row * 13).astype(np.int32) % 64
        tone = rng.standard_normal(64).astype(np.float32)[number]
        joint = np.maximum(
            np.abs(u_HW * count - column - np.float32(0.5)), np.abs(v_HW * count - row - np.float32(0.5))
        ) > np.float32(0.475)
        return np.where(joint, np.float32(-3), tone * np.float32(0.8))
    if pattern == "weave":  # threads over and under
        threads = np.float32(rng.uniform(110, 170))
        over = np.sin(u_HW * threads) * np.sin(v_HW * threads)
        return over * np.float32(1.2) + np.sin(u_HW * threads * 2) * np.float32(0.4)
    if pattern == "ridges":  # cracks and veins: the zero line of the noise
        return np.float32(1) - np.exp(np.abs(other_HW) * np.float32(-9)) * np.float32(3)
    if pattern == "blades":  # short upright strokes
        return np.sin(x_HW * np.float32(rng.uniform(150, 220)) + other_HW * np.float32(5) + phase)
    return np.zeros_like(noise_HW)


def object_texture(texture: str, x_HW: Array, y_HW: Array, noise_HW: Array, radius: float, phase: float) -> Array:
    """Share of trim against base paint over an object: float32 (H, W), 0 to 1, edges about a pixel wide.

    Args:
        texture: a word of TEXTURES.
        x_HW, y_HW: the object's frame, in radii.
        noise_HW: a field of `noise_pair`, which frays the veins of marble.
        radius: pixels.
        phase: where the veins of marble run, radians.
    """
    pixels = np.float32(radius)
    if texture == "striped":
        return _soft(np.sin(x_HW * (PI * 3.5)) + np.float32(-0.25), pixels / (PI * 3.5))
    if texture == "checkered":
        return _soft(np.sin(x_HW * (PI * 2.5)) * np.sin(y_HW * (PI * 2.5)), pixels / (PI * 2.5))
    if texture == "spotted":
        # A hexagonal lattice is two square-angled ones, the second in the middle of the first's cells.
        pitch_x, pitch_y = np.float32(0.5), np.float32(0.5 * math.sqrt(3))
        first = np.hypot(_centred(x_HW, pitch_x), _centred(y_HW, pitch_y))
        second = np.hypot(_centred(x_HW + pitch_x / 2, pitch_x), _centred(y_HW + pitch_y / 2, pitch_y))
        return _soft(np.float32(0.15) - np.minimum(first, second), pixels)
    if texture == "zigzag":
        bend = np.abs(_centred(x_HW, np.float32(0.6))) * np.float32(1.2)
        return _soft(np.sin((y_HW + bend) * (PI * 3.2)) + np.float32(-0.2), pixels / (PI * 5))
    if texture == "marbled":
        # Veins that two slow waves bend; the noise frays them a little.
        bend = np.sin(x_HW * np.float32(2.9) - y_HW * np.float32(1.7) + np.float32(phase)) * np.float32(1.5)
        bend += np.sin(x_HW * np.float32(3.7) + y_HW * np.float32(5.3) - np.float32(phase)) * np.float32(0.7)
        vein = np.abs(np.sin(x_HW * np.float32(2.3) + y_HW * np.float32(3.4) + bend + noise_HW * np.float32(0.12)))
        return np.square(np.float32(1) - vein)
    return np.zeros_like(x_HW)


def _centred(value: Array, period: np.float32) -> Array:
    """Distance to the nearest multiple of `period`, with its sign."""
    return value - np.round(value / period) * period


def _soft(value: Array, pixels: np.float32) -> Array:
    """1 where `value` is positive, 0 where negative, over a pixel's width where value * pixels is in pixels."""
    share: Array = np.clip(value * pixels + np.float32(0.5), 0, 1)
    return share
