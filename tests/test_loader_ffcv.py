"""The loader `ffcv`: the pixels of the area filter, and bad samples in betons that were damaged later on.

tests/test_loaders_conformance.py holds it to the plan like every other backend.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mvp_fast.config.check import check_config
from mvp_fast.config.schema import Config, DataConfig, MaskConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.loaders import ffcv_library
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.beton import HEADER, Beton
from mvp_fast.loaders.failures import MAX_STAND_INS, Failure
from mvp_fast.loaders.ffcv import carry_out
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from tests.betons import make_beton, needs_ffcv

pytestmark = needs_ffcv
SIDE, BATCH, IMAGES = 64, 8, 24


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    coarse_HWC = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse_HWC).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(3)
    for i in range(IMAGES):
        image = picture(rng, int(rng.integers(70, 220)), int(rng.integers(70, 220)))
        image.save(folder / f"{i:02}.jpg", quality=92)
    build_index(folder)
    return Index.open(folder)


@pytest.fixture(scope="module")
def raw(files: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_beton(files, tmp_path_factory.mktemp("raw"), "raw", 150)


@pytest.fixture(scope="module")
def jpeg(files: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_beton(files, tmp_path_factory.mktemp("jpeg"), "jpeg", 150)


def plan_for(index: Index, **data: Any) -> SamplePlan:
    settings = DataConfig(image_size=SIDE, interpolation="area", crop_scale=(0.08, 1.0), threads=2, **data)
    return SamplePlan(index, seed=4, batch_size=BATCH, data=settings, mask=MaskConfig(patches=6, min_block=2))


def run(index: Index, steps: int = 3, start: int = 0, **data: Any) -> tuple[list[Batch], dict[str, Failure]]:
    plan = plan_for(index, **data)
    loader: Any = make_loader("ffcv", plan.data)
    try:
        return list(islice(loader.batches(plan, start), steps)), loader.failures.failures
    finally:
        loader.close()


# --- A slow, obvious area filter in float64


def area_weights(source: int, target: int, shrinks: bool) -> np.ndarray:
    """(target, source), rows sum to 1: the share of each source pixel in a target pixel. Where the image does not
    shrink in both directions, OpenCV interpolates linearly, with centres that fit its area filter."""
    scale = source / target
    taps = np.zeros((target, source))
    for t in range(target):
        if shrinks:
            left, right = t * scale, (t + 1) * scale
            for s in range(source):
                taps[t, s] = max(0.0, min(right, s + 1) - max(left, s)) / scale
        else:
            s = int(np.floor(t * scale))
            share = (t + 1) - (s + 1) / scale
            share = 0.0 if share <= 0 else share - np.floor(share)
            taps[t, min(s, source - 1)] += 1 - share
            taps[t, min(s + 1, source - 1)] += share
    return taps


def slow_crop(image_HWC: np.ndarray, rows: PlanRows, i: int, side: int = SIDE) -> np.ndarray:
    x, y, width, height = (int(c[i]) for c in (rows.x_B, rows.y_B, rows.width_B, rows.height_B))
    box_HWC = image_HWC[y : y + height, x : x + width].astype(float)
    shrinks = width >= side and height >= side
    down, across = area_weights(height, side, shrinks), area_weights(width, side, shrinks)
    out_HWC = np.einsum("th,hwc,sw->tsc", down, box_HWC, across, optimize=True)
    return out_HWC[:, ::-1] if rows.flip_B[i] else out_HWC


def stored(index: Index, sample: int) -> np.ndarray:
    """The pixels of a sample as they lie in the beton, a JPEG decoded by Pillow."""
    width, height = int(index.width[sample]), int(index.height[sample])
    data = index.file(sample).read_bytes()[int(index.offset[sample]) :][: int(index.length[sample])]
    if len(data) == 3 * width * height:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class ForcedPlan(SamplePlan):
    """A plan whose boxes are set by the test."""

    boxes = "plan"

    def step(self, k: int) -> PlanRows:
        rows = super().step(k)
        width_B, height_B = self.index.width[rows.sample_B], self.index.height[rows.sample_B]
        zero_B, one_B = np.zeros_like(width_B), np.ones_like(width_B)
        boxes = {
            "plan": (rows.x_B, rows.y_B, rows.width_B, rows.height_B),
            "whole": (zero_B, zero_B, width_B, height_B),
            "thin": (width_B // 2, zero_B, one_B, height_B),
            "flat": (zero_B, height_B // 3, width_B, one_B),
            "pixel": (width_B - 1, height_B - 1, one_B, one_B),
            "enlarged": (width_B // 3, height_B // 2, one_B * 11, one_B * 7),
            "same": (width_B - 64, height_B - 64, one_B * 64, one_B * 64),
        }[self.boxes]
        names = ("x_B", "y_B", "width_B", "height_B")
        columns: dict[str, Any] = {name: np.ascontiguousarray(box) for name, box in zip(names, boxes, strict=True)}
        return dataclasses.replace(rows, **columns)


@pytest.mark.parametrize("boxes", ["plan", "whole", "thin", "flat", "pixel", "enlarged", "same"])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_pixels_are_those_of_an_area_filter(request: pytest.FixtureRequest, kind: str, boxes: str) -> None:
    index: Index = request.getfixturevalue(kind)
    side = 64 if int(min(index.width.min(), index.height.min())) >= 64 else 48
    data = dataclasses.replace(plan_for(index).data, image_size=side)
    plan = ForcedPlan(index, seed=4, batch_size=BATCH, data=data, mask=MaskConfig(patches=3, min_block=1))
    plan.boxes = boxes if boxes != "same" or side == 64 else "whole"
    loader = make_loader("ffcv", data)
    distances = []
    for batch in islice(loader.batches(plan, 0), 3):
        for i, sample in enumerate(batch.rows.sample_B.tolist()):
            expected_HWC = slow_crop(stored(index, sample), batch.rows, i, side)
            distances.append(np.abs(batch.images_BHWC[i].numpy() - expected_HWC))
    loader.close()
    if kind == "raw":
        assert np.max(distances) <= 1.01  # OpenCV computes in fixed point
    assert np.mean(distances) < 2  # JPEG: FFCV's fast inverse transform against Pillow's accurate one


def test_ffcvs_own_decoder_has_the_same_bits(raw: Index, jpeg: Index, tmp_path: Path) -> None:
    """FFCV's loader in a process of its own, whole images, in order."""
    code = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
