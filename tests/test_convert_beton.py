"""`mvp-fast data convert --to beton`: FFCV's bytes, nothing lost by an interruption, bad images told."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvp_fast.cli.main import main
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan
from tests.bad_images import BAD, BAD_REASONS, GOOD, write_corpus
from tests.betons import make_beton, needs_ffcv
from tests.conftest import losses, run_verb

pytestmark = needs_ffcv
IMAGES = 150  # three parts
# FFCV's writer as its documentation uses it, with one worker, in a process of its own.
FFCVS_OWN = """
import sys, numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import RGBImageField, IntField
from PIL import Image
from mvp_fast.samples.index import Index
index = Index.open(sys.argv[1])
class Samples:
    def __len__(self): return len(index)
    def __getitem__(self, i): return Image.open(index.file(i)).convert("RGB"), int(index.label[i]), int(i)
for out, mode, side in zip(*(sys.argv[i::3] for i in (2, 3, 4))):
    image = RGBImageField(write_mode=mode, max_resolution=int(side), jpeg_quality=90)
    fields = {"image": image, "label": IntField(), "row": IntField()}
    DatasetWriter(out, fields, num_workers=1).from_indexed_dataset(Samples())
"""


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Two classes; photos large enough for a beton of several pages where they are stored raw."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(3)
    for i in range(IMAGES):
        coarse_HWC = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        size = int(rng.integers(150, 400)), int(rng.integers(150, 400))
        path = folder / "ab"[i % 2] / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Image.fromarray(coarse_HWC).resize(size), quality=90))
    build_index(folder)
    return Index.open(folder)


def convert(index: Index, out: Path, *more: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_verb("data", "convert", index.path, "--to", "beton", "--out", out, *more, **options)


def test_the_bytes_are_ffcvs_own_whatever_the_processes(files: Index, tmp_path: Path) -> None:
    own = [str(tmp_path / f"own-{mode}.beton") for mode in ("raw", "jpeg")]
    code = FFCVS_OWN, str(files.path), own[0], "raw", "200", own[1], "jpg", "300"
    subprocess.run([sys.executable, "-c", *code], check=True, timeout=240, capture_output=True)
    index = make_beton(files, tmp_path, "raw", 200)
    assert Path(own[0]).read_bytes() == index.file(0).read_bytes()
    assert index.file(0).stat().st_size > 1 << 24  # samples lie in several pages, so that their border was met
    ours = tmp_path / "ours.beton"
    done = convert(files, ours, "--mode", "jpeg", "--side", 300, "--workers", 2)
    assert Path(own[1]).read_bytes() == ours.read_bytes()
    assert f"images   {IMAGES}" in done.stdout
    assert "expected" in done.stdout
    assert "--data.loader ffcv --data.interpolation area" in done.stdout
    assert not (tmp_path / "ours.beton.parts").exists()
    assert not ours.with_suffix(".bad.jsonl").exists()


def test_the_corpus_of_bad_images_is_told_and_left_out(tmp_path: Path) -> None:
    """Of the index by headers, which holds bad images still: exactly these go, and the loader takes all others."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_corpus(folder, GOOD, BAD)
    build_index(folder, workers=1)
    index = Index.open(folder)
    met = {index.key(i) for i in range(len(index))}
    assert set(GOOD) < met
    out = tmp_path / "out.beton"
    done = convert(index, out, "--mode", "jpeg", "--side", 256, "--workers", 1)
    told = {
        line["path"]: line["reason"] for line in map(json.loads, out.with_suffix(".bad.jsonl").read_text().splitlines())
    }
    assert set(told) == met & set(BAD)
    assert all(BAD_REASONS[name] in reason for name, reason in told.items())
    assert f"bad      {len(told)} left out" in done.stdout
    beton = Index.open(out.with_suffix(".parquet"))
    assert {beton.key(i) for i in range(len(beton))} == set(GOOD)
    settings = DataConfig(image_size=48, threads=2, interpolation="area", bad_sample_budget=0.0)
    plan = SamplePlan(beton, seed=1, batch_size=4, data=settings, mask=MaskConfig(patches=3, min_block=1))
    loader = make_loader("ffcv", settings)
    assert len(list(islice(loader.batches(plan, 0), len(GOOD)))) == len(GOOD)
    assert loader.bad_samples == 0
    loader.close()


