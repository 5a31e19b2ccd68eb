"""One suite for every backend: the plan's samples, boxes, flips and masks, the reference's pixels, and nothing left.

Shape legend: B images, H and W pixels, C channels, N patches, M masked patches.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mvp_fast.config.check import check_config
from mvp_fast.config.schema import Config, DataConfig, MaskConfig
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.loaders import dali_pipeline
from mvp_fast.loaders.base import Batch, Loader
from mvp_fast.loaders.cpu import CpuLoader
from mvp_fast.loaders.registry import LOADERS, describe, make_loader, resolve
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from tests.betons import make_beton, needs_ffcv
from tests.conftest import REPO

DECODING = ("torchvision", "dali", "cpu")
FAST = DECODING[1:]  # held against the first, the reference
ON_GPU = pytest.param("dali:gpu", marks=pytest.mark.gpu)  # decodes there, and leaves its batches there
FFCV = pytest.param("ffcv", marks=needs_ffcv)
EVERY = [*(FFCV if name == "ffcv" else name for name in LOADERS), ON_GPU]
SIDE, BATCH = 64, 8
# Greatest distance to the reference in levels of 255: a batch's mean, and a single value. Measured over all boxes
# below, on images with noise as in photos: `dali` up to 0.31 and 5 (Pillow rounds to 8 bits between the two passes of
# a resize), `cpu` 0.08 and 2.
MEAN_DISTANCE, MAX_DISTANCE = 0.4, 8
# On the GPU nvJPEG decodes with a transform of its own: held to what is allowed at all, not measured yet.
NEAR = {"dali": (MEAN_DISTANCE, MAX_DISTANCE), "cpu": (0.15, 3), "dali:gpu": (2.0, 64)}
# The same on black and white noise, where the cubic overshoots, and it matters what is clipped between the passes:
# `dali` up to 2.4 and 33, `cpu` 1.0 and 30; bilinear 0.4 and 20 at borders, 0.09 and 1.
HARSH = {
    ("dali", "bicubic"): (3.0, 48),
    ("dali", "bilinear"): (0.5, 32),
    ("cpu", "bicubic"): (1.3, 40),
    ("cpu", "bilinear"): (0.15, 3),
}


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colour with noise on it, as in a photo."""
    coarse_HWC = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth_HWC = np.asarray(Image.fromarray(coarse_HWC).resize((width, height), Image.Resampling.BICUBIC))
    noise_HWC = rng.integers(-12, 13, smooth_HWC.shape)
    return Image.fromarray((smooth_HWC.astype(int) + noise_HWC).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """40 plain JPEG files: chroma subsampled in every usual way, grey, progressive, restart markers, EXIF-rotated."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    for i in range(40):
        image = picture(rng, int(rng.integers(60, 200)), int(rng.integers(60, 200)))
        options: dict[str, Any] = {
            "quality": int(rng.integers(60, 96)),
            "subsampling": i % 3,
            "progressive": i % 5 == 0,
        }
        if i % 7 == 3:
            image = image.convert("L")
        if i % 7 == 5:
            options["restart_marker_rows"] = 1
        if i % 4 == 2:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6  # rotate by 90 degrees, which no backend must do
        (folder / f"{i:02}.jpg").write_bytes(encode(image, **options))
    build_index(folder)
    return Index.open(folder)


@pytest.fixture(scope="module")
def beton(photos: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The photos in a beton, about half of them raw, some shrunk."""
    return make_beton(photos, tmp_path_factory.mktemp("beton"))


@pytest.fixture
def images(request: pytest.FixtureRequest, photos: Index) -> Index:
    """The photos in the form that the backend `name` reads."""
    name: str = request.node.callspec.params["name"]
    found: Index = request.getfixturevalue("beton") if name == "ffcv" else photos
    return found


@pytest.fixture(scope="module")
def harsh(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Black and white noise, grey and in each colour by itself: nothing is harder on a resize."""
    folder = tmp_path_factory.mktemp("harsh")
    rng = np.random.default_rng(9)
    for i in range(16):
        noise_HWC = 255 * rng.integers(0, 2, (*rng.integers(60, 150, 2), 3 if i % 2 else 1), dtype=np.uint8)
        image = Image.fromarray(np.broadcast_to(noise_HWC, (*noise_HWC.shape[:2], 3)))
        (folder / f"{i:02}.jpg").write_bytes(encode(image, quality=95, subsampling=i % 3))
    build_index(folder)
    return Index.open(folder)


@pytest.fixture(scope="module")
def oddities(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Images that are no plain JPEG, most of them under the wrong name, as in ImageNet."""
    folder = tmp_path_factory.mktemp("oddities")
    rng = np.random.default_rng(8)
    image = picture(rng, 90, 70)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (70, 90), dtype=np.uint8)))
    grey16 = Image.fromarray(rng.integers(0, 65536, (70, 90), dtype=np.uint16))
    files = {
        "cmyk": encode(image.convert("CMYK")),
        "png": encode(image, "PNG"),
        "alpha": encode(alpha, "PNG"),
        "palette": encode(image.convert("P"), "PNG"),
        "one_bit": encode(image.convert("1"), "PNG"),
        "grey16": encode(grey16, "PNG"),
        "gif": encode(image, "GIF"),
        "webp": encode(image, "WEBP", quality=90),
        "bmp": encode(image, "BMP"),
    }
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    build_index(folder)
    assert len(Index.open(folder)) == len(files)
    return Index.open(folder)