class Whole(CenterCropRGBImageDecoder):
    @property
    def get_crop_generator(self):
        return whole
def whole(height, width, _, ratio):
    return 0, 0, height, width
loader = Loader(sys.argv[1], batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL,
    pipelines={"image": [Whole((64, 64), 1.0)]})
batches = [(image.copy(), label.clone(), row.clone()) for image, label, row in loader]
np.savez(sys.argv[2], image=np.concatenate([b[0] for b in batches]),
    row=np.concatenate([b[2] for b in batches])[:, 0], label=np.concatenate([b[1] for b in batches])[:, 0])
"""
    for index in (raw, jpeg):
        command = [sys.executable, "-c", code, str(index.file(0)), str(tmp_path / "ffcv.npz")]
        subprocess.run(command, check=True, timeout=240, capture_output=True)
        found = np.load(tmp_path / "ffcv.npz")
        assert found["row"].tolist() == list(range(IMAGES))
        assert found["label"].tolist() == index.label.tolist()
        beton, cropper = Beton.open(index), ffcv_library.Cropper()
        for sample in range(IMAGES):
            out_HWC = np.empty((64, 64, 3), np.uint8)
            box = (0, 0, int(index.width[sample]), int(index.height[sample]))
            cost = carry_out(index, beton, cropper, sample, box, False, out_HWC)
            assert cost.decoder == ("ffcv" if index is jpeg else "")
            np.testing.assert_array_equal(out_HWC, found["image"][sample])
        cropper.close()
        beton.close()


def test_a_box_outside_the_image_is_refused_before_opencv_ends_the_process() -> None:
    cropper = ffcv_library.Cropper()
    image_HWC, out_HWC = np.zeros((20, 30, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    for box in ((0, 0, 31, 20), (0, 1, 30, 20), (-1, 0, 5, 5), (3, 3, 0, 5)):
        with pytest.raises(ValueError, match="not inside 30x20"):
            cropper.crop(image_HWC, box, False, out_HWC)
    cropper.close()
    cropper.close()


def test_the_loader_leaves_torchs_threads_and_ffcvs_package_alone() -> None:
    code = (
        "import sys, torch; torch.set_num_threads(2)\n"
        "from mvp_fast.loaders.ffcv_library import Cropper, load\n"
        "Cropper(); assert 'ffcv' not in sys.modules\n"
        "load('ffcv.writer'); assert 'ffcv' in sys.modules\n"
        "import numba\n"
        "assert torch.get_num_threads() == 2 and not numba.config.DISABLE_JIT, torch.get_num_threads()\n"
        "assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- Damage


def damaged(index: Index, folder: Path, change: Callable[[bytearray], Any], **columns: Any) -> Index:
    """A copy of a beton, changed after it was written; its index says what it said."""
    for path in (index.path, index.file(0)):
        shutil.copy(path, folder / path.name)
    path = folder / index.file(0).name
    data = bytearray(path.read_bytes())
    keep = change(data)
    path.write_bytes(data if keep is None else keep)
    if columns:
        table = pq.read_table(folder / index.path.name)
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [values])
        pq.write_table(table, folder / index.path.name)
    return Index.open(folder / index.path.name)


def place(index: Index, sample: int) -> slice:
    offset = int(index.offset[sample])
    return slice(offset, offset + int(index.length[sample]))


BAD = 5
DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "zeros": lambda d, rng: bytes(len(d)),
    "noise": lambda d, rng: rng.bytes(len(d)),
    "text": lambda d, rng: b"lorem ipsum ".ljust(len(d), b"."),
    "half": lambda d, rng: d[: len(d) // 2].ljust(len(d), b"\0"),
    "no end": lambda d, rng: d[:-2] + b"\0\0",
    "no beginning": lambda d, rng: b"\0\0\0\0" + d[4:],
    "png": lambda d, rng: b"\x89PNG\r\n\x1a\n" + d[8:],
    "hole": lambda d, rng: d[: len(d) // 2] + b"\xff\xd0" * 40 + d[len(d) // 2 + 80 :],
    "other size": lambda d, rng: d.replace(d[d.index(b"\xff\xc0") + 5 :][:4], b"\x00\x10\x00\x10", 1),
    "many huffman codes": lambda d, rng: d[: d.index(b"\xff\xc4") + 5] + b"\xff" * 16 + d[d.index(b"\xff\xc4") + 21 :],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_jpeg_is_bad_and_touches_no_other(jpeg: Index, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    at = place(jpeg, BAD)

    def change(data: bytearray) -> None:
        data[at] = DAMAGE[kind](bytes(data[at]), rng)

    index = damaged(jpeg, tmp_path, change)
    clean, none = run(jpeg, 6)
    found, failures = run(index, 6, bad_sample_budget=1.0)
    assert none == {}
    met = 0
    assert set(failures) == {jpeg.key(BAD)} or kind == "hole"  # Pillow decodes what a hole leaves
    for a, b in zip(clean, found, strict=True):
        for i, sample in enumerate(a.rows.sample_B):
            if sample != BAD:
                assert torch.equal(a.images_BHWC[i], b.images_BHWC[i])
                assert b.rows.attempt_B[i] == 0
                continue
            met += 1
            if failures:
                assert b.rows.attempt_B[i] > 0
            if failures or kind == "hole":
                sample = int(b.rows.sample_B[i])
                expected_HWC = slow_crop(stored(index, sample), b.rows, i)
                assert np.abs(b.images_BHWC[i].numpy() - expected_HWC).mean() < 2
    assert met


def test_flipped_bits_never_give_what_was_in_the_buffer(jpeg: Index, tmp_path: Path) -> None:
    """Every sample with one flipped bit: each crop is what Pillow makes of the damaged bytes, or a stand-in's."""
    rng = np.random.default_rng(2)

    def change(data: bytearray) -> None:
        for sample in range(0, IMAGES, 2):
            at = place(jpeg, sample)
            data[int(rng.integers(at.start, at.stop))] ^= 1 << int(rng.integers(8))

    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        index = damaged(jpeg, folder, change)
        batches, _ = run(index, 3, bad_sample_budget=1.0)
        for batch in batches:
            for i, sample in enumerate(batch.rows.sample_B.tolist()):
                expected_HWC = slow_crop(stored(index, sample), batch.rows, i)
                assert np.abs(batch.images_BHWC[i].numpy() - expected_HWC).mean() < 4, (attempt, sample)