def test_a_killed_conversion_goes_on_and_changes_no_byte(files: Index, tmp_path: Path) -> None:
    """SIGKILL while the first part is being written, after a part is joined, and so on, until one attempt ends."""
    whole, out = tmp_path / "whole.beton", tmp_path / "killed.beton"
    options = ("--mode", "mixed", "--side", "250", "--workers", "1")
    convert(files, whole, *options)
    parts = Path(f"{out}.parts")
    command = [sys.executable, "-m", "mvp_fast", "data", "convert", str(files.path), "--to", "beton"]
    for stage in ("joined 1", "joined 2"):
        process = subprocess.Popen([*command, "--out", str(out), *options], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        count = int(stage[-1])
        while len(list(parts.glob("[0-9]*.npz"))) < count:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    # What a power failure may leave as well: a torn temporary file, bytes behind the last joined part.
    (parts / ".000002.beton.123.tmp").write_bytes(b"torn")
    with open(parts / "joined.beton", "ab") as file:
        file.write(b"\xff" * 5000)
    done = convert(files, out, *options)
    assert "128 were done before" in done.stdout
    assert out.read_bytes() == whole.read_bytes()
    assert (
        Index.open(out.with_suffix(".parquet")).fingerprint() == Index.open(whole.with_suffix(".parquet")).fingerprint()
    )
    assert not parts.exists()


def test_processes_end_with_a_killed_parent(files: Index, tmp_path: Path) -> None:
    out = tmp_path / "orphans.beton"
    command = [sys.executable, "-m", "mvp_fast", "data", "convert", str(files.path), "--to", "beton", "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL)
    children: list[int] = []
    until = time.monotonic() + 120
    while len(children) < 3:  # two workers, and the tracker of their resources
        assert process.poll() is None
        assert time.monotonic() < until
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(child) for child in text.split()]
        time.sleep(0.01)
    time.sleep(1)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}/cmdline").exists() and _alive(child) for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_disk_that_fills_up_loses_nothing(files: Index, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same error from the same call."""
    options = ("--mode", "raw", "--side", "250", "--workers", "1")
    out = tmp_path / "full.beton"
    command = ["prlimit", "--fsize=12000000", sys.executable, "-m", "mvp_fast", "data", "convert", str(files.path)]
    full = subprocess.run([*command, "--to", "beton", "--out", str(out), *options], capture_output=True, text=True)
    assert full.returncode == 4, full.stderr
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert not out.exists()
    convert(files, out, *options)
    whole = tmp_path / "whole.beton"
    convert(files, whole, *options)
    assert out.read_bytes() == whole.read_bytes()