def make_plan(index: Index, *, batch_size: int = BATCH, rank: int = 0, world: int = 1, **data: Any) -> SamplePlan:
    settings = DataConfig(image_size=SIDE, crop_scale=(0.08, 1.0), **data)
    mask = MaskConfig(patches=6, min_block=2)
    return SamplePlan(index, seed=11, batch_size=batch_size, data=settings, mask=mask, rank=rank, world=world)


class ForcedPlan(SamplePlan):
    """A plan whose boxes and flips are set by the test."""

    boxes = "plan"
    flip: bool | None = None
    fixed: PlanRows | None = None

    def step(self, k: int) -> PlanRows:
        if self.fixed is not None:
            return self.fixed
        rows = super().step(k)
        width_B, height_B = self.index.width[rows.sample_B], self.index.height[rows.sample_B]
        zero_B, one_B = np.zeros_like(width_B), np.ones_like(width_B)
        boxes = {
            "plan": (rows.x_B, rows.y_B, rows.width_B, rows.height_B),
            "whole": (zero_B, zero_B, width_B, height_B),
            "thin": (width_B // 2, zero_B + 3, one_B, height_B - 7),
            "flat": (zero_B + 5, height_B // 3, width_B - 9, one_B),
            "pixel": (width_B - 1, height_B - 1, one_B, one_B),
            "upscaled": (width_B // 3, height_B // 2, one_B * 11, one_B * 7),
        }[self.boxes]
        names = ("x_B", "y_B", "width_B", "height_B")
        columns: dict[str, Any] = {name: np.ascontiguousarray(box) for name, box in zip(names, boxes, strict=True)}
        if self.flip is not None:
            columns["flip_B"] = np.full(len(rows), self.flip)
        return dataclasses.replace(rows, **columns)


def forced(index: Index, boxes: str = "plan", flip: bool | None = None) -> ForcedPlan:
    plan = ForcedPlan(
        index, seed=11, batch_size=BATCH, data=DataConfig(image_size=SIDE), mask=MaskConfig(patches=6, min_block=2)
    )
    plan.boxes, plan.flip = boxes, flip
    return plan


def loader_for(name: str, **data: Any) -> Loader:
    backend, _, gpu = name.partition(":")
    if backend == "ffcv":
        data["interpolation"] = "area"
    return make_loader(backend, DataConfig(threads=2, **data), device="cuda" if gpu else "cpu")


def take(name: str, plan: SamplePlan, start: int, count: int, **data: Any) -> list[Batch]:
    """`count` batches from step `start`, by a loader of their own; moved to the CPU where they are not there."""
    loader = loader_for(name, **data)
    try:
        batches = list(islice(loader.batches(plan, start), count))
    finally:
        loader.close()
    assert all(batch.images_BHWC.is_cuda == name.endswith(":gpu") for batch in batches)
    return [dataclasses.replace(batch, images_BHWC=batch.images_BHWC.cpu()) for batch in batches]


def assert_same_pixels(name: str, a_BHWC: torch.Tensor, b_BHWC: torch.Tensor) -> None:
    """Equal bits; on the GPU, where it depends on the batch which of nvJPEG's decoders gets an image, near."""
    if name.endswith(":gpu"):
        assert (a_BHWC.int() - b_BHWC.int()).float().abs().mean() <= NEAR[name][0]
    else:
        assert torch.equal(a_BHWC, b_BHWC)


def assert_rows_equal(a: PlanRows, b: PlanRows) -> None:
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def distances(a: Batch, b: Batch) -> np.ndarray:
    return np.abs(a.images_BHWC.numpy().astype(int) - b.images_BHWC.numpy().astype(int))


# --- A slow, obvious resize in float64, to hold the reference against


def kernel(x: np.ndarray, interpolation: str) -> np.ndarray:
    """The filters' formulas: a triangle, and Keys' cubic with a = -0.5."""
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(0, 1 - x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(source: int, target: int, interpolation: str) -> np.ndarray:
    """Antialiased: the filter is stretched by the scale where it shrinks. (target, source), rows sum to 1."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale
    taps = kernel((np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1), interpolation)
    return taps / taps.sum(axis=1, keepdims=True)


def slow_crop(index: Index, rows: PlanRows, i: int, interpolation: str) -> np.ndarray:
    image_HWC = np.asarray(Image.open(index.file(int(rows.sample_B[i]))).convert("RGB")).astype(float)
    x, y, width, height = (int(c[i]) for c in (rows.x_B, rows.y_B, rows.width_B, rows.height_B))
    box_HWC = image_HWC[y : y + height, x : x + width]
    down, across = weights(height, SIDE, interpolation), weights(width, SIDE, interpolation)
    out_HWC = np.einsum("th,hwc,sw->tsc", down, box_HWC, across, optimize=True).clip(0, 255)
    return out_HWC[:, ::-1] if rows.flip_B[i] else out_HWC


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("boxes", ["plan", "whole", "thin", "flat", "pixel", "upscaled"])
def test_the_reference_is_an_antialiased_resize_of_the_box(photos: Index, interpolation: str, boxes: str) -> None:
    (batch,) = take("torchvision", forced(photos, boxes), 2, 1, interpolation=interpolation)
    for i in range(BATCH):
        expected_HWC = slow_crop(photos, batch.rows, i, interpolation)
        # Two roundings to 8 bits, and clipping between the passes where the cubic overshoots.
        difference = np.abs(batch.images_BHWC[i].numpy() - expected_HWC)
        assert difference.max() < 2
        assert difference.mean() < 0.4


# --- Every backend


@pytest.mark.parametrize("name", EVERY)
def test_batches_are_what_the_plan_says(images: Index, name: str) -> None:
    plan = make_plan(images)
    for k, batch in enumerate(take(name, plan, 3, 4), start=3):
        rows = plan.step(k)
        assert batch.step == k
        assert_rows_equal(batch.rows, rows)
        assert batch.images_BHWC.shape == (BATCH, SIDE, SIDE, 3)
        assert batch.images_BHWC.dtype == torch.uint8
        assert batch.images_BHWC.is_contiguous()
        assert batch.masked_BM.dtype == torch.int64
        np.testing.assert_array_equal(batch.masked_BM.numpy(), rows.masked_BM())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("boxes", ["plan", "whole", "thin", "flat", "pixel", "upscaled"])
@pytest.mark.parametrize("name", [*FAST, ON_GPU])
def test_the_pixels_are_the_references(photos: Index, name: str, interpolation: str, boxes: str) -> None:
    plan = forced(photos, boxes)
    pairs = zip(*(take(each, plan, 0, 3, interpolation=interpolation) for each in ("torchvision", name)), strict=True)
    mean, most = NEAR[name]
    everything = []
    for reference, fast in pairs:
        difference = distances(reference, fast)
        assert difference.mean() <= mean
        assert difference.max() <= most
        everything.append(difference)
    if boxes in ("plan", "whole"):  # it was not Pillow that made them
        assert np.concatenate(everything).max() > 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("boxes", ["plan", "whole", "upscaled"])
@pytest.mark.parametrize("name", FAST)
def test_they_are_near_the_references_on_noise_too(harsh: Index, name: str, interpolation: str, boxes: str) -> None:
    plan, (mean, most) = forced(harsh, boxes), HARSH[name, interpolation]
    pairs = zip(*(take(n, plan, 0, 2, interpolation=interpolation) for n in ("torchvision", name)), strict=True)
    for reference, fast in pairs:
        difference = distances(reference, fast)
        assert difference.mean() <= mean
        assert difference.max() <= most


@pytest.mark.parametrize("name", FAST)
def test_a_box_is_decoded_to_the_bits_that_pillow_decodes(photos: Index, name: str) -> None:
    """Boxes of the crop's size, so that nothing is resized: what remains is the decoder."""
    plan = forced(photos)
    rows = plan.step(0)
    fits = (photos.width > SIDE) & (photos.height > SIDE)
    rng = np.random.default_rng(1)
    sample_B = rng.choice(np.nonzero(fits)[0], BATCH)
    columns = {
        "sample_B": sample_B,
        "x_B": rng.integers(0, photos.width[sample_B] - SIDE + 1).astype(np.int32),
        "y_B": rng.integers(0, photos.height[sample_B] - SIDE + 1).astype(np.int32),
        "width_B": np.full(BATCH, SIDE, np.int32),
        "height_B": np.full(BATCH, SIDE, np.int32),
    }
    plan.fixed = dataclasses.replace(rows, **columns)
    (reference,), (fast,) = (take(each, plan, 0, 1) for each in ("torchvision", name))
    assert torch.equal(reference.images_BHWC, fast.images_BHWC)


def test_the_filters_differ_by_more_than_the_backends_do(photos: Index) -> None:
    plan = forced(photos, "upscaled")
    for name in DECODING:
        cubic, linear = (take(name, plan, 0, 1, interpolation=i)[0] for i in ("bicubic", "bilinear"))
        assert distances(cubic, linear).mean() > 1.5 * MEAN_DISTANCE


@pytest.mark.parametrize("name", [*DECODING, FFCV])
def test_flips_are_mirror_images(images: Index, name: str) -> None:
    (straight,), (flipped,), (mixed,) = (take(name, forced(images, flip=flip), 1, 1) for flip in (False, True, None))
    mirrored_BHWC = straight.images_BHWC.flip(2)
    assert not torch.equal(mirrored_BHWC, straight.images_BHWC)
    # Resize and flip commute but for the order of the resize's sums.
    assert (mirrored_BHWC.int() - flipped.images_BHWC.int()).abs().max() <= 1
    flip_B = torch.from_numpy(mixed.rows.flip_B)
    assert 0 < flip_B.sum() < BATCH
    expected_BHWC = torch.where(flip_B[:, None, None, None], flipped.images_BHWC, straight.images_BHWC)
    assert torch.equal(mixed.images_BHWC, expected_BHWC)


@pytest.mark.parametrize("name", [*FAST, ON_GPU])
def test_unusual_formats_are_left_to_pillow(oddities: Index, name: str) -> None:
    """Bitwise equal: the reference's own pixels, on the right rows, beside none of the fast decoder's."""
    plan = make_plan(oddities)
    for reference, fast in zip(*(take(each, plan, 0, 3) for each in ("torchvision", name)), strict=True):
        assert_rows_equal(reference.rows, fast.rows)
        assert torch.equal(reference.images_BHWC, fast.images_BHWC)
        assert reference.images_BHWC.float().std() > 10


def test_sixteen_bit_grey_keeps_its_upper_bits(oddities: Index) -> None:
    (sample,) = (i for i in range(len(oddities)) if oddities.key(i) == "grey16.jpg")
    expected_HW = np.asarray(Image.open(oddities.file(sample))).astype(float) / 256
    plan = make_plan(oddities)
    rows = plan.rows(0, 0)
    columns = {"x_B": 10, "y_B": 3, "width_B": SIDE, "height_B": SIDE, "flip_B": False, "sample_B": sample}
    row = dataclasses.replace(
        rows, **{name: np.full(1, value, getattr(rows, name).dtype) for name, value in columns.items()}
    )
    from mvp_fast.loaders.torchvision import carry_out

    image_HWC = carry_out(oddities, row, SIDE, "bilinear").image_HWC  # a box of the crop's size: nothing is resized
    assert np.abs(image_HWC - expected_HW[3 : 3 + SIDE, 10 : 10 + SIDE, None]).max() <= 1


@pytest.mark.parametrize("name", EVERY)
def test_resuming_at_any_step_gives_the_same_bits(images: Index, name: str) -> None:
    plan = make_plan(images)
    whole = take(name, plan, 0, 8)  # 64 samples of 40: past the end of the epoch
    for start in (1, 4, 7):
        for batch in take(name, plan, start, 8 - start):
            assert_rows_equal(batch.rows, whole[batch.step].rows)
            assert_same_pixels(name, batch.images_BHWC, whole[batch.step].images_BHWC)
            assert torch.equal(batch.masked_BM, whole[batch.step].masked_BM)


@pytest.mark.parametrize("name", [*DECODING, FFCV, ON_GPU])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_give_the_same_bits_as_one(images: Index, name: str, world: int) -> None:
    whole = take(name, make_plan(images), 4, 2)
    parts = [take(name, make_plan(images, rank=rank, world=world), 4, 2) for rank in range(world)]
    for k, batch in enumerate(whole):
        assert_same_pixels(name, batch.images_BHWC, torch.cat([part[k].images_BHWC for part in parts]))
        assert torch.equal(batch.masked_BM, torch.cat([part[k].masked_BM for part in parts]))
        np.testing.assert_array_equal(batch.rows.sample_B, np.concatenate([part[k].rows.sample_B for part in parts]))


@pytest.mark.parametrize("name", [*DECODING, FFCV, ON_GPU])
def test_batches_stay_as_they_are_while_later_ones_are_made(images: Index, name: str) -> None:
    loader = loader_for(name)
    try:
        batches = loader.batches(make_plan(images), 0)
        first = next(batches)
        copy = first.images_BHWC.clone()
        for _ in islice(batches, 6):
            pass
    finally:
        loader.close()
    assert torch.equal(first.images_BHWC, copy)


@pytest.mark.parametrize("name", [*DECODING, FFCV, ON_GPU])
def test_a_loader_can_be_used_again(images: Index, name: str) -> None:
    plan = make_plan(images)
    loader = loader_for(name)
    once = next(iter(loader.batches(plan, 2)))
    loader.close()
    again = next(iter(loader.batches(plan, 2)))
    loader.close()
    loader.close()
    assert_same_pixels(name, once.images_BHWC, again.images_BHWC)


@pytest.mark.parametrize("name", [*DECODING, FFCV, ON_GPU])
def test_stats_count_what_was_done(images: Index, name: str) -> None:
    loader = loader_for(name)
    for _ in islice(loader.batches(make_plan(images), 0), 5):
        pass
    stats = loader.stats()
    loader.close()
    resized = 0 if name.startswith("dali") else 5 * BATCH  # DALI books its resize under decode
    decoded = stats.items["decode"] if name == "ffcv" else 5 * BATCH  # about half of that set is stored raw
    assert 0 < decoded <= 5 * BATCH
    assert stats.items == {"read": 5 * BATCH, "decode": decoded, "transform": resized, "copy": 0}
    assert stats.seconds["read"] > 0
    assert stats.seconds["decode"] > 0
    assert (stats.seconds["transform"] > 0) == (resized > 0)
    assert stats.seconds["copy"] == 0


def test_threads_are_the_cores_divided_by_the_ranks() -> None:
    cores = len(os.sched_getaffinity(0))
    for name in DECODING:
        loader: Any = make_loader(name, DataConfig(), local_ranks=1)
        assert loader.threads == cores
        shared: Any = make_loader(name, DataConfig(), local_ranks=10 * cores)
        assert shared.threads == 1
        given: Any = make_loader(name, DataConfig(threads=5), local_ranks=3)
        assert given.threads == 5


# --- Repeated augmentation

DECODE_ONCE = ("torchvision", "dali")
"""Backends that decode an image once for all its crops in a row; the others need not."""


@pytest.mark.parametrize("repeat", [2, 4])
@pytest.mark.parametrize("kind", ["photos", "oddities"])
@pytest.mark.parametrize("name", DECODING)
def test_repeated_crops_are_those_of_single_decodes(
    request: pytest.FixtureRequest, kind: str, name: str, repeat: int
) -> None:
    """The slow way: the same rows, each decoded by itself."""
    index: Index = request.getfixturevalue(kind)
    plan, single = make_plan(index, repeat=repeat), forced(index)
    batches = take(name, plan, 1, 6)
    boxes = set()
    for batch in batches:
        rows = batch.rows
        assert_rows_equal(rows, plan.step(batch.step))
        assert (rows.sample_B.reshape(-1, repeat) == rows.sample_B[::repeat, None]).all()
        single.fixed = rows
        (expected,) = take(name, single, 0, 1)
        assert torch.equal(batch.images_BHWC, expected.images_BHWC)
        boxes |= {tuple(int(c[i]) for c in (rows.x_B, rows.y_B, rows.width_B, rows.height_B)) for i in range(BATCH)}
    assert len(boxes) > 0.8 * len(batches) * BATCH, "crops of an image differ"


@pytest.mark.parametrize("name", DECODING)
def test_repeated_crops_resume_and_divide_among_ranks(photos: Index, name: str) -> None:
    whole = take(name, make_plan(photos, repeat=2), 0, 5)
    (later,) = take(name, make_plan(photos, repeat=2), 3, 1)
    assert torch.equal(later.images_BHWC, whole[3].images_BHWC)
    for world in (2, 4):
        parts = [take(name, make_plan(photos, repeat=2, rank=rank, world=world), 3, 2) for rank in range(world)]
        for k in (0, 1):
            assert torch.equal(torch.cat([part[k].images_BHWC for part in parts]), whole[3 + k].images_BHWC)


@pytest.mark.parametrize("name", DECODE_ONCE)
def test_repeated_crops_take_one_decode(photos: Index, name: str) -> None:
    loader = loader_for(name)
    for _ in islice(loader.batches(make_plan(photos, repeat=4), 0), 5):
        pass
    stats = loader.stats()
    loader.close()
    resized = {"torchvision": 5 * BATCH, "dali": 0}[name]
    assert stats.items == {"read": 5 * BATCH // 4, "decode": 5 * BATCH // 4, "transform": resized, "copy": 0}


# --- Nothing is left behind


def left_over() -> dict[str, int]:
    gc.collect()
    tasks, process = len(os.listdir("/proc/self/task")), psutil.Process()
    return {"python threads": threading.active_count(), "threads": tasks, "files": process.num_fds()}


@pytest.mark.parametrize("ending", ["generator", "loader", "abandoned"])
@pytest.mark.parametrize("name", [*DECODING, FFCV])
def test_an_early_end_leaves_no_thread_and_no_file(images: Index, name: str, ending: str) -> None:
    plan = make_plan(images)

    def passage() -> None:
        loader = loader_for(name)
        batches: Iterator[Batch] = loader.batches(plan, 0)
        next(batches)
        assert threading.active_count() > 1  # it works in threads of its own
        if ending == "generator":
            batches.close()  # type: ignore[attr-defined]
        elif ending == "loader":
            loader.close()

    passage()  # warm-up: libraries start threads that they keep
    before = left_over()
    passage()
    assert left_over() == before


def what_twenty_epochs_leave(name: str, index: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Threads and files before and after, and bytes of memory more."""
    plan = SamplePlan(
        Index.open(index), seed=1, batch_size=64, data=DataConfig(image_size=224, threads=2), mask=MaskConfig()
    )
    loader = loader_for(name)

    def epochs(count: int) -> None:
        for epoch in range(count):
            batches = loader.batches(plan, epoch)
            next(batches)
            batches.close()  # type: ignore[attr-defined]

    epochs(4)
    before, memory = left_over(), psutil.Process().memory_info().rss
    epochs(20)
    after, grown = left_over(), psutil.Process().memory_info().rss - memory
    loader.close()
    return before, after, grown


@pytest.mark.parametrize("name", [*DECODING, FFCV])
def test_twenty_epochs_broken_off_early_leave_nothing(images: Index, name: str) -> None:
    """One pass in flight is 3 batches of 9.6 MB and their files: keeping any of it would show twentyfold.

    In a process of its own: the allocator of one that ran a thousand tests takes and gives back what it likes.
    """
    program = f"from {__name__} import *; print(json.dumps(what_twenty_epochs_leave({name!r}, {str(images.path)!r})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    before, after, grown = json.loads(done.stdout.splitlines()[-1])
    assert after == before
    assert grown < 100 * 2**20


# --- Synthetic


def test_synthetic_repeats_one_batch_and_needs_no_file() -> None:
    plan = make_plan(Index.synthetic(images=1000))
    first, second = take("synthetic", plan, 0, 2)
    assert first.images_BHWC.data_ptr() == second.images_BHWC.data_ptr()
    assert first.images_BHWC.float().std() > 50
    assert not torch.equal(first.masked_BM, second.masked_BM)
    (other,) = islice(make_loader("synthetic", DataConfig(), seed=1).batches(plan, 0), 1)
    assert not torch.equal(first.images_BHWC, other.images_BHWC)


# --- Registry


def test_an_unknown_loader_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no loader `dalli`.*`dali`"):
        make_loader("dalli", DataConfig())
    with pytest.raises(ConfigError, match="auto, dali, cpu, torchvision, ffcv, synthetic"):
        make_loader("zzz", DataConfig())


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("dali", "nvidia.dali", "nvidia-dali-cuda130"), ("cpu", "nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13")],
)
def test_without_its_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python's way to say that a module is not there
    with pytest.raises(EnvironmentProblem, match=package):
        make_loader(name, DataConfig())


def test_registry_and_configuration_name_the_same_loaders() -> None:
    import typing

    hints = typing.get_type_hints(DataConfig)
    assert set(typing.get_args(hints["loader"])) == {"auto", *LOADERS}


# --- What auto chooses, and where dali decodes


@pytest.mark.parametrize(
    ("decode", "device", "chosen", "words"),
    [
        ("auto", "cpu", "cpu", "cpu, chosen by auto"),
        ("cpu", "cpu", "cpu", "cpu, chosen by auto"),
        ("auto", "cuda:1", "dali", "dali on the GPU (hardware decoder load 0.65), chosen by auto"),
        ("gpu", "cuda", "dali", "dali on the GPU (hardware decoder load 0.65), chosen by auto"),
        ("cpu", "cuda", "cpu", "cpu, chosen by auto"),
    ],
)
def test_auto_takes_dali_where_it_decodes_on_the_gpu(decode: Any, device: str, chosen: str, words: str) -> None:
    assert resolve("auto", DataConfig(decode=decode), device) == chosen
    assert describe(DataConfig(decode=decode), device) == words


def test_a_backend_by_name_is_itself_and_dali_says_where_it_decodes() -> None:
    for name in LOADERS:
        assert resolve(name, DataConfig(), "cuda") == resolve(name, DataConfig(), "cpu") == name
    assert describe(DataConfig(loader="dali"), "cpu") == "dali on the CPU"
    assert describe(DataConfig(loader="dali", decode="cpu"), "cuda") == "dali on the CPU"
    settings = DataConfig(loader="dali", hw_decoder_load=0.9)
    assert describe(settings, "cuda") == "dali on the GPU (hardware decoder load 0.9)"
    assert describe(DataConfig(loader="torchvision"), "cuda") == "torchvision"


def test_auto_makes_the_loader_that_it_names(photos: Index) -> None:
    loader = make_loader("auto", DataConfig(threads=2))
    assert isinstance(loader, CpuLoader)
    loader.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["auto", "dali"])
def test_decoding_on_a_gpu_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match=r"there is no CUDA device.*Set data\.decode to auto or cpu") as caught:
        make_loader(name, DataConfig(decode="gpu"))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"decode": "gpu", "loader": "cpu"}, "data.decode is gpu, but data.loader cpu does not decode on the GPU"),
        ({"decode": "gpu", "loader": "torchvision"}, "Set data.loader to dali"),
        ({"hw_decoder_load": 1.1}, "data.hw-decoder-load is 1.1, but must be between 0 and 1"),
        ({"hw_decoder_load": float("nan")}, "must be between 0 and 1"),
    ],
)
def test_wrong_settings_of_decoding_are_told(data: dict[str, Any], says: str) -> None:
    check_config(Config(data=DataConfig(decode="gpu")))
    with pytest.raises(ConfigError) as caught:
        check_config(Config(data=DataConfig(**data)))
    assert says in str(caught.value)


def test_decoding_on_the_gpu_in_a_run_on_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="in a run on the CPU"):
        make_loader("dali", DataConfig(decode="gpu"), device="cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_what_dali_is_told_of_the_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    loader: Any = make_loader("dali", DataConfig(hw_decoder_load=0.9), device=device)
    where, told = dali_pipeline._decoder_of(loader.gpu)
    assert where == torch.device("cuda", 1 if device == "cuda:1" else 3)
    assert (told["device"], told["hw_decoder_load"]) == ("mixed", 0.9)
    assert told["preallocate_width_hint"] == told["preallocate_height_hint"] > 0
    on_cpu: Any = make_loader("dali", DataConfig(decode="cpu"), device=device)
    assert dali_pipeline._decoder_of(on_cpu.gpu) == (None, {"device": "cpu"})
