"""Bad samples: what counts as one, who takes its place, what is written down, and when the run stops.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders import dali, encoded, torchvision
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.loaders.failures import MAX_STAND_INS, BadSamples, Failure, Settled, settle
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.encoded_image import read_jpeg_header
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan

DECODING = ("torchvision", "dali", "cpu")
FAST = DECODING[1:]  # held against the first, the reference
ON_GPU = pytest.param("dali:gpu", marks=pytest.mark.gpu)  # decodes there, and leaves its batches there
SIDE, BATCH, GOOD = 48, 8, 24
WIDTH, HEIGHT = 90, 70


def picture(seed: int) -> Image.Image:
    coarse_HWC = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse_HWC).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def segment(data: bytes, marker: int) -> int:
    """Offset of the first marker of this kind."""
    return data.index(bytes((0xFF, marker)))


def damage_huffman_table(data: bytes) -> bytes:
    """More codes than any table has: every decoder refuses it, but only when it reads the scan's header."""
    at = segment(data, 0xC4) + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


JPEG = encode(picture(1000), quality=90)
SCAN = segment(JPEG, 0xDA)
PNG = encode(picture(1000), "PNG")
# What the indexed files turn into. Those that keep their length are met as they are; the others are stale.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "padded_half": (lambda d: d[: len(d) // 2].ljust(len(d), b"\0"), "no end-of-image marker"),
    "padded_end": (lambda d: d[:-2] + b"\0\0", "no end-of-image marker"),
    "padded_header": (lambda d: d[: SCAN - 200].ljust(len(d), b"\0"), "no end-of-image marker"),
    "zeros": (lambda d: bytes(len(d)), "none of JPEG"),
    "text": (lambda d: b"lorem ipsum ".ljust(len(d), b"."), "none of JPEG"),
    "huffman": (damage_huffman_table, "Pillow does not decode it"),
    "smaller": (lambda d: encode(picture(1).resize((40, 30)), quality=30).ljust(len(d), b"\0"), "is 40x30 pixels"),
    "short": (lambda d: d[:-10], "the index says"),
    "long": (lambda d: d + b"\0", "the index says"),
    "emptied": (lambda d: b"", "the file has 0 bytes"),
}


def plan_for(index: Index, **data: Any) -> SamplePlan:
    settings = DataConfig(image_size=SIDE, threads=2, **data)
    return SamplePlan(index, seed=5, batch_size=BATCH, data=settings, mask=MaskConfig(patches=3, min_block=1))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("clean")
    for i in range(GOOD):
        (folder / f"good{i:02}.jpg").write_bytes(encode(picture(i), quality=90))
    for name in [*DAMAGE, "missing"]:
        (folder / f"{name}.jpg").write_bytes(JPEG)
    build_index(folder)
    return Index.open(folder)


