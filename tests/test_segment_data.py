"""Segmentation's data: layouts, legends, masks, crops of images and masks that fit to the pixel, and bad input."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvp_fast.config.schema import DataConfig
from mvp_fast.config.segment import SegmentConfig
from mvp_fast.errors import ConfigError, DataError, UserError
from mvp_fast.evaluate.segment.folders import find_place, open_sets
from mvp_fast.evaluate.segment.legend import IGNORED, UNKNOWN, find_legend, make_legend
from mvp_fast.evaluate.segment.loader import MaskLoader, crop_mask
from mvp_fast.evaluate.segment.masks import LabelledSet
from mvp_fast.evaluate.segment.plan import SegmentPlan, base_scale
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.random import Stream, draws
from tests.segment_cases import COLOURS, renderings, save_mask

FIVE = make_legend(("black", "red", "green", "blue", "white"), (0, 1, 2, 3, 4), (255,))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve renderings with an index; read only."""
    root = renderings(tmp_path_factory.mktemp("drawn") / "set", 12)
    build_index(root / "images", workers=1)
    return root


def labelled(root: Path) -> LabelledSet:
    return LabelledSet(Index.open(root / "images"), root / "masks", FIVE)


def plan_of(index: Index, **settings: object) -> SegmentPlan:
    data = DataConfig(image_size=64, repeat=settings.pop("repeat", 1))  # type: ignore[arg-type]
    return SegmentPlan(index, **{"seed": 3, "batch_size": 6, "data": data, "scale": (0.5, 2.0), **settings})  # type: ignore[arg-type]


def batches(plan: SegmentPlan, of: LabelledSet, loader: str, count: int, start: int = 0) -> list[Batch]:
    config = replace(plan.data, threads=2, bad_sample_budget=0.5)
    with closing(MaskLoader(make_loader(loader, config), of, 2)) as made, closing(made.batches(plan, start)) as stream:
        return list(islice(stream, count))


# Plan


def test_boxes_are_those_of_a_scaled_image(drawn: Path) -> None:
    """Against a slow reference, row by row."""
    plan = plan_of(labelled(drawn).index, shorter_side=80)
    rows = plan.rows(np.arange(20)[:, None].repeat(12, 1).ravel(), np.tile(np.arange(12), 20))
    words_B4 = draws(3, Stream.CROP, rows.epoch_B, rows.position_B, 0)
    cut, factors = 0, []
    for i in range(len(rows)):
        width, height = int(plan.index.width[rows.sample_B[i]]), int(plan.index.height[rows.sample_B[i]])
        factors.append(0.5 + 1.5 * int(words_B4[i, 0]) / 2**32)
        side = 64 / (factors[-1] * 80 / min(width, height))  # of the crop, in pixels of the stored image
        w, h = min(side, width), min(side, height)
        if w > h:
            w = min(w, h * 4 / 3)
        else:
            h = min(h, w * 4 / 3)
        w, h = round(w), round(h)
        x, y = int(words_B4[i, 1]) * (width - w + 1) >> 32, int(words_B4[i, 2]) * (height - h + 1) >> 32
        assert [int(column[i]) for column in (rows.x_B, rows.y_B, rows.width_B, rows.height_B)] == [x, y, w, h]
        assert x + w <= width
        assert y + h <= height
        cut += w != h
    assert 10 < cut < 120
    assert min(factors) < 0.55
    assert max(factors) > 1.95
    assert not rows.mask_BN.any()
    assert 0.4 < rows.flip_B.mean() < 0.6


def test_without_jitter_boxes_are_crops(drawn: Path) -> None:
    """Factor 1 at the image's own size: no resize, every place possible."""
    plan = plan_of(labelled(drawn).index, scale=(1.0, 1.0))
    rows = plan.rows(np.arange(300), 5)
    assert set(rows.width_B.tolist()) == set(rows.height_B.tolist()) == {64}
    sample = rows.sample_B == rows.sample_B[0]
    room = int(plan.index.width[rows.sample_B[0]]) - 64
    assert rows.x_B[sample].max() <= room
    assert len(set(rows.x_B.tolist())) > 20


def test_small_images_are_scaled_up_to_a_crop() -> None:
    assert base_scale(np.array([32, 64, 128]), 64, 0).tolist() == [2, 1, 1]
    assert base_scale(np.array([32, 64, 128]), 64, 96).tolist() == [3, 1.5, 0.75]
    assert base_scale(np.array([128]), 64, 16).tolist() == [0.5]
    index = Index.synthetic(images=50, width=40, height=30)
    rows = plan_of(index).rows(np.arange(50), np.arange(50))
    assert rows.height_B.max() == 30
    assert rows.width_B.max() == 40