def test_without_the_status_the_tests_of_damage_fail(
    jpeg: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What FFCV does: whatever was in the buffer is taken."""

    def careless(self: ffcv_library.Cropper, data: bytes, width: int, height: int) -> np.ndarray:
        real(self, data, width, height)
        return self.memory(3 * width * height).reshape(height, width, 3)

    real = ffcv_library.Cropper.decode
    monkeypatch.setattr(ffcv_library.Cropper, "decode", careless)
    with pytest.raises(AssertionError):
        test_a_damaged_jpeg_is_bad_and_touches_no_other(jpeg, tmp_path, "many huffman codes")


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
@pytest.mark.parametrize("share", [0.999, 0.7, 0.3])
def test_a_truncated_beton_loses_what_lies_behind(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, share: float
) -> None:
    whole: Index = request.getfixturevalue(kind)
    first = int(whole.offset.min())
    end = first + int(share * (int((whole.offset + whole.length).max()) - first))
    index = damaged(whole, tmp_path, lambda data: data[:end])
    lost = {whole.key(i) for i in range(IMAGES) if int(whole.offset[i] + whole.length[i]) > end}
    clean, _ = run(whole, 6)
    found, failures = run(index, 6, bad_sample_budget=1.0)
    cut = {key for key, failure in failures.items() if failure.kind == "stale"}
    assert set(failures) == cut <= lost
    if kind == "jpeg":  # of a raw sample, rows below the box are not read
        assert cut == lost
    for a, b in zip(clean, found, strict=True):
        for i in range(BATCH):
            if b.rows.attempt_B[i] == 0:
                assert torch.equal(a.images_BHWC[i], b.images_BHWC[i])
            else:
                sample = int(b.rows.sample_B[i])
                expected_HWC = slow_crop(stored(whole, sample), b.rows, i)
                assert np.abs(b.images_BHWC[i].numpy() - expected_HWC).mean() < 2
    with pytest.raises(DataError, match="no longer fits"):
        index.check_files()


def test_damage_to_the_table_makes_single_samples_bad(raw: Index, tmp_path: Path) -> None:
    """Each of the columns of one sample's row in the table: mode, width, height and pointer."""
    from mvp_fast.loaders.beton import FIELD

    table = HEADER.itemsize + 3 * FIELD.itemsize
    ffcv_types = ffcv_library.load("ffcv.types")
    fields = ffcv_library.load("ffcv.fields")
    row = ffcv_types.get_metadata_type([fields.RGBImageField(), fields.IntField(), fields.IntField()])
    assert (ffcv_types.HeaderType, ffcv_types.FieldDescType) == (HEADER, FIELD)
    width = row.itemsize
    for at in (0, 1, 3, 5):  # the image's columns are packed
        folder = tmp_path / str(at)
        folder.mkdir()

        def change(data: bytearray, at: int = at) -> None:
            data[table + BAD * width + at] ^= 0x85

        _, failures = run(damaged(raw, folder, change), 3, bad_sample_budget=1.0)
        assert set(failures) == {raw.key(BAD)}
        assert "table of samples" in failures[raw.key(BAD)].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:10], "cut short: it has 10 bytes"),
        (lambda d: d[:500], "cut short"),
        (lambda d: d[:3400], "cut short: .* of 24 rows"),
        (lambda d: b"", "cut short"),
        (lambda d: b"\x03" + d[1:], "version 3"),
        (lambda d: d[:2] + b"\xff\xff" + d[4:], "header is damaged|cut short"),
        (lambda d: d[:8] + b"\xff" * 8 + d[16:], "its index has 24"),
        (lambda d: d[:24] + b"\x07" + d[25:], "holds no images"),
        (lambda d: b"PK" + bytes(len(d)), "or is none"),
    ],
)
def test_a_damaged_header_is_told(raw: Index, tmp_path: Path, change: Any, message: str) -> None:
    index = damaged(raw, tmp_path, change)
    threads = threading.active_count()
    with pytest.raises(DataError, match=message) as caught:
        run(index)
    assert "mvp-fast data convert" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert threading.active_count() == threads