@pytest.fixture(scope="module")
def damaged(clean: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A copy of the clean set with an index as before and files that were damaged since."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(clean.root, folder)
    for name, (change, _) in DAMAGE.items():
        path = folder / f"{name}.jpg"
        path.write_bytes(change(path.read_bytes()))
    (folder / "missing.jpg").unlink()
    return Index.open(folder)


def loader_for(name: str, data: DataConfig, **more: Any) -> Any:
    backend, _, gpu = name.partition(":")
    return make_loader(backend, data, device="cuda" if gpu else "cpu", **more)


def run(name: str, index: Index, steps: int, start: int = 0, **data: Any) -> tuple[list[Batch], dict[str, Failure]]:
    plan = plan_for(index, **data)
    loader = loader_for(name, plan.data)
    try:
        return list(islice(loader.batches(plan, start), steps)), loader.failures.failures
    finally:
        loader.close()


# --- What is bad


@pytest.mark.parametrize("name", [*FAST, ON_GPU])
def test_all_backends_call_the_same_samples_bad(damaged: Index, name: str) -> None:
    steps = len(damaged) // BATCH + 1  # every sample is met
    found = {each: run(each, damaged, steps, bad_sample_budget=1.0)[1] for each in ("torchvision", name)}
    assert found[name] == found["torchvision"]  # keys, reasons, kinds and steps
    assert set(found[name]) == {f"{each}.jpg" for each in [*DAMAGE, "missing"]}
    for each, (_, reason) in DAMAGE.items():
        assert reason in found[name][f"{each}.jpg"].reason
    kinds = {key.removesuffix(".jpg"): failure.kind for key, failure in found[name].items()}
    assert {name for name, kind in kinds.items() if kind == "missing"} == {"missing"}
    assert {name for name, kind in kinds.items() if kind == "stale"} == {"smaller", "short", "long", "emptied"}


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, -2, -10, -100])
@pytest.mark.parametrize("progressive", [False, True])
def test_files_that_were_cut_before_they_were_indexed(tmp_path: Path, cut: float, progressive: bool) -> None:
    data = encode(picture(3), quality=90, progressive=progressive)
    (tmp_path / "cut.jpg").write_bytes(data[: int(cut) if cut < 0 else max(int(len(data) * cut), 700)])
    (tmp_path / "good.jpg").write_bytes(data)
    build_index(tmp_path)
    index = Index.open(tmp_path)
    assert len(index) == 2
    for name in DECODING:
        batches, failures = run(name, index, 1, bad_sample_budget=1.0)
        assert list(failures) == ["cut.jpg"]
        assert "cut short" in failures["cut.jpg"].reason
        assert {index.key(int(sample)) for sample in batches[0].rows.sample_B} == {"good.jpg"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "data",
    [
        JPEG + b"\0" * 5000,
        JPEG + bytes(range(256)) * 20,
        JPEG[:2] + b"\xff\xff\xff" + JPEG[2:],
        JPEG[:2] + b"\xff\xe1\x00\x1cExif\0\0MM\0\x2a\xff\xff\xff\xff broken exif" + JPEG[2:],
        encode(picture(1000), progressive=True),
        encode(picture(1000), subsampling="4:1:1"),
        encode(picture(1000), keep_rgb=True),
    ],
    ids=["padding", "garbage", "fill bytes", "broken exif", "progressive", "4:1:1", "rgb"],
)
def test_odd_jpegs_that_are_no_failure(tmp_path: Path, data: bytes) -> None:
    header = read_jpeg_header(data)
    assert header is not None
    assert (header.width, header.height, header.components, header.usual) == (WIDTH, HEIGHT, 3, True)
    assert data[header.scan : header.scan + 2] == b"\xff\xda"
    (tmp_path / "odd.jpg").write_bytes(data)
    build_index(tmp_path)
    index = Index.open(tmp_path)
    assert encoded.read(index, 0).plain_jpeg  # DALI and nvImageCodec decode it
    reference, *others = (run(name, index, 1, bad_sample_budget=0.0)[0][0] for name in DECODING)
    for other in others:
        assert (reference.images_BHWC.int() - other.images_BHWC.int()).abs().max() <= 8
    assert reference.images_BHWC.float().std() > 10


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_images(tmp_path: Path, side: int) -> None:
    (tmp_path / "tiny.jpg").write_bytes(encode(picture(2).resize((side, side)), quality=95))
    build_index(tmp_path)
    reference, *others = (run(name, Index.open(tmp_path), 1, bad_sample_budget=0.0)[0][0] for name in DECODING)
    for other in others:
        assert (reference.images_BHWC.int() - other.images_BHWC.int()).abs().max() <= 8


@given(st.binary(max_size=64), st.integers(0, len(JPEG)))
def test_any_bytes_have_a_header_or_none(noise: bytes, at: int) -> None:
    for data in (noise, b"\xff\xd8" + noise, JPEG[:at] + noise + JPEG[at:], JPEG[:at]):
        header = read_jpeg_header(data)
        assert header is None or 0 < header.scan < len(data)