def test_ranks_share_the_plan_and_its_state_tells_settings_apart(drawn: Path) -> None:
    plan = plan_of(labelled(drawn).index)
    halves = [plan.part(rank, 2).step(4) for rank in (0, 1)]
    whole = plan.step(4)
    for name in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B"):
        assert np.concatenate([getattr(half, name) for half in halves]).tolist() == getattr(whole, name).tolist()
    others = [plan_of(plan.index, scale=(0.5, 1.0)), plan_of(plan.index, shorter_side=64), plan_of(plan.index, seed=4)]
    assert len({json.dumps(each.state()) for each in (plan, plan.part(1, 2), *others)}) == 4


# Crops of masks


@pytest.mark.parametrize("flip", [False, True])
def test_crop_of_a_mask_is_the_nearest_pixel(flip: bool) -> None:
    rng = np.random.default_rng(0)
    mask_HW = rng.integers(0, 250, (50, 37))
    plan = plan_of(Index.synthetic(images=1, width=37, height=50))
    for size in (1, 7, 16, 64):
        for x, y, w, h in ((0, 0, 37, 50), (3, 9, 1, 1), (5, 2, 16, 16), (10, 20, 27, 30), (36, 0, 1, 50)):
            row = replace(
                plan.rows(0, 0),
                **{
                    name: np.array([value])
                    for name, value in (("x_B", x), ("y_B", y), ("width_B", w), ("height_B", h), ("flip_B", flip))
                },
            )
            found = crop_mask(mask_HW, row, size)
            for i in range(size):
                for j in range(size):
                    across = size - 1 - j if flip else j
                    down = y + int(np.floor((i + 0.5) * h / size))
                    assert found[i, j] == mask_HW[down, x + int(np.floor((across + 0.5) * w / size))]


@pytest.mark.parametrize("loader", ["torchvision", "cpu", "dali"])
def test_crops_that_are_not_resized_fit_in_every_pixel(drawn: Path, loader: str) -> None:
    """The image is a rendering of the mask: every pixel's colour is its class's, flipped or not."""
    of = labelled(drawn)
    found = batches(plan_of(of.index, scale=(1.0, 1.0)), of, loader, 4)
    for batch in found:
        assert batch.target is not None
        assert batch.target.dtype.is_signed
        assert (batch.images_BHWC.numpy() == COLOURS[batch.target.numpy()]).all()
    assert {bool(flip) for batch in found for flip in batch.rows.flip_B} == {True, False}


def test_resized_crops_fit_better_than_any_shifted(drawn: Path) -> None:
    """Bicubic colours against the nearest class: they agree but at edges, and less so a pixel away in any direction."""
    of = labelled(drawn)
    for batch in batches(plan_of(of.index), of, "torchvision", 3):
        assert batch.target is not None
        images_BHWC = batch.images_BHWC.numpy().astype(int)
        distance_BHWC = np.abs(images_BHWC[..., None, :] - COLOURS.astype(int)).sum(-1)
        seen_BHW, target_BHW = distance_BHWC.argmin(-1), batch.target.numpy()
        agreement = {
            (down, across): (np.roll(target_BHW, (down, across), (1, 2)) == seen_BHW)[:, 2:-2, 2:-2].mean((1, 2))
            for down in (-1, 0, 1)
            for across in (-1, 0, 1)
        }
        at_rest = agreement.pop((0, 0))
        assert at_rest.min() > 0.9
        for other in agreement.values():
            assert (at_rest > other).all()


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_stand_in_brings_its_own_mask(drawn: Path, tmp_path: Path, repeat: int) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "set"))
    of = labelled(root)
    for bad in (2, 7):
        of.index.file(bad).write_bytes(bytes(int(of.index.length[bad])))
        of.mask_file(bad).write_bytes(b"no mask either: nobody asks for it")
    plan = plan_of(of.index, scale=(1.0, 1.0), repeat=repeat)
    found = batches(plan, of, "torchvision", 2 * repeat)
    assert sum(int((batch.rows.attempt_B > 0).sum()) for batch in found) >= 2 * repeat
    for batch in found:
        assert batch.target is not None
        assert (batch.images_BHWC.numpy() == COLOURS[batch.target.numpy()]).all()


def test_a_loader_begins_anywhere(drawn: Path) -> None:
    of = labelled(drawn)
    plan = plan_of(of.index)
    whole, late = batches(plan, of, "torchvision", 4), batches(plan, of, "torchvision", 2, start=2)
    for one, other in zip(whole[2:], late, strict=True):
        assert one.target is not None
        assert other.target is not None
        assert (one.step, one.target.tolist()) == (other.step, other.target.tolist())


