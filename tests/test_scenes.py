"""The synthetic data set: shapes against references point by point, natural statistics, sets that can be resumed."""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from mvp_fast.cli.main import main
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.samples.scenes import PROFILES, SceneSet, all_pairs, caption, draw, layout, write_set
from mvp_fast.samples.scenes.caption import name, relation
from mvp_fast.samples.scenes.draw import encode_image, encode_mask
from mvp_fast.samples.scenes.shapes import DISTANCES, signed_distance
from mvp_fast.samples.scenes.spec import ObjectSpec, SceneSpec
from mvp_fast.samples.scenes.textures import linear, noise_pair, object_texture, ramp
from mvp_fast.samples.scenes.vocabulary import (
    COLOURS,
    GROUNDS,
    MASK_PALETTE,
    MASK_VALUES,
    SHAPES,
    SIZES,
    TEXTURES,
    TILTS,
)

IMAGENET, SMALL = PROFILES["imagenet"], PROFILES["small"]


# --- shapes, each against a definition of its own: corners and an even-odd count, or plain conditions ---------------


def regular(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon with one at the top, or of a star (x right, y down)."""
    count = corners * (2 if inner else 1)
    radii = [inner if inner and k % 2 else 1.0 for k in range(count)]
    return [
        (r * math.sin(2 * math.pi * k / count), -r * math.cos(2 * math.pi * k / count)) for k, r in enumerate(radii)
    ]


def turned(corners: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x * c - y * s, x * s + y * c) for x, y in corners]


POLYGONS = {
    "triangle": regular(3),
    "square": turned(regular(4), 45),
    "hexagon": turned(regular(6), 30),
    "star": regular(5, 0.45),
    "arrow": [(-0.95, -0.24), (0.05, -0.24), (0.05, -0.64), (1, 0), (0.05, 0.64), (0.05, 0.24), (-0.95, 0.24)],
    "cross": [
        *[(-0.32, -0.94), (0.32, -0.94), (0.32, -0.32), (0.94, -0.32), (0.94, 0.32), (0.32, 0.32)],
        *[(0.32, 0.94), (-0.32, 0.94), (-0.32, 0.32), (-0.94, 0.32), (-0.94, -0.32), (-0.32, -0.32)],
    ],
}


def in_polygon(corners: list[tuple[float, float]], x: float, y: float) -> bool:
    inside = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def in_heart(x: float, y: float) -> bool:
    side, centre_y = 1.09, 0.16
    half = side / 2
    diagonal = side / math.sqrt(2)
    tips = [(0, centre_y - diagonal), (diagonal, centre_y), (0, centre_y + diagonal), (-diagonal, centre_y)]
    lobes = [math.hypot(x - sign * diagonal / 2, y - centre_y + diagonal / 2) < half for sign in (-1, 1)]
    return in_polygon(tips, x, y) or any(lobes)


def is_inside(shape: str, x: float, y: float) -> bool:
    """Whether the unit-sized, upright shape covers the point."""
    radius = math.hypot(x, y)
    if shape in POLYGONS:
        return in_polygon(POLYGONS[shape], x, y)
    return {
        "circle": radius < 1,
        "ring": 0.55 < radius < 1,
        "crescent": radius < 1 and math.hypot(x - 0.5, y) > 0.82,
        "heart": in_heart(x, y),
    }[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_have_the_sign_of_the_shape(shape: str) -> None:
    rng = np.random.default_rng()
    x, y = rng.uniform(-1.2, 1.2, (2, 4000)).astype(np.float32)
    distance = signed_distance(shape, x, y)
    assert distance.dtype == np.float32
    expected = np.array([is_inside(shape, float(a), float(b)) for a, b in zip(x, y, strict=True)])
    clear = np.abs(distance) > 1e-5
    np.testing.assert_array_equal((distance < 0)[clear], expected[clear])
    assert 0.1 < expected.mean() < 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_grow_as_distances_do(shape: str) -> None:
    """Never steeper than one (edges are soft over a known width), and as steep as that across the edge."""
    rng = np.random.default_rng()
    x, y = rng.uniform(-1.2, 1.2, (2, 20000)).astype(np.float32)
    step = 1e-2 * np.exp(2j * math.pi * rng.random(20000))
    change = signed_distance(shape, x + step.real.astype(np.float32), y + step.imag.astype(np.float32))
    change = np.abs(change - signed_distance(shape, x, y)) / 1e-2
    assert change.max() < 1.001
    near = np.abs(signed_distance(shape, x, y)) < 0.02
    assert change[near].max() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_the_unit_circle(shape: str) -> None:
    rng = np.random.default_rng()
    angle, radius = rng.uniform(0, 2 * math.pi, 5000), rng.uniform(1.005, 1.6, 5000)
    outside = signed_distance(
        shape, (radius * np.cos(angle)).astype(np.float32), (radius * np.sin(angle)).astype(np.float32)
    )
    assert (outside > 0).all()
    inside = signed_distance(shape, *(np.stack([np.cos(angle), np.sin(angle)]) * 0.93).astype(np.float32))
    assert (inside < 0).any(), "the shape is smaller than its radius says"


# --- noise and textures ----------------------------------------------------------------------------------------------


def spectrum_slope(image_HW: np.ndarray, low: float, high: float) -> float:
    """Exponent of the radially averaged power spectrum between two frequencies, cycles a pixel."""
    power = np.abs(np.fft.fft2(image_HW)) ** 2
    frequency = np.hypot(np.fft.fftfreq(image_HW.shape[0])[:, None], np.fft.fftfreq(image_HW.shape[1])[None, :])
    edges = np.geomspace(low, high, 12)
    mean = [power[(frequency >= a) & (frequency < b)].mean() for a, b in itertools.pairwise(edges)]
    return float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0])


@pytest.mark.parametrize("power", [0.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [(375, 500), (333, 257), (96, 96)])
def test_noise_has_the_power_spectrum_asked_for(size: tuple[int, int], power: float) -> None:
    fields = noise_pair(np.random.default_rng(), *size, power)
    for field in fields:
        assert field.shape == size
        assert field.dtype == np.float32
        assert abs(field.mean()) < 1e-3
        assert field.std() == pytest.approx(1, abs=1e-3)
    slope = np.mean([spectrum_slope(field, 0.06, 0.45) for field in fields])
    assert slope == pytest.approx(-power, abs=0.15)


def test_the_two_noise_fields_are_independent() -> None:
    pairs = [noise_pair(np.random.default_rng(), 64, 64, 1.0) for _ in range(200)]
    correlation = [np.mean(first * second) for first, second in pairs]
    assert abs(np.mean(correlation)) < 5 * np.std(correlation) / math.sqrt(200)
    assert np.std(correlation) < 0.2


def test_stretched_noise_is_longer_across() -> None:
    field, _ = noise_pair(np.random.default_rng(), 256, 256, 2.0, (4.0, 1.0))
    across, down = np.abs(np.diff(field, axis=1)).mean(), np.abs(np.diff(field, axis=0)).mean()
    assert across < 0.6 * down


def test_a_ramp_passes_through_its_colours() -> None:
    colours = ((10, 20, 30), (110, 60, 200), (250, 240, 255))
    light_CHW = ramp(np.array([[-1, 0, 0.5, 1, 7]], dtype=np.float32), colours)
    display = np.sqrt(light_CHW[:, 0]).T * 255
    np.testing.assert_allclose(display, [colours[0], *colours, colours[2]], atol=0.5)
    np.testing.assert_allclose(linear(colours[1]) ** 0.5 * 255, colours[1], rtol=1e-5)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_mix_base_and_trim(texture: str) -> None:
    grid = np.linspace(-1, 1, 200, dtype=np.float32)
    y_HW, x_HW = np.meshgrid(grid, grid, indexing="ij")
    noise_HW, _ = noise_pair(np.random.default_rng(), 200, 200, 2.0)
    share_HW = object_texture(texture, x_HW, y_HW, noise_HW, 100.0, 1.0)
    assert share_HW.dtype == np.float32
    assert share_HW.min() >= 0
    assert share_HW.max() <= 1
    if texture == "plain":
        assert not share_HW.any()
    else:  # both paints show, and the base leads
        assert 0.1 < share_HW.mean() < 0.6
        assert share_HW.max() > 0.99
        assert share_HW.min() < 0.01


# --- layout ----------------------------------------------------------------------------------------------------------


def test_profiles_are_distributions() -> None:
    for profile in PROFILES.values():
        assert sum(weight for *_, weight in profile.sizes) == pytest.approx(1)
        assert sum(profile.objects) == pytest.approx(1)
    assert len({profile.number for profile in PROFILES.values()}) == len(PROFILES)


def test_words_are_complete() -> None:
    assert set(SHAPES) == set(DISTANCES) == set(TILTS) == set(MASK_VALUES)
    assert list(SHAPES) == sorted(SHAPES)
    assert list(COLOURS) == sorted(COLOURS)
    assert len(MASK_PALETTE) == len(SHAPES) + 1
    assert sorted(MASK_VALUES.values()) == list(range(1, len(SHAPES) + 1))
    assert any(not ground.clash for ground in GROUNDS.values()), "some ground must go with every colour"


def test_a_scene_depends_on_seed_profile_and_number_alone() -> None:
    scenes = [layout(3, IMAGENET, image) for image in range(40)]
    assert scenes == [layout(3, IMAGENET, image) for image in reversed(range(40))][::-1]
    assert len({scene.noise_key for scene in scenes}) == 40
    assert len({scene.objects for scene in scenes}) == 40
    for other in (layout(4, IMAGENET, 0), layout(3, SMALL, 0), layout(2**64 - 1, IMAGENET, 0)):
        assert other.noise_key not in {scene.noise_key for scene in scenes}
        assert other.objects != scenes[0].objects


def test_classes_are_balanced_in_every_block() -> None:
    labels = [layout(0, SMALL, image).label for image in range(60)]
    orders = {tuple(labels[k : k + 10]) for k in range(0, 60, 10)}
    assert all(sorted(order) == list(SHAPES) for order in orders)
    assert len(orders) == 6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from(sorted(PROFILES)), st.integers(0, 10**9))
def test_layouts_keep_their_promises(seed: int, profile: str, image: int) -> None:
    scene = layout(seed, PROFILES[profile], image)
    main = scene.objects[scene.main]
    assert 1 <= len(scene.objects) <= len(PROFILES[profile].objects)
    assert (scene.width, scene.height) in {size[:2] for size in PROFILES[profile].sizes}
    assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)
    for thing in scene.objects:
        assert thing.radius <= main.radius
        assert thing is main or thing.size != main.size
        assert SIZES[thing.size].low <= thing.radius / min(scene.width, scene.height) <= SIZES[thing.size].high
        assert thing.radius < thing.x < scene.width - thing.radius
        assert thing.radius < thing.y < scene.height - thing.radius
        assert thing.colour not in GROUNDS[scene.ground].clash


def test_scenes_vary() -> None:
    scenes = [layout(1, IMAGENET, image) for image in range(400)]
    things = [thing for scene in scenes for thing in scene.objects]
    for words, field in ((SHAPES, "shape"), (COLOURS, "colour"), (TEXTURES, "texture"), (SIZES, "size")):
        counts = Counter(getattr(thing, field) for thing in things)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.4 * len(things) / len(words)
    assert {scene.ground for scene in scenes} == set(GROUNDS)
    counts = Counter(len(scene.objects) for scene in scenes)
    assert all(counts[number] > 20 for number in (1, 2, 3, 4))
    relations = Counter(relation(s, k) for s in scenes for k in range(len(s.objects)) if k != s.main)
    assert set(relations) == {"in front", "behind", "left", "right", "above", "below"}
    assert 0.3 < (relations["in front"] + relations["behind"]) / relations.total() < 0.6


def test_image_sizes_are_those_of_the_profile() -> None:
    sizes = Counter((s.width, s.height) for s in (layout(2, IMAGENET, image) for image in range(600)))
    for width, height, weight in IMAGENET.sizes:
        assert sizes[width, height] == pytest.approx(600 * weight, abs=4 * math.sqrt(600 * weight) + 1)
    assert {(s.width, s.height) for s in (layout(2, SMALL, image) for image in range(20))} == {(96, 96)}


def test_held_out_pairs_never_occur() -> None:
    held_out = frozenset({("red", "square"), ("blue", "circle"), *(("green", shape) for shape in SHAPES)})
    train = all_pairs() - held_out
    seen = {(t.colour, t.shape) for image in range(300) for t in layout(0, SMALL, image, train).objects}
    assert not seen & held_out
    assert len(seen) == len(train) == 88
    only = {(t.colour, t.shape) for image in range(100) for t in layout(0, SMALL, image, held_out).objects}
    assert only == held_out


def test_a_class_without_pairs_is_left_out() -> None:
    pairs = frozenset(pair for pair in all_pairs() if pair[1] in ("ring", "heart"))
    labels = [layout(0, SMALL, image, pairs).label for image in range(10)]
    assert Counter(labels) == {"ring": 5, "heart": 5}
    assert SceneSet(10, pairs=pairs).classes() == ["heart", "ring"]
    one = layout(0, SMALL, 0, frozenset({("red", "star")}))
    assert [(thing.colour, thing.shape) for thing in one.objects] == [("red", "star")]


# --- captions --------------------------------------------------------------------------------------------------------


def thing(shape: str, colour: str, x: float, y: float, radius: float, **others: Any) -> ObjectSpec:
    size = "large" if radius > 40 else "small"
    words = {"texture": "plain", "angle": 0.0, "shade": 1.0, "gloss": 0.0, **others}
    return ObjectSpec(shape=shape, colour=colour, size=size, x=x, y=y, radius=radius, **words)


def scene_of(*objects: ObjectSpec, main: int, ground: str = "sand", **others: Any) -> SceneSpec:
    base = layout(0, IMAGENET, 0)
    return replace(base, width=300, height=200, objects=objects, main=main, ground=ground, **others)


def test_captions_say_what_is_where() -> None:
    square = thing("square", "red", 150, 100, 60, texture="striped")
    disc = thing("circle", "blue", 190, 100, 20)
    assert caption(scene_of(square, main=0)) == "a large striped red square on sandy ground"
    behind = scene_of(square, disc, main=0)
    assert caption(behind) == "a large striped red square behind a small plain blue circle on sandy ground"
    front = scene_of(disc, square, main=1, ground="grass")
    assert caption(front) == "a large striped red square in front of a small plain blue circle on grass"
    for x, y, words in (
        (40, 100, "to the right of"),
        (260, 110, "to the left of"),
        (140, 190, "above"),
        (160, 10, "below"),
    ):
        scene = scene_of(square, replace(disc, x=x, y=y, radius=15.0), main=0)
        assert caption(scene) == f"a large striped red square {words} a small plain blue circle on sandy ground"
    crowd = scene_of(
        thing("star", "pink", 150, 60, 20),
        square,
        replace(disc, x=20.0),
        thing("ring", "white", 270, 90, 20),
        main=1,
    )
    assert caption(crowd) == (
        "a large striped red square in front of a small plain pink star, with a small plain blue circle to its left "
        "and a small plain white ring to its right, on sandy ground"
    )


def test_captions_name_every_object_and_the_ground() -> None:
    for image in range(100):
        scene = layout(9, IMAGENET, image)
        text = caption(scene)
        assert text.startswith(name(scene.objects[scene.main]))
        assert text.endswith(GROUNDS[scene.ground].phrase)
        for item in scene.objects:
            assert f"{item.texture} {item.colour} {item.shape}" in text
        assert sum(text.count(f" {shape}") for shape in SHAPES) == len(scene.objects)


# --- drawing ---------------------------------------------------------------------------------------------------------


def reference_instance(scene: SceneSpec, x: float, y: float) -> int:
    """Number (from 1) of the front-most object that covers a point; 0 for the ground."""
    for number in reversed(range(len(scene.objects))):
        item = scene.objects[number]
        right, down = (x - item.x) / item.radius, (y - item.y) / item.radius
        c, s = math.cos(-item.angle), math.sin(-item.angle)
        if is_inside(item.shape, right * c - down * s, right * s + down * c):
            return number + 1
    return 0


def test_masks_show_what_lies_in_front() -> None:
    rng = np.random.default_rng()
    seen, overlaps = set(), 0
    for image in range(40):
        scene = layout(5, IMAGENET if image % 4 == 0 else SMALL, image)
        drawing = draw(scene)
        assert drawing.image_HWC.shape == (scene.height, scene.width, 3)
        assert drawing.mask_HW.shape == drawing.instance_HW.shape == (scene.height, scene.width)
        columns, rows = rng.integers(scene.width, size=300), rng.integers(scene.height, size=300)
        wrong = 0
        for column, row in zip(columns.tolist(), rows.tolist(), strict=True):
            expected = reference_instance(scene, column + 0.5, row + 0.5)
            wrong += drawing.instance_HW[row, column] != expected
        assert wrong <= 1, "one point may lie on an edge, within rounding"
        for number, item in enumerate(scene.objects, start=1):
            assert (drawing.mask_HW[drawing.instance_HW == number] == MASK_VALUES[item.shape]).all()
        assert not drawing.mask_HW[drawing.instance_HW == 0].any()
        overlaps += any(
            relation(scene, k) in ("behind", "in front") for k in range(len(scene.objects)) if k != scene.main
        )
        seen |= {item.shape for item in scene.objects}
    assert seen == set(SHAPES)
    assert overlaps > 5


def test_enough_of_every_object_shows() -> None:
    for image in range(60):
        scene = layout(6, SMALL, image)
        instance_HW = draw(scene).instance_HW
        for number, item in enumerate(scene.objects, start=1):
            alone = draw(replace(scene, objects=(item,), main=0)).instance_HW.sum()
            shown = (instance_HW == number).sum() / alone
            assert shown >= (0.66 if number - 1 == scene.main else 0.42)


def test_boxes_frame_what_shows() -> None:
    square, disc = thing("square", "red", 100, 100, 60), thing("circle", "blue", 150, 100, 30)
    drawing = draw(scene_of(disc, square, main=1))
    half = 60 / math.sqrt(2)
    (left, top, right, bottom), box = drawing.boxes()
    assert box == (round(100 - half), round(100 - half), round(100 + half), round(100 + half))
    assert (right, top, bottom) == (180, 70, 130)
    assert left == box[2], "the part of the disc that the square hides is outside the disc's box"


@pytest.mark.parametrize("colour", COLOURS)
def test_objects_have_the_colour_that_they_are_called(colour: str) -> None:
    scene = scene_of(thing("square", colour, 150, 100, 70), main=0, ground="stone")
    drawing = draw(scene)
    mean = drawing.image_HWC[drawing.mask_HW > 0].mean(axis=0)
    distance = {word: float(np.linalg.norm(mean - paint.base)) for word, paint in COLOURS.items()}
    assert min(distance, key=lambda word: distance[word]) == colour


def test_light_and_shadow() -> None:
    """Lit from the right, the rim is bright on the right and the shadow falls to the left."""
    scene = scene_of(thing("circle", "orange", 150, 100, 70), main=0, ground="snow", light=0.0, grain=0.5)
    image = draw(scene).image_HWC.astype(float).mean(axis=2)
    assert image[80:120, 206:216].mean() > image[80:120, 84:94].mean() + 30
    assert image[80:120, 74:79].mean() < image[80:120, 222:227].mean() - 30


def test_grain_is_the_noise_between_neighbours() -> None:
    base = scene_of(thing("circle", "black", 60, 60, 50), main=0, ground="snow", relief=0.0)
    for grain in (2.0, 8.0):
        image = draw(replace(base, grain=grain)).image_HWC[40:160, 150:250].astype(float)
        image -= image.mean(axis=(0, 1))
        assert np.diff(image, axis=1).std() / math.sqrt(2) == pytest.approx(grain, rel=0.1)


def test_files_are_encoded_as_the_scene_says() -> None:
    scene = layout(0, IMAGENET, 0)
    drawing = draw(scene)
    for full_chroma in (False, True):
        for progressive in (False, True):
            spec = replace(scene, full_chroma=full_chroma, progressive=progressive, quality=93)
            with Image.open(io.BytesIO(encode_image(drawing, spec))) as picture:
                assert picture.format == "JPEG"
                assert picture.mode == "RGB"
                assert JpegImagePlugin.get_sampling(picture) == (0 if full_chroma else 2)
                assert bool(picture.info.get("progressive")) == progressive
                loss = np.abs(np.asarray(picture).astype(int) - drawing.image_HWC).mean()
                assert loss < (4 if full_chroma else 8)
    with Image.open(io.BytesIO(encode_mask(drawing))) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), drawing.mask_HW)
        palette = np.reshape(picture.getpalette(), (-1, 3))[: len(MASK_PALETTE)]
        np.testing.assert_array_equal(palette, MASK_PALETTE)


def test_imagenet_profile_has_natural_statistics() -> None:
    """On 100 images: 110 KB a file, and the spectrum of photographs (Field 1987: a power slope of about -2)."""
    sizes, slopes = [], []
    for image in range(100):
        scene = layout(11, IMAGENET, image)
        drawing = draw(scene)
        sizes.append(len(encode_image(drawing, scene)))
        side = min(scene.width, scene.height)
        window = np.hanning(side)[:, None] * np.hanning(side)[None, :]
        luma = drawing.image_HWC[:side, :side] @ np.array([0.299, 0.587, 0.114])
        slopes.append(spectrum_slope((luma - luma.mean()) * window, 4 / side, 0.4))
    assert np.mean(sizes) == pytest.approx(110_000, rel=0.1)
    assert -3 < np.mean(slopes) < -1.3
    assert np.mean([-3.4 < slope < -1.2 for slope in slopes]) == 1


# --- sets ------------------------------------------------------------------------------------------------------------


def digests(root: Path) -> dict[str, str]:
    """Of every file in the folder."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 small scenes of seed 5, drawn by this process; read only."""
    root = tmp_path_factory.mktemp("set") / "made" / "on the way"
    calls: list[int] = []
    report = write_set(root, SceneSet(70, "small", 5), workers=1, progress=calls.append)
    assert calls == [16, 32, 48, 64, 70]
    assert (report.drawn, report.images, report.folder) == (70, 70, root)
    return root


def test_a_set_is_what_its_documentation_says(small_set: Path) -> None:
    manifest = json.loads((small_set / "scenes.json").read_text())
    assert (manifest["profile"], manifest["seed"], manifest["images"], manifest["version"]) == ("small", 5, 70, 1)
    assert manifest["classes"] == list(SHAPES)
    assert manifest["mask_legend"] == {"0": "ground", **{str(k): shape for k, shape in enumerate(SHAPES, 1)}}
    assert manifest["held_out_pairs"] == []
    assert {path.name for path in small_set.iterdir()} == {*SHAPES, "masks", "scenes.json", "scenes.parquet"}

    rows = pq.read_table(small_set / "scenes.parquet").to_pylist()
    assert len(rows) == 70
    assert Counter(row["class"] for row in rows) == dict.fromkeys(SHAPES, 7)
    assert {f"{row['key']}.jpg" for row in rows} == {str(p.relative_to(small_set)) for p in small_set.rglob("*.jpg")}
    for number, row in enumerate(rows):
        scene = layout(5, SMALL, number)
        drawing = draw(scene)
        assert row["key"] == f"{scene.label}/{number:06d}"
        assert row["caption"] == caption(scene)
        assert row["class"] == scene.label == manifest["classes"][row["label"]]
        assert row["ground"] == scene.ground
        assert row["main"] == scene.main
        fields = ("shape", "colour", "texture", "size")
        assert [[item[f] for f in fields] for item in row["objects"]] == [
            [getattr(item, f) for f in fields] for item in scene.objects
        ]
        assert [tuple(item["box"]) for item in row["objects"]] == drawing.boxes()
        with (
            Image.open(small_set / f"{row['key']}.jpg") as image,
            Image.open(small_set / "masks" / f"{row['key']}.png") as mask,
        ):
            assert image.size == mask.size == (row["width"], row["height"])
            np.testing.assert_array_equal(np.asarray(mask), drawing.mask_HW)
        assert (small_set / f"{row['key']}.jpg").read_bytes() == encode_image(drawing, scene)
        assert row["bytes"] == (small_set / f"{row['key']}.jpg").stat().st_size
    assert manifest["bytes"] == sum(row["bytes"] for row in rows)


def test_files_do_not_depend_on_workers_or_on_the_number_of_images(small_set: Path, tmp_path: Path) -> None:
    pids: set[int] = set()

    def watch(done: int) -> None:
        pids.update(child.pid for child in workers_of(psutil.Process()))

    write_set(tmp_path / "two", SceneSet(70, "small", 5), workers=2, progress=watch)
    assert len(pids) == 2
    assert digests(tmp_path / "two") == digests(small_set)
    write_set(tmp_path / "fewer", SceneSet(37, "small", 5), workers=1)
    fewer = {path: digest for path, digest in digests(tmp_path / "fewer").items() if path[:6] != "scenes"}
    assert len(fewer) == 74
    assert fewer.items() <= digests(small_set).items()


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that it spawned to draw; the resource tracker is none."""
    found = []
    for child in process.children():
        try:
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has ended
            continue
    return found


def test_a_complete_set_is_left_alone(small_set: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    report = write_set(small_set, SceneSet(70, "small", 5))
    assert report.drawn == 0
    assert report.bytes == json.loads((small_set / "scenes.json").read_text())["bytes"]
    assert before == {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (SceneSet(71, "small", 5), "images 71"),
        (SceneSet(70, "small", 6), "seed 6"),
        (SceneSet(70, "imagenet", 5), "profile imagenet"),
        (SceneSet(70, "small", 5, all_pairs() - {("red", "star")}), "held_out_pairs"),
    ],
)
def test_another_set_is_never_mixed_in(small_set: Path, other: SceneSet, says: str) -> None:
    before = digests(small_set)
    with pytest.raises(DataError, match=f"profile small, seed 5, images 70.*{says}.*another --out"):
        write_set(small_set, other)
    assert digests(small_set) == before


def test_foreign_files_are_never_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        write_set(tmp_path, SceneSet(1, "small"))
    assert digests(tmp_path).keys() == {"holiday.jpg"}
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").touch()
    assert write_set(empty, SceneSet(1, "small"), workers=1).drawn == 1


def test_a_set_with_missing_files_is_drawn_again(small_set: Path, tmp_path: Path) -> None:
    asked = SceneSet(20, "small", 5)
    write_set(tmp_path / "set", asked, workers=1)
    whole = digests(tmp_path / "set")
    lost = sorted((tmp_path / "set" / "masks").rglob("*.png"))[3]
    lost.unlink()
    assert write_set(tmp_path / "set", asked, workers=1).drawn == 20
    assert digests(tmp_path / "set") == whole


def test_a_broken_manifest_is_said(tmp_path: Path) -> None:
    (tmp_path / "scenes.json").write_text("{")
    with pytest.raises(DataError, match=r"scenes\.json"):
        write_set(tmp_path, SceneSet(1, "small"))


def test_a_killed_run_is_taken_up_where_it_was(tmp_path: Path) -> None:
    """SIGKILL in the middle: its workers end too, another set is refused, the same set goes on."""
    root, asked = tmp_path / "set", SceneSet(480, "small", 8)
    command = [sys.executable, "-m", "mvp_fast", "data", "scenes", "--out", str(root), "--images", "480"]
    run = subprocess.Popen([*command, "--profile", "small", "--seed", "8", "--workers", "2"])
    while not list(root.glob("scenes.partial/*.jsonl")):
        assert run.poll() is None
        time.sleep(0.01)
    workers = workers_of(psutil.Process(run.pid))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not (root / "scenes.json").exists()

    with pytest.raises(DataError, match=r"unfinished set with profile small, seed 8, images 480.*seed 7"):
        write_set(root, SceneSet(480, "small", 7))
    # A chunk whose files were lost with the machine is drawn again.
    done = sorted(root.glob("scenes.partial/*.jsonl"))
    broken = json.loads(done[0].read_text().splitlines()[0])["key"]
    (root / f"{broken}.jpg").write_bytes(b"")
    report = write_set(root, asked, workers=2)
    assert report.drawn == 480 - 16 * (len(done) - 1)
    assert not (root / "scenes.partial").exists()
    rows = pq.read_table(root / "scenes.parquet").to_pylist()
    assert [int(row["key"][-6:]) for row in rows] == list(range(480))
    for number in range(0, 480, 7):
        scene = layout(8, SMALL, number)
        assert (root / f"{rows[number]['key']}.jpg").read_bytes() == encode_image(draw(scene), scene)
    assert (root / f"{broken}.jpg").stat().st_size > 0


def test_a_killed_worker_is_said(tmp_path: Path) -> None:
    def kill(done: int) -> None:
        for worker in workers_of(psutil.Process()):
            worker.kill()

    asked = SceneSet(320, "small", 1)
    with pytest.raises(EnvironmentProblem, match=r"was killed.*fewer --workers"):
        write_set(tmp_path, asked, workers=2, progress=kill)
    assert write_set(tmp_path, asked, workers=1).images == 320


def test_two_runs_do_not_draw_into_one_folder(tmp_path: Path) -> None:
    asked = SceneSet(1, "small")
    (tmp_path / "scenes.partial").mkdir()
    with open(tmp_path / "scenes.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process draws"):
            write_set(tmp_path, asked)
    assert write_set(tmp_path, asked, workers=1).drawn == 1


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "scenes.partial").mkdir()
    (tmp_path / "scenes.partial" / f"{os.getpid()}.tmp").symlink_to("/dev/full")  # writing to it fails for lack of room
    with pytest.raises(EnvironmentProblem, match=r"the disk is full.*Make room"):
        write_set(tmp_path, SceneSet(1, "small"), workers=1)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EnvironmentProblem, match="not a directory"):
            write_set(out, SceneSet(1, "small"))


@pytest.mark.parametrize(
    ("asked", "workers", "says"),
    [
        (SceneSet(0), 1, "--images"),
        (SceneSet(1, seed=-1), 1, "--seed"),
        (SceneSet(1, seed=1 << 64), 1, "--seed"),
        (SceneSet(1), -1, "--workers"),
        (SceneSet(1, "large"), 1, "imagenet, small"),
        (SceneSet(1, pairs=frozenset()), 1, "hold out fewer"),
        (SceneSet(1, pairs=frozenset({("square", "red")})), 1, "'square' 'red'"),
    ],
)
def test_sets_that_do_not_exist(tmp_path: Path, asked: SceneSet, workers: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        write_set(tmp_path / "set", asked, workers)
    assert not (tmp_path / "set").exists()


# --- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_draws_says_what_it_did_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "scenes", "--out", str(tmp_path / "set"), "--images", "12", "--profile", "small"]
    assert main([*command, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "drew     12 images" in shown.out
    assert f"next     mvp-fast data index {tmp_path / 'set'}" in shown.out
    assert shown.err == "", "no progress bar where there is no terminal"
    assert main([*command, "--workers", "1"]) == 0
    assert "The set is complete" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == DataError.exit_code
    assert "data error: the folder holds a set" in capsys.readouterr().err
    assert main(["data", "scenes", "--out", "/dev/null/x", "--images", "1"]) == EnvironmentProblem.exit_code
    assert main(["data", "scenes", "--out", str(tmp_path / "no"), "--images", "-3"]) == ConfigError.exit_code


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    read, write = os.openpty()
    command = [sys.executable, "-m", "mvp_fast", "data", "scenes", "--out", str(tmp_path), "--images", "40"]
    run = subprocess.Popen(
        [*command, "--profile", "small", "--workers", "1"],
        stderr=write,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(write)
    shown = b""
    try:
        while part := os.read(read, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(read)
    assert run.wait() == 0
    assert b"drawing scenes" in shown


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom mvp_fast.cli.main import main\n"
        "try:\n    main(['data', 'scenes', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'PIL', 'torch', 'pyarrow', 'rich.progress'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--workers" in done.stdout
    assert done.stderr.strip() == "[]"


def test_plain_scenes_keep_to_their_profile() -> None:
    plain, seen = PROFILES["plain"], set()
    for number in range(300):
        scene = layout(3, plain, number)
        main = scene.objects[scene.main]
        seen |= {("ground", scene.ground), ("objects", len(scene.objects)), ("main", main.size)}
        for thing in scene.objects:
            seen.add(("texture", thing.texture))
            assert abs(thing.angle) <= math.radians(0.3 * TILTS[thing.shape]) + 1e-9
    assert seen == {
        *(("ground", ground) for ground in ("cloth", "stone", "tiles")),
        *(("objects", count) for count in (1, 2)),
        *(("main", size) for size in ("medium", "large")),
        ("texture", "plain"),
    }