@pytest.mark.parametrize("name", FAST)
def test_flipped_bits_never_stop_a_run_and_are_judged_alike_in_headers(tmp_path: Path, name: str) -> None:
    """Damage in the header, which both decoders read in full; what neither notices gives equal pixels."""
    rng = np.random.default_rng(12)
    for i in range(60):
        data = bytearray(JPEG)
        data[int(rng.integers(20, SCAN))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / f"{i:02}.jpg").write_bytes(data)
    (tmp_path / "good.jpg").write_bytes(JPEG)
    build_index(tmp_path)
    index = Index.open(tmp_path)
    steps = -(-len(index) // BATCH)
    (reference, one), (other, two) = (run(each, index, steps, bad_sample_budget=1.0) for each in ("torchvision", name))
    assert one == two
    assert 5 < len(one) < 55
    for a, b in zip(reference, other, strict=True):
        np.testing.assert_array_equal(a.rows.sample_B, b.rows.sample_B)
        assert (a.images_BHWC.int() - b.images_BHWC.int()).float().abs().mean() < 1


# --- Who takes its place


@pytest.mark.parametrize("name", DECODING)
def test_a_stand_in_takes_the_place_of_the_bad_and_no_other_row_changes(
    clean: Index, damaged: Index, name: str
) -> None:
    before, _ = run(name, clean, 9)
    after, failures = run(name, damaged, 9, bad_sample_budget=1.0)
    plan, replaced = plan_for(damaged), 0
    for old, new in zip(before, after, strict=True):
        for i in range(BATCH):
            expected = old.rows.slice(i, i + 1)
            while damaged.key(int(expected.sample_B[0])) in failures:
                expected = plan.stand_in(expected, 0)
            for column in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B", "attempt_B", "position_B"):
                assert getattr(new.rows, column)[i] == getattr(expected, column)[0]
            if new.rows.attempt_B[i]:
                replaced += 1
            else:
                assert torch.equal(old.images_BHWC[i], new.images_BHWC[i])
        np.testing.assert_array_equal(new.masked_BM.numpy(), new.rows.masked_BM())
    assert replaced > len(DAMAGE)


@pytest.mark.parametrize("name", DECODING)
def test_stand_ins_are_decoded_from_their_own_files(clean: Index, damaged: Index, name: str) -> None:
    """Not stale pixels: the rows as carried out, planned anew, give the same images from the clean set."""
    after, _ = run(name, damaged, 5, bad_sample_budget=1.0)

    class Replay(SamplePlan):
        def step(self, k: int) -> Any:
            return after[k % 5].rows  # loaders plan ahead

    plan = Replay(clean, seed=5, batch_size=BATCH, data=plan_for(clean).data, mask=MaskConfig(patches=3, min_block=1))
    loader = make_loader(name, plan.data)
    for batch in islice(loader.batches(plan, 0), 5):
        assert torch.equal(batch.images_BHWC, after[batch.step].images_BHWC)
    loader.close()


@pytest.mark.parametrize("name", DECODING)
def test_resuming_among_bad_samples_gives_the_same_bits(damaged: Index, name: str) -> None:
    whole, _ = run(name, damaged, 7, bad_sample_budget=1.0)
    for start in (2, 5):
        rest, _ = run(name, damaged, 7 - start, start=start, bad_sample_budget=1.0)
        for batch in rest:
            assert torch.equal(batch.images_BHWC, whole[batch.step].images_BHWC)


@pytest.mark.parametrize("repeat", [2, 4])
def test_a_group_of_crops_gets_one_stand_in(damaged: Index, repeat: int) -> None:
    steps = len(damaged) * repeat // BATCH + 1
    found = {name: run(name, damaged, steps, bad_sample_budget=1.0, repeat=repeat) for name in DECODING}
    plan, replaced = plan_for(damaged, repeat=repeat), 0
    bad = found["torchvision"][1]
    assert set(bad) == {f"{name}.jpg" for name in [*DAMAGE, "missing"]}
    for name in DECODING:
        batches, failures = found[name]
        assert failures == bad
        for batch in batches:
            planned = plan.step(batch.step)
            for i in range(BATCH):
                expected = planned.slice(i, i + 1)
                while damaged.key(int(expected.sample_B[0])) in bad:
                    expected = plan.stand_in(expected, 0)
                for column in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B", "attempt_B", "mask_BN"):
                    assert np.array_equal(getattr(batch.rows, column)[i], getattr(expected, column)[0])
            sample_GR = batch.rows.sample_B.reshape(-1, repeat)
            assert (sample_GR == sample_GR[:, :1]).all()
            replaced += int((batch.rows.attempt_B > 0).sum())
    assert replaced > len(DAMAGE) * repeat
    for a, b in zip(found["torchvision"][0], found["dali"][0], strict=True):
        assert (a.images_BHWC.int() - b.images_BHWC.int()).abs().float().mean() < 1


def test_rows_of_a_group_settled_one_by_one_end_alike(damaged: Index) -> None:
    """As a backend does that decodes for each row: the same stand-ins, and the same count against the budget."""
    plan = plan_for(damaged, repeat=4, bad_sample_budget=1.0)
    together, apart = BadSamples(plan.data), BadSamples(plan.data)

    def attempt(rows: Any) -> int:
        assert len(set(rows.sample_B.tolist())) == 1
        encoded.decode(damaged, int(rows.sample_B[0]), encoded.read(damaged, int(rows.sample_B[0])))
        return len(rows)

    for step in range(12):
        rows = plan.step(step)
        for i in range(0, BATCH, 4):
            group = settle(plan, step, rows, i, attempt, count=4)
            assert group.value == 4
            together.account(group)
            for j in range(4):
                one = settle(plan, step, rows, i + j, attempt)
                apart.account(one)
                for column in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B", "attempt_B", "position_B"):
                    assert getattr(one.rows, column)[0] == getattr(group.rows, column)[j]
    assert (together.seen, together.bad) == (apart.seen, apart.bad)
    assert together.bad % 4 == 0
    assert together.bad > 0
    assert together.failures == apart.failures


def test_dali_mends_its_pipeline_once_for_each_batch_it_failed_on(
    damaged: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended: list[tuple[int, int]] = []
    mend = dali._DaliRun._mend

    def watch(self: Any, step: Any, error: Exception) -> None:
        mend(self, step, error)
        mended.append((step.step, sum(bool(settled.failures) for settled in step.settled)))

    monkeypatch.setattr(dali._DaliRun, "_mend", watch)
    batches, failures = run("dali", damaged, 5, bad_sample_budget=1.0)
    # Of all the damage, only the Huffman table gets as far as DALI.
    assert mended[0][0] == failures["huffman.jpg"].step
    assert mended[0][1] >= 1
    assert len({step for step, _ in mended}) == len(mended)
    assert [batch.step for batch in batches] == list(range(5))


def test_mending_leaves_no_thread_and_no_file(damaged: Index) -> None:
    def left_over() -> tuple[int, int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/task")), threading.active_count(), psutil.Process().num_fds()

    run("dali", damaged, 5, bad_sample_budget=1.0)  # warm-up: libraries start threads that they keep
    before = left_over()
    for _ in range(3):
        run("dali", damaged, 5, bad_sample_budget=1.0)
    assert left_over() == before


def test_pillow_crops_what_dali_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart marker before the first segment: Pillow passes over it, DALI does not."""
    (tmp_path / "refused.jpg").write_bytes(JPEG[:2] + b"\xff\xd0" + JPEG[2:])
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encode(picture(i), quality=90))
    build_index(tmp_path)
    index = Index.open(tmp_path)
    assert all(encoded.read(index, i).plain_jpeg for i in range(8))
    refused: list[str] = []
    takes = dali._DaliRun._dali_takes

    def watch(self: Any, row: Any, data: Any) -> bool:
        taken = takes(self, row, data)
        if not taken:
            refused.append(index.key(int(row.sample_B[0])))
        return taken

    monkeypatch.setattr(dali._DaliRun, "_dali_takes", watch)
    (reference, _), (got, failures) = (run(name, index, 3, bad_sample_budget=0.0) for name in ("torchvision", "dali"))
    assert failures == {}
    assert refused == ["refused.jpg"] * 3
    for a, b in zip(reference, got, strict=True):
        for i, sample in enumerate(a.rows.sample_B):
            same = torch.equal(a.images_BHWC[i], b.images_BHWC[i])
            assert same == (index.key(int(sample)) == "refused.jpg")


def test_pillow_crops_what_nvimagecodec_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart marker before the first segment; the good images beside it are not Pillow's."""
    (tmp_path / "refused.jpg").write_bytes(JPEG[:2] + b"\xff\xd0" + JPEG[2:])
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encode(picture(i), quality=90))
    build_index(tmp_path)
    index = Index.open(tmp_path)
    by_pillow: list[str] = []
    carry_out_into = torchvision.carry_out_into

    def watch(index: Index, row: Any, *rest: Any) -> Any:
        by_pillow.append(index.key(int(row.sample_B[0])))
        return carry_out_into(index, row, *rest)

    monkeypatch.setattr(torchvision, "carry_out_into", watch)
    got, failures = run("cpu", index, 3, bad_sample_budget=0.0)
    assert failures == {}
    assert set(by_pillow) == {"refused.jpg"}
    by_pillow.clear()
    reference, _ = run("torchvision", index, 3, bad_sample_budget=0.0)
    for a, b in zip(reference, got, strict=True):
        for i, sample in enumerate(a.rows.sample_B):
            if index.key(int(sample)) == "refused.jpg":
                assert torch.equal(a.images_BHWC[i], b.images_BHWC[i])


def test_an_error_of_dali_that_is_no_samples_fault_is_not_hidden(clean: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(dali.CropPipeline):
        def take(self) -> torch.Tensor:
            images_BHWC = super().take()
            if len(images_BHWC) > 1:
                raise RuntimeError("out of something")
            return images_BHWC

    monkeypatch.setattr(dali, "CropPipeline", Broken)
    with pytest.raises(RuntimeError, match="out of something"):
        run("dali", clean, 1)


# --- What is written down


@pytest.mark.parametrize("name", [*DECODING, ON_GPU])
def test_the_ledger_has_each_bad_sample_once(damaged: Index, tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / "bad_samples.jsonl"
    settings = DataConfig(image_size=SIDE, threads=2, bad_sample_budget=1.0)
    plan = plan_for(damaged, bad_sample_budget=1.0)
    loader = loader_for(name, settings, ledger=path)
    for _ in islice(loader.batches(plan, 0), 14):  # more than three epochs
        pass
    loader.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"{name}.jpg" for name in [*DAMAGE, "missing"])
    assert all(Path(line["file"]).name == line["key"] for line in lines)
    assert all(set(line) == {"key", "file", "reason", "kind", "step"} for line in lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert loader.bad_samples > len(lines)
    assert loader.failures.seen == 14 * BATCH + loader.bad_samples

    path.write_text(path.read_text()[:-20])  # a crash tore the last line
    again = loader_for(name, settings, ledger=path)
    for _ in islice(again.batches(plan, 0), 5):
        pass
    again.close()
    texts = path.read_text().splitlines()
    assert len(texts) == len(lines) + 1
    assert json.loads(texts[-1])["key"] == lines[-1]["key"]


# --- When the run stops


@pytest.mark.parametrize("name", [*DECODING, ON_GPU])
def test_a_budget_of_nothing_stops_at_the_first(damaged: Index, tmp_path: Path, name: str) -> None:
    plan = plan_for(damaged, bad_sample_budget=0.0)
    _, failures = run(name, damaged, 5, bad_sample_budget=1.0)
    first = min(failure.step for failure in failures.values())
    path = tmp_path / "bad.jsonl"
    loader = loader_for(name, plan.data, ledger=path)
    threads = threading.active_count()
    batches = loader.batches(plan, 0)
    done = []
    with pytest.raises(DataError) as caught:
        done.extend(batch.step for batch in batches)
    assert done == list(range(first))  # all batches before it came
    assert threading.active_count() == threads
    text = str(caught.value)
    key = json.loads(path.read_text().splitlines()[0])["key"]
    assert text.startswith("1 of the")
    for part in (key, "bad_sample_budget allows none", str(path), "mvp-fast data index"):
        assert part in text
    assert "\n" not in text


def test_all_backends_stop_at_the_same_sample_with_the_same_words(damaged: Index) -> None:
    texts = []
    for name in DECODING:
        with pytest.raises(DataError) as caught:
            run(name, damaged, 5, bad_sample_budget=0.1, bad_sample_probation=20)
        texts.append(str(caught.value))
    assert texts == [texts[0]] * len(DECODING)
    assert texts[0].startswith("3 of the")


@pytest.mark.parametrize("name", DECODING)
def test_when_the_files_are_gone_the_message_says_that_the_index_does_not_fit(
    clean: Index, tmp_path: Path, name: str
) -> None:
    shutil.copytree(clean.root, tmp_path / "set")
    index = Index.open(tmp_path / "set")
    for path in (tmp_path / "set").glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"no longer fits its files.*the file is missing.*mvp-fast data index DIR"):
        run(name, index, 1)


@pytest.mark.parametrize("name", [*DECODING, ON_GPU])
def test_a_set_without_a_single_good_image_is_given_up(tmp_path: Path, name: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(damage_huffman_table(JPEG))
    build_index(tmp_path)
    threads = threading.active_count()
    with pytest.raises(DataError, match=f"{MAX_STAND_INS} stand-ins.*--verify"):
        run(name, Index.open(tmp_path), 1, bad_sample_budget=1.0)
    assert threading.active_count() == threads


@given(st.floats(0, 1), st.integers(0, 5000), st.lists(st.booleans(), max_size=300))
def test_the_budget_is_a_share_after_probation(budget: float, probation: int, is_bad: list[bool]) -> None:
    policy = BadSamples(DataConfig(bad_sample_budget=budget, bad_sample_probation=probation))
    failure = Failure("a", "a", "broken", "broken", 0)
    seen = bad = 0
    for failed in is_bad:
        settled: Settled[int] = Settled(None, 1, (failure,) * failed)  # type: ignore[arg-type]
        seen, bad = seen + 1 + failed, bad + failed
        at_first = np.ceil(round(budget * probation, 6))
        over = failed and bad > at_first and bad > budget * seen + 1e-6
        if over:
            with pytest.raises(DataError):
                policy.account(settled)
            return
        policy.account(settled)
    assert (policy.seen, policy.bad) == (seen, bad)


@pytest.mark.parametrize(
    ("budget", "probation", "seen", "allowed"),
    [(0.001, 1000, 0, 1), (0.001, 1000, 1999, 1), (0.001, 1000, 2000, 2), (0.1, 30, 0, 3), (0, 1000, 10**9, 0)],
)
def test_the_budget_in_numbers(budget: float, probation: int, seen: int, allowed: int) -> None:
    policy = BadSamples(DataConfig(bad_sample_budget=budget, bad_sample_probation=probation))
    assert policy.allowed(seen) == allowed


def test_settle_tries_stand_ins_in_their_order(clean: Index) -> None:
    plan = plan_for(clean)
    rows, tried = plan.step(0), []

    def attempt(row: Any) -> int:
        tried.append(int(row.sample_B[0]))
        if len(tried) < 4:
            raise BadSampleError("broken", f"attempt {len(tried)}")
        return 17

    settled = settle(plan, 0, rows, 2, attempt)
    chain = [rows.slice(2, 3)]
    for _ in range(3):
        chain.append(plan.stand_in(chain[-1], 0))
    assert tried == [int(row.sample_B[0]) for row in chain]
    assert settled.value == 17
    assert settled.rows.attempt_B[0] == 3
    assert [failure.reason for failure in settled.failures] == ["attempt 1", "attempt 2", "attempt 3"]
    assert [failure.key for failure in settled.failures] == [clean.key(sample) for sample in tried[:3]]


def test_trouble_of_the_process_is_no_bad_sample(clean: Index) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # no file can be opened
        with pytest.raises(OSError, match="Too many open files"):
            encoded.read(clean, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