def test_a_bad_value_ends_the_passage(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "set"))
    of = labelled(root)
    for sample in range(len(of)):
        size = int(of.index.height[sample]), int(of.index.width[sample])
        save_mask(of.mask_file(sample), np.full(size, 17), "grey 8")
    with pytest.raises(
        DataError, match=r"values that mean nothing: 17\. It may have 0 to 4 for its 5 classes, and 255"
    ):
        batches(plan_of(of.index), of, "torchvision", 1)


# Masks in files


@pytest.mark.parametrize("kind", ["palette", "grey 8", "grey 16"])
def test_kinds_of_masks(tmp_path: Path, kind: str) -> None:
    root = renderings(tmp_path / "set", 2, kind)
    build_index(root / "images", workers=1)
    of = labelled(root)
    of.check()
    for sample in range(2):
        image_HWC = np.asarray(Image.open(of.index.file(sample)))
        assert (COLOURS[of.read(sample)] == image_HWC).all()


def test_values_of_sixteen_bits(tmp_path: Path) -> None:
    root = renderings(tmp_path / "set", 1, sizes=(8, 9))
    build_index(root / "images", workers=1)
    values_HW = np.array([0, 300, 65535, 1, 2, 299, 300, 0] * 8).reshape(8, 8)
    save_mask(root / "masks" / "some" / "0.png", values_HW, "grey 16")
    legend = make_legend(tuple(map(str, range(301))), tuple(range(301)), (65535,))
    found_HW = LabelledSet(Index.open(root / "images"), root / "masks", legend).read(0)
    assert found_HW[0].tolist() == [0, 300, IGNORED, 1, 2, 299, 300, 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), r"1 of 12 masks can't be used: .*0\.png: missing"),
        (lambda file: file.write_bytes(b"text"), "no PNG file"),
        (lambda file: Image.open(file).resize((9, 8)).save(file), r"9x8 pixels, its image \d+x\d+"),
        (lambda file: Image.open(file).convert("RGB").save(file), "a colour image, not one number a pixel"),
        (lambda file: Image.open(file).convert("LA").save(file), "grey with transparency"),
        (lambda file: Image.open(file).convert("RGB").save(file, format="JPEG"), "no PNG file"),
    ],
    ids=["missing", "text", "size", "colours", "transparency", "JPEG"],
)
def test_bad_masks_are_named_at_the_start_and_when_read(drawn: Path, tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    root = Path(shutil.copytree(drawn, tmp_path / "set"))
    of = labelled(root)
    of.check()
    spoil(of.mask_file(0))
    with pytest.raises(DataError, match=message):
        of.check()
    with pytest.raises(DataError, match=r"0\.png"):
        of.read(0)


def test_a_damaged_mask_is_named(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "set"))
    of = labelled(root)
    data = bytearray(of.mask_file(3).read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    of.mask_file(3).write_bytes(data)
    of.check()  # its header is sound
    with pytest.raises(DataError, match="The mask can't be read"):
        of.read(3)


# Legends and layouts


def test_legends(scenes: Path, tmp_path: Path) -> None:
    of_scenes = find_legend(SegmentConfig(), [scenes], ade=False)
    assert of_scenes.names[:3] == ("ground", "arrow", "circle")
    assert of_scenes.class_of[[0, 10, 11, 255]].tolist() == [0, 10, UNKNOWN, IGNORED]
    objects = find_legend(SegmentConfig(ignore=(0, 255)), [scenes], ade=False)
    assert (objects.names[0], objects.value_of[0], objects.class_of[0]) == ("arrow", 1, IGNORED)
    reduced = find_legend(SegmentConfig(reduce_zero_label="yes"), [scenes], ade=False)
    assert (reduced.names, reduced.value_of) == (objects.names, objects.value_of)
    ade = find_legend(SegmentConfig(), [tmp_path], ade=True)
    assert len(ade) == 150
    assert ade.class_of[[0, 1, 150, 151]].tolist() == [IGNORED, 0, 149, UNKNOWN]
    rows = "".join(f"{i}\t0.1\t1\t1\t0\tname{i}, other{i}\n" for i in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    assert find_legend(SegmentConfig(), [tmp_path], ade=True).names[149] == "name150"
    numbered = find_legend(SegmentConfig(num_classes=3), [tmp_path], ade=False)
    assert numbered.class_of[[0, 2, 3]].tolist() == [0, 2, UNKNOWN]
    (tmp_path / "names.txt").write_text("sky\ntree\n\n")
    named = find_legend(SegmentConfig(classes=str(tmp_path / "names.txt")), [scenes], ade=False)
    assert named.names == ("sky", "tree")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (SegmentConfig(), ConfigError, "Nothing says which classes"),
        (SegmentConfig(classes="none.txt"), ConfigError, "can't be read: No such file"),
        (SegmentConfig(num_classes=2, ignore=(1,)), ConfigError, "2 to 32767 classes, and 1"),
    ],
    ids=["no names", "no file", "too few"],
)
def test_bad_legends(config: SegmentConfig, kind: type[UserError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        find_legend(config, [tmp_path], ade=False)


def test_a_damaged_scenes_file(tmp_path: Path) -> None:
    (tmp_path / "scenes.json").write_text('{"mask_legend": {"a": "ground"}}')
    with pytest.raises(DataError, match="no mask_legend that can be read"):
        find_legend(SegmentConfig(), [tmp_path], ade=False)


def opened(tmp_path: Path, **settings: object) -> tuple[LabelledSet, LabelledSet]:
    return open_sets(SegmentConfig(**settings), tmp_path / "store", True, True, lambda: None)  # type: ignore[arg-type]


def test_layouts(drawn: Path, scenes: Path, tmp_path: Path) -> None:
    classes = str(drawn / "classes.txt")
    # The synthetic set as it is, with and without an index
    train, val = opened(tmp_path, train=str(scenes), val=str(scenes))
    assert (len(train), len(val), train.masks) == (96, 96, scenes / "masks")
    assert train.index.path == scenes / "index.parquet"
    train.read(5)
    # images/ and masks/, from above and from within
    for given in (drawn, drawn / "images", drawn / "images" / "index.parquet"):
        train, _ = opened(tmp_path, train=str(given), val=str(drawn), classes=classes)
        assert train.masks == drawn / "masks"
    # ADE20K's, whole and a part of it
    ade = tmp_path / "ade"
    for part, name in (("training", "train"), ("validation", "val")):
        shutil.copytree(drawn / "images" / "some", ade / "images" / part)
        for file in (drawn / "masks" / "some").iterdir():
            save_mask(ade / "annotations" / part / file.name, np.asarray(Image.open(file)), "grey 8")
        assert find_place(str(ade), name).ade
    train, val = opened(tmp_path, train=str(ade))
    assert (len(train), len(val), len(train.legend)) == (12, 12, 150)
    assert train.read(0).min() == IGNORED
    assert val.index.path == tmp_path / "store" / "val.parquet"
    assert find_place(str(ade / "images" / "training"), "val").masks == ade / "annotations" / "training"
    # Flat images with a folder of masks among them
    flat = tmp_path / "flat"
    shutil.copytree(drawn / "images" / "some", flat)
    shutil.copytree(drawn / "masks" / "some", flat / "masks")
    train, _ = opened(tmp_path, train=str(flat), val=str(drawn), classes=classes)
    assert [train.index.key(i) for i in range(len(train))] == sorted(f"{i}.png" for i in range(12))
    # Masks elsewhere
    moved = Path(shutil.move(flat / "masks", tmp_path / "elsewhere"))
    train, _ = opened(tmp_path, train=str(flat), val=str(drawn), classes=classes, train_masks=str(moved))
    assert train.masks == moved


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"train": "nowhere"}, DataError, "no such folder"),
        ({"train": "{drawn}"}, ConfigError, "segment.val is empty"),
        ({"train": "{drawn}", "val": "{drawn}/masks"}, ConfigError, "masks of segment.val were not found"),
        ({"train": "{drawn}", "val": "{drawn}", "val_masks": "nowhere"}, ConfigError, "no such folder of masks"),
        ({"train": "{drawn}", "val": "{drawn}"}, ConfigError, "Nothing says which classes"),
        ({"train": "{drawn}", "val": "{scenes}", "num_classes": 0}, ConfigError, "Nothing says"),
    ],
    ids=["no folder", "no val", "no masks", "no mask folder", "no classes", "classes of one"],
)
def test_what_is_no_set(
    settings: dict[str, str], kind: type[UserError], message: str, drawn: Path, scenes: Path, tmp_path: Path
) -> None:
    filled = {
        name: value.format(drawn=drawn, scenes=scenes) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(kind, match=message):
        opened(tmp_path, **filled)


def test_two_sets_with_other_classes(scenes: Path, drawn: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(drawn, tmp_path / "other"))
    legend = {"mask_legend": {str(value): f"thing {value}" for value in range(5)}}
    (other / "scenes.json").write_text(json.dumps(legend))
    with pytest.raises(DataError, match=r"other classes: 11 \(ground, arrow, circle, ...\) and 5"):
        opened(tmp_path, train=str(scenes), val=str(other))
