"""WebDataset shards: what is in them, who can read them, that they are written again to the same bytes, and errors."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import webdataset
from nvidia.dali import fn, pipeline_def

from mvp_fast.cli.data.convert import byte_size
from mvp_fast.cli.main import main
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.loaders import encoded
from mvp_fast.loaders.convert.layout import lay_out
from mvp_fast.loaders.convert.shards import write_shards
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import COLUMNS, Index
from mvp_fast.samples.index_build import build_index, write_table
from mvp_fast.samples.plan import PlanRows, SamplePlan
from tests.bad_images import BAD, BAD_REASONS, DECODING, GOOD, encode, picture, write_corpus
from tests.conftest import losses

SIZE = 30_720


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """70 images of three classes and most formats, under the names that data sets give them."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(3)
    odd = [(name, data) for name, data in GOOD.items() if len(data) < 20_000]
    for i in range(70):
        folder = root / ("fish", "bird", "tree ünïcode")[i % 3]
        folder.mkdir(exist_ok=True)
        width, height = (int(side) for side in rng.integers(20, 150, 2))
        data = encode(image=picture(width, height, seed=i), quality=int(rng.integers(50, 95)))
        name, data = odd[i // 2 % len(odd)] if i % 2 == 0 else ("a.b.JPEG", data)
        (folder / f"{i:02} {name}").write_bytes(data)
    build_index(root)
    return Index.open(root)


def convert(index: Index, out: Path, size: int = SIZE, seed: int = 0, **options: Any) -> Any:
    asked = {"shard_size": size, "seed": seed}
    return write_shards(index, lay_out(index, size, seed), out, asked, **{"workers": 1, **options})


@pytest.fixture(scope="module")
def shards(source: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    convert(source, out)
    return out


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, str]:
    """The checksum of each file; of the index, which says where it lies, that of its rows."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    return {**files, "index.parquet": Index.open(folder).fingerprint()}


def by_key(index: Index) -> dict[str, int]:
    return {index.key(i): i for i in range(len(index))}


def test_the_index_leads_to_the_same_images(source: Index, shards: Path) -> None:
    index = Index.open(shards)
    assert sorted(by_key(index)) == sorted(by_key(source))
    assert index.classes == source.classes
    assert [index.key(i) for i in range(70)] != [source.key(i) for i in range(70)], "a new order"
    old = by_key(source)
    for i in range(70):
        j = old[index.key(i)]
        for name in ("length", "width", "height", "label"):
            assert getattr(index, name)[i] == getattr(source, name)[j]
        assert encoded.read(index, i) == encoded.read(source, j)
        assert index.file(i).parent == shards
    index.check_files(70)


def test_a_shard_is_a_sample_of_the_whole_set(source: Index, tmp_path: Path) -> None:
    layout = lay_out(source, 10 * SIZE)
    for first, last in zip(layout.first_S1[:-1], layout.first_S1[1:], strict=True):
        if last - first > 8:
            assert set(source.label[layout.sample_N[first:last]]) == {0, 1, 2}


@pytest.mark.parametrize("size", [SIZE, 51_200, 100_000, 10**9])
def test_sizes_are_known_beforehand_and_bounded(source: Index, tmp_path: Path, size: int) -> None:
    layout = lay_out(source, size)
    report = convert(source, tmp_path / "out", size)
    sizes = [path.stat().st_size for path in tars(tmp_path / "out")]
    assert sizes == layout.size_S.tolist()
    assert max(sizes) <= size
    assert (report.shards, report.written, report.images) == (len(sizes), len(sizes), 70)
    assert report.bytes == sum(sizes)
    assert sorted(layout.sample_N.tolist()) == list(range(70))
    # None could have taken the next shard's first sample too.
    for s in range(len(sizes) - 1):
        with tarfile.open(tars(tmp_path / "out")[s + 1]) as tar:
            first = [member for member in tar if member.name.startswith(tar.getnames()[0][:8])]
        more = sum(512 + -(-member.size // 512) * 512 for member in first)
        with tarfile.open(tars(tmp_path / "out")[s]) as tar:
            used = sum(512 + -(-member.size // 512) * 512 for member in tar)
        assert -(-(used + more + 1024) // 10240) * 10240 > size


def test_members_by_tarfile(source: Index, shards: Path) -> None:
    index, old, place = Index.open(shards), by_key(source), 0
    for path in tars(shards):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for image, cls, about in zip(members[::3], members[1::3], members[2::3], strict=True):
                for member in (image, cls, about):
                    assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                    assert member.isreg()
                    assert member.name.split(".")[0] == f"{place:08d}"
                told = json.loads(tar.extractfile(about).read())  # type: ignore[union-attr]
                j = old[told["key"]]
                assert tar.extractfile(image).read() == source.file(j).read_bytes()  # type: ignore[union-attr]
                assert int(tar.extractfile(cls).read()) == source.label[j] == told["label"]  # type: ignore[union-attr]
                assert told["class"] == source.classes[source.label[j]]
                assert (told["width"], told["height"]) == (source.width[j], source.height[j])
                assert (index.file(place), index.offset[place]) == (path, image.offset_data)
                place += 1
    assert place == 70


def test_extensions_say_what_is_in_the_file(shards: Path) -> None:
    from PIL import Image

    kinds = set()
    for path in tars(shards):
        with tarfile.open(path) as tar:
            for member in tar:
                kind = member.name.split(".")[1]
                if kind not in ("cls", "json"):
                    with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]
                        assert image.format == {"jpg": "JPEG"}.get(kind, kind.upper())
                    kinds.add(kind)
    assert kinds == {"jpg", "png", "gif", "bmp", "webp"}


def test_dali_indexes_are_those_of_its_own_tool(shards: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    for path in tars(shards):
        made = tmp_path / "made.idx"
        subprocess.run([tool, path, made], check=True, capture_output=True)
        assert path.with_suffix(".idx").read_text() == made.read_text()


def test_dali_reads_them(source: Index, shards: Path) -> None:
    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def pipeline() -> Any:
        image, cls, about = fn.readers.webdataset(
            paths=[str(path) for path in tars(shards)],
            index_paths=[str(path.with_suffix(".idx")) for path in tars(shards)],
            ext=["jpg;png;gif;bmp;webp", "cls", "json"],
        )
        return image, cls, about

    pipe, index = pipeline(), Index.open(shards)
    pipe.build()
    place = 0
    for _ in range(7):
        image, cls, about = pipe.run()
        for i in range(10):
            assert bytes(np.array(image.at(i))) == encoded.read(index, place).data
            assert int(bytes(np.array(cls.at(i)))) == index.label[place]
            assert json.loads(bytes(np.array(about.at(i))))["key"] == index.key(place)
            place += 1


def test_webdataset_reads_them(shards: Path) -> None:
    index = Index.open(shards)
    samples = list(webdataset.WebDataset([str(path) for path in tars(shards)], shardshuffle=False).decode())
    assert len(samples) == len(index) == 70
    for place, sample in enumerate(samples):
        assert sample["__key__"] == f"{place:08d}"
        assert sample["cls"] == index.label[place]
        assert sample["json"]["key"] == index.key(place)
        (image,) = (sample[kind] for kind in ("jpg", "png", "gif", "bmp", "webp") if kind in sample)
        assert image == encoded.read(index, place).data


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a.jpg": GOOD["baseline.jpg"]})
    build_index(tmp_path)
    convert(Index.open(tmp_path), tmp_path / "out")
    with tarfile.open(tars(tmp_path / "out")[0]) as tar:
        assert tar.getnames() == ["00000000.jpg", "00000000.json"]
        assert set(json.loads(tar.extractfile("00000000.json").read())) == {"key", "width", "height"}  # type: ignore[union-attr]
    assert Index.open(tmp_path / "out").label.tolist() == [-1]


@pytest.mark.parametrize("name", DECODING)
def test_loaders_make_the_same_of_shards_as_of_files(source: Index, shards: Path, name: str) -> None:
    """The same rows by key: the same bits."""
    index = Index.open(shards)
    data = DataConfig(image_size=48, threads=2, bad_sample_budget=0.0)

    class Mapped(SamplePlan):
        """The plan of the shards, said in samples of the source."""

        def step(self, k: int) -> PlanRows:
            rows, old = plan.step(k), by_key(source)
            rows.sample_B[:] = [old[index.key(int(sample))] for sample in rows.sample_B]
            return rows

    settings: dict[str, Any] = {"seed": 2, "batch_size": 10, "data": data, "mask": MaskConfig(patches=3, min_block=1)}
    plan = SamplePlan(index, **settings)
    batches = []
    for each in (plan, Mapped(source, **settings)):
        loader = make_loader(name, data)
        batches.append(list(islice(loader.batches(each, 0), 7)))
        loader.close()
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.images_BHWC, b.images_BHWC)


def test_the_same_bytes_from_any_number_of_processes_and_at_any_time(
    source: Index, shards: Path, tmp_path: Path
) -> None:
    for i in range(len(source)):
        os.utime(source.file(i), (1, 1))
    convert(source, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(shards)
    convert(source, tmp_path / "other", seed=1)
    assert contents(tmp_path / "other") != contents(shards)


def test_a_shard_of_shards(source: Index, shards: Path, tmp_path: Path) -> None:
    """Shards can be converted too: into other sizes, with the same images."""
    convert(Index.open(shards), tmp_path / "out", 10**6)
    index, old = Index.open(tmp_path / "out"), by_key(source)
    for i in range(70):
        assert encoded.read(index, i) == encoded.read(source, old[index.key(i)])


def test_training_on_shards_in_their_order_and_going_on(
    scenes: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    """Six steps, and the last two again from the fourth's checkpoint. An image is seen train.epochs times in all."""
    out = tmp_path / "out"
    assert call(scenes, "--to", "shards", "--shard-size", "100KB", "--out", out, "--workers", 1) == 0
    options = {"data__index": out, "data__order": "sharded", "data__shuffle_window": 20, "data__repeat": 2}
    options |= {"train__epochs": 0.5, "train__checkpoint_every": 4}  # of 96 images, in batches of 8
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(whole, **options)
    (checkpoint,) = (whole / "checkpoints").glob("*4")
    train(rest, **options, resume=checkpoint)
    assert sorted(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert losses(rest) == {step: losses(whole)[step] for step in (5, 6)}
    options["data__order"] = "shuffled"
    refused = train(tmp_path / "other", check=False, **options, resume=checkpoint)
    assert refused.returncode == 2
    assert "order was sharded, is shuffled" in refused.stderr


# --- Interrupted


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("many")
    for i in range(600):
        (root / f"{i}.jpg").write_bytes(encode(image=picture(24, 24, seed=i)))
    build_index(root)
    return Index.open(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_taken_up_again(many: Index, tmp_path: Path, workers: int) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [
        "data",
        "convert",
        many.root,
        "--to",
        "shards",
        "--shard-size",
        "10240",
        "--workers",
        workers,
        "--out",
        out,
    ]
    process = subprocess.Popen([sys.executable, "-m", "mvp_fast", *map(str, words)], stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 100
    while len(list(out.glob("shards.partial/shard-*.json"))) < 5:
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children), "workers end with their parent"
    finished = {path.stem for path in out.glob("shards.partial/shard-*.json")}
    assert 5 <= len(finished) < len(lay_out(many, 10240))
    assert not (out / "index.parquet").exists()

    kept = {name: (out / f"{name}.tar").stat().st_mtime_ns for name in finished}
    spoiled = min(finished)
    data = bytearray((out / f"{spoiled}.tar").read_bytes())
    data[700] ^= 1  # the same length: only the checksum tells
    (out / f"{spoiled}.tar").write_bytes(data)
    report = convert(many, out, 10240)
    assert report.written == report.shards - len(finished) + 1
    for name in finished - {spoiled}:
        assert (out / f"{name}.tar").stat().st_mtime_ns == kept[name]
    convert(many, whole, 10240)
    assert contents(out) == contents(whole)
    assert not (out / "shards.partial").exists()
    assert not list(out.glob(".*"))


def test_a_complete_set_is_left_alone(source: Index, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls: list[tuple[int, int]] = []
    convert(source, out, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (70, 70)
    assert calls == sorted(calls)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = convert(source, out)
    assert (report.written, report.images, report.shards) == (0, 70, len(tars(out)))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


# --- Bad images


@pytest.mark.parametrize("verify", [False, True])
def test_bad_images_are_left_out_and_listed(tmp_path: Path, verify: bool) -> None:
    (tmp_path / "set").mkdir()
    good = {name: data for name, data in GOOD.items() if len(data) < 50_000}
    write_corpus(tmp_path / "set", good, BAD)
    build_index(tmp_path / "set")
    index, out = Index.open(tmp_path / "set"), tmp_path / "out"
    (tmp_path / "set" / "whole.bmp").write_bytes(bytes(len(GOOD["whole.bmp"])))
    report = convert(index, out, 10**5, verify=verify)
    new = set(by_key(Index.open(out)))
    assert new == set(by_key(index)) - {entry.path for entry in report.bad}
    assert "whole.bmp" not in new
    listed = [json.loads(line) for line in (out / "index.bad.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in listed] == sorted(entry.path for entry in report.bad)
    for entry in report.bad:
        assert BAD_REASONS.get(entry.path, "none of JPEG") in entry.reason
    if verify:
        assert new == set(good) - {"whole.bmp"}
    else:
        assert "huffman.jpg" in new, "only decoding tells"
        assert not any(key.startswith("baseline ") or key.startswith("progressive ") for key in new)
    count = 0
    for path in tars(out):
        with tarfile.open(path) as tar:
            count += len(tar.getnames())
    assert count == 2 * len(new)
    for i in range(len(new)):
        encoded.read(Index.open(out), i)


# --- Errors


def call(*words: Any) -> int:
    try:
        return main(["data", "convert", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--shard-size", "10KB"], 2, "--shard-size is 10,000 bytes"),
        (["--shard-size", "ten"], 2, "`ten` is no size"),
        (["--shard-size", "0"], 2, "`0` is no size"),
        (["--workers", "-1"], 2, "-1 processes"),
    ],
)
def test_wrong_options(
    source: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert call(source.root, "--to", "shards", "--out", tmp_path / "out", *words) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_places_that_hold_something_else(source: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [source.root, "--to", "shards", "--workers", 1, "--shard-size", SIZE, "--out"]
    assert call(*words, source.root) == 3, "never into the images"
    assert "holds other files" in capsys.readouterr().err
    assert call(*words, source.path) == 3
    assert "this is a file" in capsys.readouterr().err
    assert call(*words, out) == 0
    assert "70 images" in capsys.readouterr().out
    assert call(*words, out, "--seed", 1) == 3
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert call(*words, out, "--verify") == 3
    tars(out)[0].unlink()
    assert call(*words, out) == 3
    assert "shard-000000.tar is no longer" in capsys.readouterr().err
    (out / "shards.json").write_text("{")
    assert call(*words, out) == 3
    assert "can't be read" in capsys.readouterr().err


def test_without_an_index_or_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "--to", "shards") == 3
    assert "no index here" in capsys.readouterr().err
    write_corpus(tmp_path, {"a.jpg": GOOD["baseline.jpg"]})
    build_index(tmp_path)
    (tmp_path / "a.jpg").unlink()
    assert call(tmp_path, "--to", "shards", "--out", tmp_path / "out") == 3
    assert "no longer fits its files" in capsys.readouterr().err
    (tmp_path / "a.jpg").write_bytes(bytes(len(GOOD["baseline.jpg"])))
    assert call(tmp_path, "--to", "shards", "--out", tmp_path / "out") == 3
    assert "None of the 1 images can be used; the first, a.jpg" in capsys.readouterr().err


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than any disk holds: files with nothing in them but their length."""
    n, length = 300, 2**40
    for i in range(n):
        with open(tmp_path / f"{i:03}.jpg", "wb") as file:
            file.truncate(length)
    keys = pa.array([f"{i:03}.jpg" for i in range(n)], pa.large_string())
    numbers = {"offset": 0, "length": length, "width": 9, "height": 9, "label": -1}
    columns = {name: np.full(n, value) for name, value in numbers.items()}
    table = pa.table({"key": keys, "path": keys, **columns}).cast(COLUMNS)
    about = {"version": 1, "classes": [], "root": ".", "root_absolute": str(tmp_path)}
    write_table(table, about, tmp_path / "index.parquet")
    assert call(tmp_path, "--to", "shards", "--shard-size", "2TiB", "--out", tmp_path / "out") == 4
    shown = capsys.readouterr()
    assert "GB are free" in shown.err
    assert "329853.49 GB" in shown.out, "the estimate came first"
    assert not tars(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000000", 10**6), ("512MiB", 2**29), ("512 mib", 2**29), ("1GB", 10**9), ("1.5KiB", 1536), ("7B", 7)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert byte_size(text, "--shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1e9", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        byte_size(text, "--shard-size")