def test_bad_images_are_left_out_and_listed_as_verify_lists_them(files: Index, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(files.root, folder)
    data = (folder / "a" / "000.jpg").read_bytes()
    build_index(folder)
    source = Index.open(folder)
    half = data[: len(data) // 2].ljust(len(data), b"\0")
    (folder / "a" / "000.jpg").write_bytes(half)
    at = (folder / "b" / "001.jpg").read_bytes()
    (folder / "b" / "001.jpg").write_bytes(bytes(len(at)))
    (folder / "b" / "003.jpg").unlink()
    index = make_beton(source, tmp_path, "jpeg", 200)
    listed = [json.loads(line) for line in (tmp_path / "set.bad.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in listed} == {"a/000.jpg", "b/001.jpg", "b/003.jpg"}
    verified = build_index(folder, tmp_path / "verified.parquet", verify=True)
    told = {entry.path: entry.reason for entry in verified.bad}
    for entry in listed[:2]:
        assert entry["reason"] == told[entry["path"]]
    assert len(index) == IMAGES - 3
    assert {index.key(i) for i in range(len(index))} == {source.key(i) for i in range(IMAGES)} - {
        entry["path"] for entry in listed
    }
    assert index.classes == ["a", "b"]
    assert all(index.classes[index.label[i]] == index.key(i).split("/")[0] for i in range(len(index)))
    index.check_files()
    plan_runs(index)


def plan_runs(index: Index) -> None:
    """A passage over all of it meets no bad sample."""
    data = DataConfig(image_size=32, interpolation="area", threads=2, bad_sample_budget=0.0)
    plan = SamplePlan(index, seed=1, batch_size=8, data=data, mask=MaskConfig(patches=1, min_block=1))
    loader = make_loader("ffcv", data)
    for batch in islice(loader.batches(plan, 0), len(index) // 8 + 1):
        assert not batch.rows.attempt_B.any()
    loader.close()


@pytest.mark.parametrize("mode", ["raw", "jpeg", "mixed"])
def test_odd_images(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((90, 70))
    odd = {
        "png.jpg": encode(image, "PNG"),
        "cmyk.jpg": encode(image.convert("CMYK")),
        "grey.jpg": encode(image.convert("L")),
        "grey16.png": encode(Image.fromarray(rng.integers(0, 65536, (70, 90), dtype=np.uint16)), "PNG"),
        "gif.gif": encode(image, "GIF"),
        "pixel.png": encode(image.resize((1, 1)), "PNG"),
        "thin.png": encode(image.resize((1, 3000)), "PNG"),
        "flat.png": encode(image.resize((3000, 2)), "PNG"),
        "large.jpg": encode(image.resize((3000, 2000))),
        "progressive.jpg": encode(image, progressive=True),
    }
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    build_index(tmp_path)
    source = Index.open(tmp_path)
    index = make_beton(source, tmp_path, mode, 256)
    sizes = {index.key(i): (int(index.width[i]), int(index.height[i])) for i in range(len(index))}
    assert sizes["thin.png"] == (1, 256)
    assert sizes["flat.png"] == (256, 1)
    assert sizes["pixel.png"] == (1, 1)
    assert sizes["large.jpg"] == (256, 170)
    assert all(sizes[name] == (90, 70) for name in odd if name.split(".")[0] not in ("pixel", "thin", "flat", "large"))
    plan_runs(index)


def test_the_estimate_is_near_the_truth(files: Index, tmp_path: Path) -> None:
    from mvp_fast.loaders.convert.beton_estimate import estimate
    from mvp_fast.loaders.convert.beton_parts import PAGE, Form

    for mode in ("raw", "jpeg"):
        expected = estimate(files, Form(mode, 300, 90))
        (tmp_path / mode).mkdir()
        index = make_beton(files, tmp_path / mode, mode, 300)
        size = index.file(0).stat().st_size
        assert abs(expected.bytes - size) < 0.2 * size + 2 * PAGE
        assert expected.images == 48


def test_too_little_room_is_refused_before_the_work(
    files: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    out = tmp_path / "no.beton"
    assert main(["data", "convert", str(files.path), "--to", "beton", "--out", str(out)]) == 4
    text = capsys.readouterr().err
    assert "The disk has 0.00 GB left, and the beton will take about" in text
    assert not out.exists()
    assert not list((tmp_path / "no.beton.parts").glob("*.beton"))


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    assert main(["data", "convert", *map(str, words), "--to", "beton"]) == code
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    return text


def test_refusals(
    files: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "There is no index here" in refused(capsys, 3, tmp_path)
    assert "ends in .beton" in refused(capsys, 2, files.path, "--out", tmp_path / "x.ffcv")
    assert "would replace the index" in refused(capsys, 2, files.path, "--out", files.path.with_suffix(".beton"))
    for option, value in (("--side", 8), ("--side", 5000), ("--quality", 0), ("--quality", 101), ("--workers", -1)):
        assert option in refused(capsys, 2, files.path, option, value)
    with pytest.raises(SystemExit) as usage:
        main(["data", "convert", str(files.path), "--to", "beton", "--mode", "png"])
    assert usage.value.code == 2
    capsys.readouterr()

    out = tmp_path / "x.beton"
    make_beton(files, tmp_path, "jpeg", 64)
    os.rename(tmp_path / "set.beton", out)
    assert "is there already" in refused(capsys, 3, files.path, "--out", out)
    os.remove(out)
    (tmp_path / "x.parquet").write_bytes(b"mine")
    assert "is there already" in refused(capsys, 3, files.path, "--out", out)
    assert (tmp_path / "x.parquet").read_bytes() == b"mine"
    os.remove(tmp_path / "x.parquet")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(capsys, 4, files.path, "--out", out, "--side", 64)  # which leaves the folder of an unfinished job
    monkeypatch.undo()
    assert "of another index or with other options" in refused(capsys, 3, files.path, "--out", out, "--side", 65)

    import fcntl

    with open(f"{out}.parts/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process converts to this file" in refused(capsys, 3, files.path, "--out", out, "--side", 64)


def test_without_ffcv_one_paragraph_says_what_to_do(
    files: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mvp_fast.errors import EnvironmentProblem

    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)  # Python's way to say that a module is not there
    text = refused(capsys, 4, files.path, "--out", tmp_path / "x.beton")
    for part in ("needs FFCV, which is not installed", "make install", "libturbojpeg0-dev"):
        assert part in text
    assert not list(tmp_path.iterdir())
    with pytest.raises(EnvironmentProblem, match=r"needs FFCV.*make install"):
        make_loader("ffcv", DataConfig(interpolation="area"))


def test_a_set_without_a_usable_image_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(Image.new("RGB", (20, 20))))
    build_index(tmp_path)
    index = Index.open(tmp_path)
    (tmp_path / "a.jpg").write_bytes(bytes(int(index.length[0])))
    done = convert(index, tmp_path / "x.beton", check=False)
    assert done.returncode == 3
    assert "None of the 1 images can be used" in done.stderr


def test_training_reads_the_converted_set(train: Any, scenes: Path, tmp_path: Path) -> None:
    index = make_beton(Index.open(scenes), tmp_path, "mixed", 128)
    common = {"data__index": index.path, "data__loader": "ffcv", "data__interpolation": "area"}
    done = train(run=tmp_path / "run", train__steps=3, **common)
    assert "ffcv, area" in done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 3
    refused = train(check=False, train__steps=1, **{**common, "data__interpolation": "bicubic"})
    assert refused.returncode == 2
    assert "--data.interpolation area" in refused.stderr