def test_a_missing_beton_and_other_indexes_are_told(raw: Index, files: Index, tmp_path: Path) -> None:
    index = damaged(raw, tmp_path, lambda data: None)
    index.file(0).unlink()
    with pytest.raises(DataError, match="beton is missing"):
        run(index)
    with pytest.raises(DataError, match=r"reads a beton.*\.jpg.*--to beton"):
        run(files)
    with pytest.raises(DataError, match="synthetic index"):
        run(Index.synthetic(100))


def test_an_index_of_another_beton_is_given_up_or_bad(raw: Index, jpeg: Index, tmp_path: Path) -> None:
    shutil.copy(jpeg.path, tmp_path / "set.parquet")
    shutil.copy(raw.file(0), tmp_path / "set.beton")
    with pytest.raises(DataError, match="stand-ins in a row"):
        run(Index.open(tmp_path / "set.parquet"), bad_sample_budget=1.0)


def test_the_budget_and_the_ledger_hold_here_too(jpeg: Index, tmp_path: Path) -> None:
    def change(data: bytearray) -> None:
        for sample in range(IMAGES):
            data[place(jpeg, sample)] = bytes(int(jpeg.length[sample]))

    index = damaged(jpeg, tmp_path, change)
    threads = threading.active_count()
    with pytest.raises(DataError, match=f"{MAX_STAND_INS} stand-ins"):
        run(index, bad_sample_budget=1.0)
    plan = plan_for(index, bad_sample_budget=0.0)
    loader = make_loader("ffcv", plan.data, ledger=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="bad_sample_budget allows none"):
        next(iter(loader.batches(plan, 0)))
    assert loader.bad_samples > 0
    line = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[0])
    assert line["file"] == str(index.file(0))
    assert line["key"].endswith(".jpg")
    assert threading.active_count() == threads


# --- What can't be met


def test_filters_are_never_replaced_in_silence(raw: Index) -> None:
    with pytest.raises(ConfigError, match=r"area filter alone.*--data.interpolation area"):
        make_loader("ffcv", DataConfig())
    for name in ("dali", "torchvision"):
        with pytest.raises(ConfigError, match="no area filter"):
            make_loader(name, DataConfig(interpolation="area"))
    with pytest.raises(ConfigError, match="area filter alone"):
        check_config(dataclasses.replace(Config(), data=DataConfig(loader="ffcv")))
    check_config(dataclasses.replace(Config(), data=DataConfig(loader="ffcv", interpolation="area")))
    check_config(dataclasses.replace(Config(), data=DataConfig(loader="synthetic", interpolation="area")))


def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ffcv_library.library.cache_clear()
    monkeypatch.setattr(ffcv_library, "need_ffcv", lambda where: tmp_path)
    with pytest.raises(EnvironmentProblem, match="does not load"):
        ffcv_library.library()
