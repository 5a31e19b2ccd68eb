"""The index: what a folder holds, in which order, what is left out and why; reading it back; every way it can fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvp_fast.cli.main import main
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.samples.index import COLUMNS, METADATA_KEY, Index
from mvp_fast.samples.index_build import HEADERS_A_PROCESS, IndexReport, build_index, processes, write_table
from mvp_fast.samples.probe import CHUNK, probe, probe_all

KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}


def draw(path: Path, width: int = 20, height: int = 10, kind: str = "", mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, height), 50).convert(mode).save(path, kind or KINDS[path.suffix.lower()], **options)
    return path


def build(root: Path, **options: Any) -> IndexReport:
    return build_index(root, **{"workers": 1, **options})


def keys(index: Index) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def reasons(report: IndexReport) -> dict[str, str]:
    return {entry.path: entry.reason for entry in report.bad}


def test_a_tree_of_classes(tmp_path: Path) -> None:
    files = {
        "b/deep/er/2.JPEG": (30, 20),
        "b/1.png": (31, 21),
        "a/z.webp": (32, 22),
        "a/Z.GIF": (33, 23),
        "é c/ü x.bmp": (34, 24),
        "B/1.jpeg": (35, 25),
    }
    for name, (width, height) in files.items():
        draw(tmp_path / name, width, height)
    for name in ("a/notes.txt", "a/.hidden.jpg", ".cache/x.jpg", "b/.thumbs/x.jpg", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    report = build(tmp_path)
    index = Index.open(tmp_path)
    assert report.path == index.path == tmp_path / "index.parquet"
    assert report.bad == []
    assert not report.bad_path.exists()
    assert index.classes == report.classes == ["B", "a", "b", "é c"]
    assert keys(index) == ["B/1.jpeg", "a/Z.GIF", "a/z.webp", "b/1.png", "b/deep/er/2.JPEG", "é c/ü x.bmp"]
    assert index.label.tolist() == [0, 1, 1, 2, 2, 3]
    assert list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == [files[key] for key in keys(index)]
    assert [index.file(i) for i in range(6)] == [tmp_path / key for key in keys(index)]
    assert index.length.tolist() == [index.file(i).stat().st_size for i in range(6)]
    assert index.offset.tolist() == [0] * 6
    assert (report.images, report.bytes) == (6, index.length.sum())
    dtypes = [index.offset.dtype, index.length.dtype, index.width.dtype, index.height.dtype, index.label.dtype]
    assert dtypes == [np.int64, np.int64, np.int32, np.int32, np.int32]
    index.check_files()


def test_classes_are_those_of_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for i, name in enumerate(("n02", "n01", "N03", "_x", "n01/sub", "ö")):
        draw(tmp_path / name / f"{i}.jpg")
    build(tmp_path)
    index, reference = Index.open(tmp_path), ImageFolder(str(tmp_path))
    assert index.classes == reference.classes
    ours = {str(index.file(i)): int(index.label[i]) for i in range(len(index))}
    assert ours == dict(reference.samples)


def test_a_flat_folder_and_a_mixed_one(tmp_path: Path) -> None:
    draw(tmp_path / "2.jpg")
    draw(tmp_path / "1.png")
    build(tmp_path)
    flat = Index.open(tmp_path)
    assert (keys(flat), flat.classes, flat.label.tolist()) == (["1.png", "2.jpg"], [], [-1, -1])
    draw(tmp_path / "0" / "x.jpg")
    build(tmp_path)
    mixed = Index.open(tmp_path)
    assert (keys(mixed), mixed.classes, mixed.label.tolist()) == (["1.png", "2.jpg", "0/x.jpg"], ["0"], [-1, -1, 0])


def test_sizes_are_those_that_are_stored(tmp_path: Path) -> None:
    """EXIF orientation 6 turns the image for display only; PIL's own size of the decoded pixels is the reference."""
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "turned.jpg", 40, 30, exif=exif)
    draw(tmp_path / "cmyk.jpg", 17, 5, mode="CMYK")
    draw(tmp_path / "grey.jpg", 1, 1, mode="L")
    draw(tmp_path / "png_named.JPEG", 3, 300, "PNG", mode="P")
    draw(tmp_path / "alpha.webp", 9, 8, mode="RGBA")
    draw(tmp_path / "progressive.jpg", 64, 48, progressive=True)
    assert build(tmp_path).bad == []
    index = Index.open(tmp_path)
    for i in range(len(index)):
        with Image.open(index.file(i)) as image:
            image.load()
            assert (index.width[i], index.height[i]) == image.size, index.key(i)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert image.getexif()[0x0112] == 6


