"""The fast path on the CPU by itself: damaged scans, sizes at which torch would start threads, files asked for ahead.

What all backends have in common is in test_loaders_conformance.py and test_loader_failures.py.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders import encoded, pooled
from mvp_fast.loaders.cpu import RegionCropper, resize_into
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import PlanRows, SamplePlan

BATCH = 4


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    coarse_HWC = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse_HWC).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("cpu")
    for i in range(24):
        (folder / f"{i:02}.jpg").write_bytes(encode(picture(i), quality=90))
    build_index(folder)
    return Index.open(folder)


def plan_for(index: Index, image_size: int = 32) -> SamplePlan:
    data = DataConfig(image_size=image_size, threads=2)
    return SamplePlan(index, seed=2, batch_size=BATCH, data=data, mask=MaskConfig(patches=1, min_block=1))


def box(x: int, y: int, width: int, height: int) -> Any:
    """As much of a row of the plan as decoding takes."""
    columns = {"x_B": x, "y_B": y, "width_B": width, "height_B": height}
    return type("Row", (), {name: np.array([value], np.int32) for name, value in columns.items()})


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_scan_gives_what_pillow_makes_of_it_whatever_was_decoded_before(progressive: bool) -> None:
    """Bits flipped in the scan, or the scan cut and closed: decoders fill the rest, and the buffer is an old one.

    Where scans of a progressive image are missing, libjpeg smooths what it has, and a region otherwise than the whole.
    """
    rng, cropper = np.random.default_rng(4), RegionCropper()
    before = [encode(picture(seed, 300, 300)) for seed in (5, 6)]
    good = encode(picture(1), quality=90, progressive=progressive)
    scan = good.index(b"\xff\xda") + 14
    equal = 0
    for k in range(150):
        data = bytearray(good)
        for _ in range(3):
            data[int(rng.integers(scan, len(data) - 2))] ^= 1 << int(rng.integers(0, 8))
        if k % 5 == 0:
            data = data[: int(rng.integers(scan, len(data)))] + b"\xff\xd9"
        x, y, width, height = (int(rng.integers(low, high)) for low, high in ((0, 30), (0, 30), (1, 60), (1, 40)))
        made: list[np.ndarray | None] = []
        for other in before:
            assert cropper.decode(other, box(0, 0, 300, 300)) is not None
            box_HWC = cropper.decode(bytes(data), box(x, y, width, height))
            made.append(None if box_HWC is None else box_HWC.copy())
        assert (made[0] is None) == (made[1] is None)
        if made[0] is None or made[1] is None:
            continue
        np.testing.assert_array_equal(made[0], made[1])
        if progressive:
            equal += 1
            continue
        try:
            whole_HWC = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, SyntaxError):
            continue  # damage that the region's decoder did not come to
        np.testing.assert_array_equal(made[0], whole_HWC[y : y + height, x : x + width])
        equal += 1
    assert equal > 100


@pytest.mark.parametrize("size", [1, 7, 224, 448, 12000])
def test_flipping_in_strips_is_flipping(size: int) -> None:
    """Also where a single row is more than a strip may have."""
    rng = np.random.default_rng(size)
    box_HWC = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    shape = (min(size, 448), size, 3)
    straight_HWC, flipped_HWC = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    resize_into(straight_HWC, box_HWC, "bicubic", flip=False)
    resize_into(flipped_HWC, box_HWC, "bicubic", flip=True)
    np.testing.assert_array_equal(flipped_HWC, straight_HWC[:, ::-1])
    assert size == 1 or straight_HWC.std() > 10


def test_no_threads_are_started_in_the_threads(index: Index) -> None:
    """torch would give each of them a team of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        loader = make_loader("cpu", DataConfig(threads=2))
        batches = loader.batches(plan_for(index, 448), 0)
        before = len(os.listdir("/proc/self/task"))
        for batch in islice(batches, 6):
            assert batch.rows.flip_B.any() or batch.step
        after = len(os.listdir("/proc/self/task"))
        loader.close()
    finally:
        torch.set_num_threads(threads)
    assert after - before <= 2 + pooled.READERS


@pytest.mark.parametrize("name", ["cpu", "torchvision"])
@pytest.mark.parametrize("slow", [True, False])
def test_files_are_asked_for_ahead_while_reading_is_slow(
    index: Index, monkeypatch: pytest.MonkeyPatch, name: str, slow: bool
) -> None:
    asked: list[int] = []
    expect = encoded.expect

    def watch(index: Index, sample: int) -> None:
        asked.append(sample)
        expect(index, sample)

    monkeypatch.setattr(encoded, "expect", watch)
    monkeypatch.setattr(pooled, "SLOW", -1.0 if slow else 1e9)
    plan, steps = plan_for(index), 5
    loader = make_loader(name, DataConfig(threads=2))
    batches = loader.batches(plan, 3)
    for _ in range(steps):
        next(batches)
    loader.close()  # what was not begun is dropped
    first = pooled.IN_FLIGHT + pooled.READ_AHEAD  # before any time is known
    planned = [set(plan.step(3 + k).sample_B.tolist()) for k in range(steps - 1 + first)]
    if slow:
        assert set().union(*planned[: steps - 1]) <= set(asked) <= set().union(*planned)
    else:
        assert set(asked) <= set().union(*planned[:first])
        assert len(asked) <= first * BATCH


def test_asking_never_fails(index: Index, tmp_path: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    encoded.expect(index, 0)
    encoded.expect(dataclasses.replace(index, root=tmp_path), 0)
    assert len(os.listdir("/proc/self/fd")) == files


def test_as_many_work_at_once_as_there_are_workers(index: Index) -> None:
    lock, at_work, most = threading.Lock(), [0], [0]
    both = threading.Barrier(2, timeout=60)

    def worker(index: Index, row: PlanRows, interpolation: str, data: Any, out_HWC: np.ndarray) -> pooled.Cost:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        both.wait()
        out_HWC[:] = int(row.sample_B[0])
        with lock:
            at_work[0] -= 1
        return pooled.Cost(0.0, 1.0, 2.0)

    loader: Any = make_loader("cpu", DataConfig(threads=2))
    plan = plan_for(index)
    run = pooled.PooledRun(loader, plan, 0, [worker, worker])
    batch = run.next()
    both.abort()  # lets go of those that work on later batches
    run.close()
    run.close()
    assert most == [2]
    for i, sample in enumerate(plan.step(0).sample_B):
        assert (batch.images_BHWC[i] == int(sample)).all()
    stats = loader.stats()
    assert (stats.items["decode"], stats.seconds["decode"], stats.seconds["transform"]) == (BATCH, BATCH, 2 * BATCH)