def test_masks_that_mirror_the_images_are_left_out(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw(tmp_path / name / "1.jpg")
        draw(tmp_path / "masks" / name / "1.png")
        draw(tmp_path / name / "masks" / "2.jpg")  # not at the top: part of its class
    (tmp_path / "scenes.partial").mkdir()
    draw(tmp_path / "scenes.partial" / "half.jpg")
    build(tmp_path)
    index = Index.open(tmp_path)
    assert index.classes == ["cat", "dog"]
    assert keys(index) == ["cat/1.jpg", "cat/masks/2.jpg", "dog/1.jpg", "dog/masks/2.jpg"]


@pytest.mark.parametrize("inside", ["1.jpg", "venetian/1.jpg"])
def test_a_class_named_masks_is_a_class(tmp_path: Path, inside: str) -> None:
    draw(tmp_path / "hats" / "1.jpg")
    draw(tmp_path / "masks" / inside)
    build(tmp_path)
    assert Index.open(tmp_path).classes == ["hats", "masks"]


def spoil(root: Path) -> dict[str, str]:
    """A folder of good images and of bad ones of every kind; returns the bad ones and what is said of them."""
    draw(root / "a" / "good.jpg", 50, 40)
    draw(root / "c" / "good.png")
    whole = draw(root / "c" / "whole.jpg", 200, 150).read_bytes()
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "a" / "empty.png").touch()
    (root / "a" / "text.jpg").write_text("no image at all")
    (root / "a" / "head.jpg").write_bytes(whole[:60])
    (root / "a" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "a" / "self.jpg").symlink_to(root / "a" / "self.jpg")
    (root / "b").mkdir()
    (root / "b" / "only.tiff.jpg").write_bytes(b"II*\0" + bytes(200))  # a TIFF: not among the formats
    draw(root / "b" / "png.png", 40, 40)
    broken = (root / "b" / "png.png").read_bytes()
    (root / "b" / "png.png").write_bytes(broken[:12] + b"XXXX" + broken[16:])
    with open(os.path.join(os.fsencode(root / "a"), b"\xff.jpg"), "wb") as file:
        file.write(whole)
    return {
        "a/empty.png": "the file is empty",
        "a/gone.jpg": "No such file",
        "a/head.jpg": "",
        "a/pipe.jpg": "not a regular file",
        "a/self.jpg": "symbolic links",
        "a/text.jpg": "none of JPEG",
        "a/\\udcff.jpg": "not UTF-8",
        "b/only.tiff.jpg": "none of JPEG",
        "b/png.png": "",
    }


@pytest.mark.parametrize("verify", [False, True])
def test_bad_files_are_listed_and_left_out(tmp_path: Path, verify: bool) -> None:
    wanted = spoil(tmp_path)
    report = build(tmp_path, verify=verify)
    found = reasons(report)
    assert found.keys() == wanted.keys()
    for path, part in wanted.items():
        assert found[path]
        assert part in found[path]
    listed = [json.loads(line) for line in report.bad_path.read_text().splitlines()]
    assert report.bad_path == tmp_path / "index.bad.jsonl"
    assert {entry["path"]: entry["reason"] for entry in listed} == found
    assert [entry["path"] for entry in listed] == sorted(found)
    index = Index.open(tmp_path)
    assert keys(index) == ["a/good.jpg", "c/good.png", "c/whole.jpg"]
    assert index.classes == ["a", "b", "c"], "a class whose images are all bad keeps its label"
    assert index.label.tolist() == [0, 2, 2]


def test_the_list_of_bad_files_goes_with_its_cause(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").touch()
    assert build(tmp_path).bad_path.exists()
    draw(tmp_path / "2.jpg")
    assert not build(tmp_path).bad_path.exists()


def test_verify_finds_what_headers_hide(tmp_path: Path) -> None:
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".gif"):
        data = draw(tmp_path / f"whole{suffix}", 120, 90).read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) // 2])
    quick = build(tmp_path)
    assert "cut.jpg" not in reasons(quick)
    slow = build(tmp_path, verify=True)
    assert set(reasons(slow)) == {f"cut{suffix}" for suffix in (".jpg", ".png", ".webp", ".bmp", ".gif")}
    assert "cut short" in reasons(slow)["cut.jpg"]
    assert len(Index.open(tmp_path)) == 5


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "1.jpg")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    build(root)
    assert keys(Index.open(root)) == ["a/1.jpg", "b/1.jpg"]


def test_a_folder_may_end_like_an_image(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "odd.jpg" / "1.jpg")
    assert build(tmp_path).bad == []
    assert keys(Index.open(tmp_path)) == ["a/odd.jpg/1.jpg"]


def test_other_processes_are_started_where_they_pay() -> None:
    cores = len(os.sched_getaffinity(0))
    assert [processes(HEADERS_A_PROCESS - 1, False), processes(HEADERS_A_PROCESS, False)] == [1, cores]
    assert processes(1, True) == cores, "decoding pays at once; a single chunk stays here all the same"


def test_any_number_of_workers_writes_the_same(tmp_path: Path) -> None:
    for i in range(2 * CHUNK + 10):
        draw(tmp_path / "data" / f"{i % 7}" / f"{i}.bmp", 1 + i % 50, 1 + i // 50)
    (tmp_path / "data" / "3" / "bad.jpg").write_text("no")
    calls: list[tuple[int, int]] = []
    options = {"verify": True, "progress": lambda done, total: calls.append((done, total))}
    alone = build(tmp_path / "data", out=tmp_path / "1.parquet", workers=1, **options)
    total = 2 * CHUNK + 11
    assert calls == [(CHUNK, total), (2 * CHUNK, total), (total, total)]
    many = build(tmp_path / "data", out=tmp_path / "2.parquet", workers=2, **options)
    assert calls[3:] == calls[:3]
    assert many.bad == alone.bad
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_processes_look_into_files_and_end(tmp_path: Path) -> None:
    import psutil

    paths = [draw(tmp_path / f"{i}.bmp", 1 + i % 9, 1).name for i in range(CHUNK + 1)]

    def workers() -> set[int]:
        return {child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())}

    before = workers()
    reading = probe_all(str(tmp_path), paths, False, 2)
    first = next(reading)
    assert len(workers() - before) == 2
    assert first == [probe(str(tmp_path / path), False) for path in paths[:CHUNK]]
    reading.close()
    assert not workers() - before


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda root: None, "can't be read"),
        (lambda root: root.mkdir(), "holds no image file"),
        (lambda root: root.write_text("a file"), "Not a directory"),
        (lambda root: root.symlink_to(root), "symbolic links"),
        (lambda root: (root / "a").mkdir(parents=True) or (root / "a" / "x.txt").touch(), "holds no image file"),
        (
            lambda root: root.mkdir() or (root / "x.jpg").touch(),
            "None of the 1 image files can be used; the first, x.jpg",
        ),
    ],
)
def test_nothing_to_index(tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, said: str) -> None:
    root = tmp_path / "data"
    prepare(root)
    with pytest.raises(DataError) as caught:
        build(root)
    assert said in caught.value.paragraph()
    assert str(root) in caught.value.paragraph()
    assert main(["data", "index", str(root), "--workers", "1"]) == 3
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert not (root / "index.parquet").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_build_leaves_the_old_index(tmp_path: Path) -> None:
    image = draw(tmp_path / "1.jpg")
    build(tmp_path)
    before = (tmp_path / "index.parquet").read_bytes()
    image.write_text("spoiled")
    with pytest.raises(DataError, match="None of the 1"):
        build(tmp_path)
    assert (tmp_path / "index.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jpg", "index.bad.jsonl", "index.parquet"]


def test_places_where_no_index_can_be_written(tmp_path: Path) -> None:
    draw(tmp_path / "data" / "1.jpg")
    with pytest.raises(DataError, match="is a folder"):
        build(tmp_path / "data", out=tmp_path)
    with pytest.raises(EnvironmentProblem, match="can't be written"):
        build(tmp_path / "data", out=tmp_path / "data" / "1.jpg" / "index.parquet")
    with pytest.raises(ConfigError, match="processes"):
        build(tmp_path / "data", workers=-1)


def sample_table(**changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "key": ["a/1.jpg", "b/2.jpg"],
        "path": ["a/1.jpg", "b/2.jpg"],
        "offset": [0, 0],
        "length": [5, 6],
        "width": [7, 8],
        "height": [9, 10],
        "label": [0, 1],
    }
    return pa.table({**columns, **changes}, schema=COLUMNS)


ABOUT = {"version": 1, "classes": ["a", "b"], "root": ".", "root_absolute": "/nowhere"}


def write_other(path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a cat"]}), path)


def write_columns(path: Path) -> None:
    table = sample_table().drop_columns(["offset"])
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(ABOUT).encode()}), path)


def write_about(path: Path, **changes: Any) -> None:
    write_table(sample_table(), {**ABOUT, **changes}, path)


def write_cut(path: Path) -> None:
    write_about(path)
    path.write_bytes(path.read_bytes()[:-50])


def write_damaged(path: Path) -> None:
    write_about(path)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "There is no index here"),
        (lambda path: path.mkdir(), "There is no index here"),
        (lambda path: path.write_text("key,path\n"), "can't be read as Parquet"),
        (lambda path: path.touch(), "can't be read as Parquet"),
        (write_cut, "can't be read as Parquet"),
        (write_damaged, "can't be read as Parquet"),
        (write_other, "no index of mvp-fast"),
        (lambda path: write_about(path, version=2), "version 2, but this mvp-fast reads version 1"),
        (write_columns, "other columns than version 1"),
        (lambda path: write_about(path, classes="a"), "other columns than version 1"),
        (lambda path: write_table(sample_table().slice(0, 0), ABOUT, path), "empty"),
        (lambda path: write_table(sample_table(width=[7, 0]), ABOUT, path), "impossible values in width"),
        (lambda path: write_table(sample_table(offset=[-1, 0], length=[0, 1]), ABOUT, path), "in offset, length"),
        (lambda path: write_table(sample_table(label=[0, 2]), ABOUT, path), "impossible values in label"),
        (lambda path: write_table(sample_table(label=[0, -2]), ABOUT, path), "impossible values in label"),
    ],
)
def test_what_is_no_index(tmp_path: Path, prepare: Any, said: str) -> None:
    path = tmp_path / "index.parquet"
    prepare(path)
    with pytest.raises(DataError) as caught:
        Index.open(path)
    paragraph = caught.value.paragraph()
    assert said in paragraph
    assert str(path) in paragraph
    assert "mvp-fast data index DIR" in paragraph
    assert "\n" not in paragraph


def test_several_row_groups_and_samples_within_files(tmp_path: Path) -> None:
    n = 300_000
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "key": [f"{i:06d}" for i in range(n)],
            "path": [f"shard-{i // 1000}.tar" for i in range(n)],
            "offset": np.arange(n) % 1000 * 512,
            "length": rng.integers(1, 512, n),
            "width": rng.integers(1, 999, n),
            "height": rng.integers(1, 999, n),
            "label": rng.integers(-1, 2, n),
        },
    ).cast(COLUMNS)
    path = tmp_path / "shards.parquet"
    write_table(table, ABOUT, path)
    assert pq.ParquetFile(path).num_row_groups == 3
    index = Index.open(path)
    assert len(index) == n
    for name in ("offset", "length", "width", "height", "label"):
        assert np.array_equal(getattr(index, name), table[name].to_numpy())
    for i in (0, 131_071, 131_072, n - 1, np.int64(5)):
        assert (index.key(i), index.file(i)) == (f"{i:06d}", tmp_path / f"shard-{i // 1000}.tar")


def test_an_index_does_not_change(tmp_path: Path) -> None:
    write_about(tmp_path / "index.parquet")
    index = Index.open(tmp_path)
    for name in ("offset", "length", "width", "height", "label"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(index, name)[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.path = Path("other")  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(index))
    assert (keys(copy), copy.fingerprint(), copy.path) == (keys(index), index.fingerprint(), index.path)
    assert repr(index) == f"Index('{tmp_path}/index.parquet', 2 images, 2 classes)"


def slow_fingerprint(index: Index) -> str:
    n = len(index)
    names = [index.key(i).encode() for i in range(n)]
    digest = hashlib.sha256(json.dumps(["mvp_fast.index", 1, n, index.classes]).encode())
    digest.update(b"".join(len(name).to_bytes(8, "little") for name in names) + b"".join(names))
    for name, size in (("offset", 8), ("length", 8), ("width", 4), ("height", 4), ("label", 4)):
        digest.update(b"".join(int(x).to_bytes(size, "little", signed=True) for x in getattr(index, name)))
    return digest.hexdigest()


def test_fingerprint(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"key": ["a/1.jp", "gb/2.jpg"]},
        {"key": ["b/2.jpg", "a/1.jpg"]},
        {"offset": [0, 1]},
        {"length": [6, 5]},
        {"width": [8, 7]},
        {"height": [9, 11]},
        {"label": [0, -1]},
    ]
    found = []
    for change in changes:
        write_table(sample_table(**change), ABOUT, tmp_path / "index.parquet")
        index = Index.open(tmp_path)
        assert index.fingerprint() == index.fingerprint() == slow_fingerprint(index)
        found.append(index.fingerprint())
    write_about(tmp_path / "index.parquet", classes=["a", "c"])
    found.append(Index.open(tmp_path).fingerprint())
    assert len(set(found)) == len(found)
    write_about(tmp_path / "elsewhere.parquet", root_absolute="/other")
    assert Index.open(tmp_path / "elsewhere.parquet").fingerprint() == found[0]


def test_data_and_index_may_move(tmp_path: Path) -> None:
    draw(tmp_path / "data" / "a" / "1.jpg")
    build(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copy = Index.open(tmp_path / "copy")
    assert copy.root == tmp_path / "copy"
    assert copy.fingerprint() == Index.open(tmp_path / "data").fingerprint()
    (tmp_path / "indexes").mkdir()
    shutil.move(tmp_path / "data" / "index.parquet", tmp_path / "indexes" / "train.parquet")
    alone = Index.open(tmp_path / "indexes" / "train.parquet")
    assert alone.root == tmp_path / "data"
    alone.check_files()


def test_an_index_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "here" / "data" / "1.jpg")
    monkeypatch.chdir(tmp_path / "here")
    build(Path("data"), out="indexes/train.parquet")
    index = Index.open("indexes/train.parquet")
    assert index.root == tmp_path / "here" / "data"
    index.check_files()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert Index.open(tmp_path / "there" / "indexes" / "train.parquet").root == tmp_path / "there" / "data"


@pytest.mark.parametrize("out", ["", "other.parquet"])
def test_files_that_no_longer_fit(tmp_path: Path, out: str) -> None:
    files = [draw(tmp_path / "a" / f"{i:03d}.jpg") for i in range(100)]
    index = Index.open(build(tmp_path, out=tmp_path / out if out else None).path)
    index.check_files(100)
    indexed = files[70].stat().st_size
    files[70].write_bytes(b"longer" * 1000)
    with pytest.raises(DataError) as caught:
        index.check_files(100)
    said = caught.value.paragraph()
    assert "The index no longer fits its files" in said
    assert f"{files[70]} is 6000 bytes long, {indexed} in the index" in said
    assert f"`mvp-fast data index {tmp_path}{f' --out {index.path}' if out else ''}`" in said
    files[20].unlink()
    with pytest.raises(DataError, match=r"020.jpg should be \d+ bytes long, but: No such file"):
        index.check_files(100)
    index.check_files(2)  # the first and the last alone
    index.check_files(0)
    files[99].unlink()
    with pytest.raises(DataError, match=r"099.jpg"):
        index.check_files(2)


def test_shards_that_end_too_early(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(10))
    table = sample_table(path=["shard", "shard"], offset=[0, 4], length=[4, 6])
    write_table(table, ABOUT, tmp_path / "index.parquet")
    index = Index.open(tmp_path)
    index.check_files()
    (tmp_path / "shard").write_bytes(bytes(9))
    with pytest.raises(DataError, match=r"shard is 9 bytes long, sample b/2.jpg needs 10"):
        index.check_files()


def test_synthetic() -> None:
    index = Index.synthetic()
    assert (len(index), index.classes, index.is_synthetic) == (1_281_167, [], True)
    assert {int(index.width[i]) for i in (0, 9, -1)} == {500}
    assert (index.height[5], index.label[5], index.length.dtype, index.width.dtype) == (375, -1, np.int64, np.int32)
    assert index.key(3) != index.key(4)
    with pytest.raises(IndexError):
        index.key(1_281_167)
    with pytest.raises(DataError, match="no files"):
        index.file(0)
    index.check_files()
    others = [Index.synthetic(5), Index.synthetic(6), Index.synthetic(5, width=1), Index.synthetic(5, height=1)]
    assert len({other.fingerprint() for other in others}) == 4
    assert Index.synthetic(5).fingerprint() == others[0].fingerprint()
    assert sum(array.base.nbytes for array in (index.offset, index.width) if array.base is not None) < 100
    for images, width in ((0, 5), (5, 0)):
        with pytest.raises(ConfigError, match="1 image or more"):
            Index.synthetic(images, width)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        draw(tmp_path / f"class {i}" / "1.jpg", 100, 80)
    for i in range(12):
        (tmp_path / "class 0" / f"bad{i:02d}.jpg").touch()
    out = tmp_path / "elsewhere" / "my.parquet"
    assert main(["data", "index", str(tmp_path), "--out", str(out), "--verify", "--workers", "1"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("images   3 in 3 classes, 0.00 GB, ")
    assert "every image decoded" in lines[1]
    assert lines[2] == f"bad      12 left out, listed in {tmp_path / 'elsewhere' / 'my.bad.jsonl'}"
    assert [line.strip() for line in lines[3:13]] == [f"class 0/bad{i:02d}.jpg: the file is empty" for i in range(10)]
    assert lines[13].strip() == "and 2 more"
    assert lines[14] == f"index    {out}"
    assert shown.err == ""
    assert len(Index.open(out)) == 3
    assert not (tmp_path / "index.parquet").exists()


def test_the_verb_on_a_flat_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "1.jpg")
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "1 in no class folders" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path), "--out", "/dev/null/x"]) == 4
    assert main(["data", "index", str(tmp_path), "--workers", "-2"]) == 2
