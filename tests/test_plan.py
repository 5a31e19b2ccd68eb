"""The plan: one endless stream, whatever the batch size and the ranks; stand-ins; identity; errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvp_fast.cli.main import main
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.samples.crops import crop_boxes, flips
from mvp_fast.samples.index import COLUMNS as SCHEMA
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index, write_table
from mvp_fast.samples.masks import block_masks
from mvp_fast.samples.order import order
from mvp_fast.samples.plan import PlanRows, SamplePlan
from mvp_fast.samples.random import Stream, draws

COLUMNS = [field.name for field in dataclasses.fields(PlanRows)]


def varied_index(folder: Path, images: int) -> Index:
    """An index of images of many sizes, without the files."""
    rng = np.random.default_rng(images)
    keys = pa.array([f"{i % 3}/{i:05d}.jpg" for i in range(images)], pa.large_string())
    sides = {name: rng.integers(1, 800, images).astype(np.int32) for name in ("width", "height")}
    length = rng.integers(1, 9999, images)
    label = (np.arange(images) % 3).astype(np.int32)
    table = pa.table(
        {"key": keys, "path": keys, "offset": np.zeros(images, np.int64), "length": length, **sides, "label": label}
    )
    about = {"version": 1, "classes": ["0", "1", "2"], "root": ".", "root_absolute": str(folder)}
    with open(folder / "index.parquet", "wb") as file:
        write_table(table.cast(SCHEMA), about, file)
    return Index.open(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return varied_index(tmp_path_factory.mktemp("plan"), 37)


def make_plan(index: Index, **changes: Any) -> SamplePlan:
    settings = {"seed": 6, "batch_size": 8, "data": DataConfig(), "mask": MaskConfig(), **changes}
    return SamplePlan(index, **settings)


def joined(parts: list[PlanRows]) -> PlanRows:
    return PlanRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))


def assert_same(left: PlanRows, right: PlanRows) -> None:
    for name in COLUMNS:
        assert getattr(left, name).dtype == getattr(right, name).dtype, name
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


def test_rows_are_what_order_crops_and_masks_say(index: Index) -> None:
    plan, position_B = make_plan(index), np.arange(37)
    rows = plan.rows(4, position_B)
    epoch_B = np.full(37, 4)
    sample_B = order(6, epoch_B, position_B, 37)
    boxes = crop_boxes(
        6, epoch_B, position_B, index.width[sample_B], index.height[sample_B], (0.2, 1.0), (3 / 4, 4 / 3)
    )
    wanted = PlanRows(
        epoch_B, position_B, sample_B, *boxes, flips(6, epoch_B, position_B, 0.5),
        block_masks(6, epoch_B, position_B, (14, 14), MaskConfig()), np.zeros(37, np.int32),
    )  # fmt: skip
    assert_same(rows, wanted)
    assert (rows.x_B + rows.width_B <= index.width[sample_B]).all()
    assert (rows.y_B + rows.height_B <= index.height[sample_B]).all()


def test_a_plan_never_changes_under_its_version(index: Index) -> None:
    """Where this fails, the same settings give another plan: VERSION must go up and old runs can't be resumed."""
    plan = make_plan(index)
    digest = hashlib.sha256()
    for step in (0, 1, 2, 50, 10**9):
        rows = plan.step(step)
        for name in COLUMNS:
            digest.update(getattr(rows, name).tobytes())
    assert plan.state()["version"] == 1
    assert digest.hexdigest() == "375c865dc91d32da49e04ba39864ebce41f9f4955ebe20fb0ae95aad9d400dc6"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(index: Index, world: int) -> None:
    whole = make_plan(index)
    ranks = [make_plan(index, rank=rank, world=world) for rank in range(world)]
    assert {plan.local_batch_size for plan in ranks} == {8 // world}
    for step in (0, 3, 4, 5, 1000):  # 4 straddles epochs 0 and 1
        assert_same(joined([plan.step(step) for plan in ranks]), whole.step(step))
    assert set(whole.step(4).epoch_B.tolist()) == {0, 1}


@pytest.mark.parametrize("batch_size", [1, 5, 37, 40, 200])
def test_the_stream_does_not_depend_on_the_batch_size(index: Index, batch_size: int) -> None:
    stream = joined([make_plan(index).step(step) for step in range(50)])
    plan = make_plan(index, batch_size=batch_size)
    assert_same(
        joined([plan.step(step) for step in range(400 // batch_size)]), stream.slice(0, 400 // batch_size * batch_size)
    )


def test_an_epoch_visits_every_sample_once(index: Index) -> None:
    stream = joined([make_plan(index).step(step) for step in range(74)])
    samples = stream.sample_B.reshape(-1, 37)
    assert (np.sort(samples, axis=1) == np.arange(37)).all()
    assert len(np.unique(samples, axis=0)) == len(samples)
    assert np.array_equal(stream.epoch_B, np.arange(592) // 37)
    assert np.array_equal(stream.position_B, np.arange(592) % 37)


def test_resuming_at_any_step_gives_the_same(index: Index) -> None:
    went_through = [make_plan(index).step(step) for step in range(30)]
    for step in random.Random().sample(range(30), 30):
        assert_same(make_plan(index).step(step), went_through[step])


def test_boxes_and_masks_change_from_epoch_to_epoch(index: Index) -> None:
    plan = make_plan(index)
    first, second = (plan.rows(epoch, np.arange(37)) for epoch in (0, 1))
    assert not np.array_equal(first.mask_BN, second.mask_BN)
    assert not np.array_equal(first.flip_B, second.flip_B)
    by_sample = [rows.width_B[np.argsort(rows.sample_B)] for rows in (first, second)]
    assert (by_sample[0] != by_sample[1]).mean() > 0.5


@pytest.mark.parametrize("repeat", [2, 3, 8])
def test_repeats_are_rows_in_a_row(index: Index, repeat: int) -> None:
    once = make_plan(index, batch_size=1)
    plan = make_plan(index, batch_size=24, data=DataConfig(repeat=repeat))
    assert plan.epoch_rows == 37 * repeat
    stream = joined([plan.step(step) for step in range(37 * repeat * 2 // 24 + 1)])
    for g in range(37 * repeat * 2):
        assert stream.sample_B[g] == once.step(g // repeat).sample_B[0]
        assert (stream.epoch_B[g], stream.position_B[g]) == divmod(g, 37 * repeat)
    epoch = stream.slice(0, 37 * repeat)
    assert np.array_equal(np.bincount(epoch.sample_B), np.full(37, repeat))
    assert np.array_equal(epoch.width_B, crop_boxes(
        6, epoch.epoch_B, epoch.position_B, index.width[epoch.sample_B], index.height[epoch.sample_B],
        (0.2, 1.0), (3 / 4, 4 / 3),
    )[2])  # fmt: skip
    masks = epoch.mask_BN.reshape(37, repeat, -1)
    assert (masks[:, 0] != masks[:, 1]).any(axis=1).all(), "each crop has its own mask"
    flips_GR = epoch.flip_B.reshape(37, repeat)
    assert 0 < (flips_GR[:, 0] != flips_GR[:, 1]).sum() < 37
    assert_same(plan.rows(1, np.arange(5)), stream.slice(37 * repeat, 37 * repeat + 5))


@pytest.mark.parametrize("world", [2, 4])
def test_repeats_on_ranks(index: Index, world: int) -> None:
    data = DataConfig(repeat=2)
    whole = make_plan(index, data=data)
    ranks = [make_plan(index, data=data, rank=rank, world=world) for rank in range(world)]
    for step in (0, 9, 10, 1000):
        assert_same(joined([plan.step(step) for plan in ranks]), whole.step(step))


def test_a_repeat_of_one_is_no_repeat(index: Index) -> None:
    assert make_plan(index, data=DataConfig(repeat=1)).state() == make_plan(index).state()
    assert "repeat" not in make_plan(index).state()
    state = make_plan(index, data=DataConfig(repeat=2)).state()
    assert state == {**make_plan(index).state(), "repeat": 2}


def test_stand_ins_of_a_group_are_one_sample(index: Index) -> None:
    plan = make_plan(index, data=DataConfig(repeat=4))
    rows = plan.step(3)
    for i in (0, 4):
        group = plan.stand_ins(rows.slice(i, i + 4))
        assert len(set(group.sample_B.tolist())) == 1
        assert group.sample_B[0] != rows.sample_B[i]
        for j in range(4):
            assert_same(group.slice(j, j + 1), plan.stand_in(rows, i + j))
            assert_same(group.slice(j, j + 1), plan.rows(rows.epoch_B[i + j], rows.position_B[i + j], attempt=1))


def test_positions_beyond_32_bits() -> None:
    n = 2**33 + 12_345
    plan = make_plan(Index.synthetic(n), batch_size=4)
    high, low = plan.rows(0, n - 1), plan.rows(0, (n - 1) % 2**32)
    assert not np.array_equal(high.mask_BN, low.mask_BN)
    assert high.sample_B[0] != low.sample_B[0]
    assert high.sample_B.tolist() == order(6, 0, n - 1, n).tolist()
    last = plan.step((n - 1) // 4)
    assert last.epoch_B.tolist() == [0, 1, 1, 1]
    assert last.position_B.tolist() == [n - 1, 0, 1, 2]
    assert plan.step(10**12).epoch_B[0] == 4 * 10**12 // n


def test_stand_ins(index: Index) -> None:
    plan = make_plan(index)
    rows = plan.step(4)
    for i in range(8):
        chain, row = [rows.slice(i, i + 1)], rows
        for attempt in (1, 2, 3):
            row = plan.stand_in(row, i if attempt == 1 else 0)
            chain.append(row)
            assert len(row) == 1
            assert row.attempt_B.tolist() == [attempt]
            assert row.sample_B[0] != chain[-2].sample_B[0]
            assert 0 <= row.sample_B[0] < 37
            sample = row.sample_B
            assert row.x_B + row.width_B <= index.width[sample]
            assert row.y_B + row.height_B <= index.height[sample]
            for name in ("epoch_B", "position_B", "flip_B", "mask_BN"):
                assert np.array_equal(getattr(row, name), getattr(chain[0], name)), name
            epoch, position = row.epoch_B[0], row.position_B[0]
            assert_same(row, plan.rows(epoch, position, attempt=attempt))
            word_low, word_high = (int(word) for word in draws(6, Stream.STAND_IN, epoch, position, attempt - 1)[0, :2])
            other = (word_high * 2**32 + word_low) * 36 // 2**64
            assert row.sample_B[0] == other + (other >= chain[-2].sample_B[0])


def test_stand_ins_are_any_other_sample_equally_often(index: Index) -> None:
    plan = make_plan(index, data=DataConfig(image_size=32), mask=MaskConfig(patches=1))
    epoch_B = np.arange(20_000)
    first, second = (plan.rows(epoch_B, 5, attempt=attempt).sample_B for attempt in (0, 1))
    assert (first != second).all()
    counts = np.bincount((second - first) % 37, minlength=37)[1:]
    assert ((counts - 20_000 / 36) ** 2 / (20_000 / 36)).sum() < 80  # chi-square, 35 degrees: p = 2e-5


def test_stand_ins_of_one_and_of_two() -> None:
    alone = make_plan(Index.synthetic(1))
    row = alone.stand_in(alone.step(0), 3)
    assert (row.sample_B.tolist(), row.attempt_B.tolist()) == ([0], [1])
    two = make_plan(Index.synthetic(2))
    rows = two.step(0)
    assert [two.stand_in(rows, i).sample_B[0] for i in range(8)] == (1 - rows.sample_B).tolist()


def test_masked_numbers_slices_and_replacements(index: Index) -> None:
    plan = make_plan(index)
    rows = plan.step(0)
    masked = rows.masked_BM()
    assert masked.dtype == np.int64
    assert masked.shape == (8, 75)
    assert [line.tolist() for line in masked] == [np.flatnonzero(mask).tolist() for mask in rows.mask_BN]
    assert rows.slice(2, 2).masked_BM().shape == (0, 0)
    assert len(rows.slice(2, 5)) == 3
    other = plan.stand_in(rows, 2)
    before = rows.sample_B.copy()
    replaced = rows.replace_row(2, other, 0)
    assert_same(replaced.slice(2, 3), other)
    assert_same(joined([replaced.slice(0, 2), replaced.slice(3, 8)]), joined([rows.slice(0, 2), rows.slice(3, 8)]))
    assert np.array_equal(rows.sample_B, before)


def test_nothing_and_everything_masked(index: Index) -> None:
    assert make_plan(index, mask=MaskConfig(patches=0)).step(0).masked_BM().shape == (8, 0)
    everything = make_plan(index, mask=MaskConfig(patches=196)).step(0).masked_BM()
    assert (everything == np.arange(196)).all()


def test_state_is_the_plans_identity(index: Index, tmp_path: Path) -> None:
    plan = make_plan(index)
    assert json.loads(json.dumps(plan.state())) == plan.state()
    assert make_plan(index, rank=1, world=2).state() == plan.state()
    changes: list[dict[str, Any]] = [
        {"seed": 7},
        {"batch_size": 16},
        {"patch_size": 14},
        {"data": DataConfig(image_size=240)},
        {"data": DataConfig(crop_scale=(0.08, 1.0))},
        {"data": DataConfig(crop_ratio=(0.5, 2.0))},
        {"data": DataConfig(flip=0.0)},
        {"mask": MaskConfig(patches=74)},
        {"mask": MaskConfig(min_block=15)},
        {"mask": MaskConfig(min_aspect=0.4)},
    ]
    states = [make_plan(index, **change).state() for change in changes]
    states.append(make_plan(varied_index(tmp_path, 38)).state())
    assert plan.state() not in states
    same = make_plan(index, data=DataConfig(threads=3, loader="torchvision", index="elsewhere"))
    assert same.state() == plan.state()


def test_a_plan_travels_to_other_processes(index: Index) -> None:
    plan = pickle.loads(pickle.dumps(make_plan(index)))
    assert_same(plan.step(7), make_plan(index).step(7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 6, "world": 4}, "train.batch_size is 6"),
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1"),
        ({"world": 0}, "of 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"data": DataConfig(repeat=3)}, "train.batch_size is 8, data.repeat 3"),
        ({"data": DataConfig(repeat=4), "world": 4}, "take a multiple of 16"),
        ({"data": DataConfig(repeat=0)}, "data.repeat is 0"),
        ({"data": DataConfig(image_size=225)}, "data.image_size is 225"),
        ({"data": DataConfig(image_size=0)}, "data.image_size is 0"),
        ({"data": DataConfig(image_size=8208)}, "512 x 512"),
        ({"data": DataConfig(crop_scale=(0.0, 1.0))}, "data.crop_scale is 0.0 1.0"),
        ({"data": DataConfig(crop_scale=(0.5, 0.4))}, "data.crop_scale"),
        ({"data": DataConfig(crop_scale=(0.5, 1.1))}, "data.crop_scale"),
        ({"data": DataConfig(crop_ratio=(2.0, 1.0))}, "data.crop_ratio"),
        ({"data": DataConfig(flip=1.5)}, "data.flip is 1.5"),
        ({"mask": MaskConfig(patches=197)}, "14 x 14 = 196 patches"),
        ({"mask": MaskConfig(patches=-1)}, "mask.patches is -1"),
        ({"mask": MaskConfig(min_block=0)}, "mask.min_block is 0"),
        ({"mask": MaskConfig(min_aspect=0.0)}, "mask.min_aspect is 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_range(index: Index, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(index, **change)
    assert said in caught.value.paragraph()


@pytest.mark.parametrize(
    ("epoch", "position", "attempt"), [(2**32, 0, 0), (-1, 0, 0), (0, 37, 0), (0, -1, 0), (0, 0, 2**16 + 1)]
)
def test_rows_out_of_range(index: Index, epoch: int, position: int, attempt: int) -> None:
    with pytest.raises(ConfigError, match=r"epochs|positions|stand-ins"):
        make_plan(index).rows(epoch, position, attempt)


def test_steps_out_of_range(index: Index) -> None:
    last = make_plan(index, batch_size=37).step(2**32 - 1)
    assert set(last.epoch_B.tolist()) == {2**32 - 1}
    for step in (2**32, 10**30):
        with pytest.raises(ConfigError, match="epochs"):
            make_plan(index, batch_size=37).step(step)
    with pytest.raises(ValueError, match="negative"):
        make_plan(index).step(-1)


def write_images(folder: Path, count: int) -> None:
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30 + 2 * i)).save(path)


def test_the_verb_writes_the_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, 11)
    build_index(tmp_path, workers=1)
    out = tmp_path / "deeper" / "plan.parquet"
    assert main(["data", "plan", str(tmp_path), "--epoch", "3", "--out", str(out), "--seed", "9"]) == 0
    assert "11 of the 11 in epoch 3, seed 9" in capsys.readouterr().out
    table = pq.read_table(out)
    index = Index.open(tmp_path)
    rows = make_plan(index, seed=9).rows(3, np.arange(11))
    assert table.column_names == ["position", "key", "x", "y", "width", "height", "flip", "mask"]
    assert table["position"].to_pylist() == list(range(11))
    assert table["key"].to_pylist() == [index.key(i) for i in rows.sample_B]
    for name in ("x", "y", "width", "height", "flip"):
        assert table[name].to_pylist() == getattr(rows, f"{name}_B").tolist()
    assert table["mask"].to_pylist() == rows.mask_BN.tolist()
    assert [path.name for path in out.parent.iterdir()] == ["plan.parquet"]


def test_the_verb_takes_a_configuration_and_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, 5)
    build_index(tmp_path, workers=1)
    (tmp_path / "c.yaml").write_text("seed: 4\ndata: {image_size: 64, flip: 1.0}\nmask: {patches: 3, min_block: 1}\n")
    out = tmp_path / "plan.parquet"
    arguments = ["--limit", "2", "--config", str(tmp_path / "c.yaml"), "--out", str(out)]
    assert main(["data", "plan", str(tmp_path / "index.parquet"), *arguments]) == 0
    table = pq.read_table(out)
    assert table["flip"].to_pylist() == [True, True]
    assert [(len(mask), sum(mask)) for mask in table["mask"].to_pylist()] == [(16, 3)] * 2
    assert "seed 4" in capsys.readouterr().out


def test_the_verb_writes_more_than_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvp_fast.cli.data import plan as verb

    write_images(tmp_path, 9)
    build_index(tmp_path, workers=1)
    out = tmp_path / "plan.parquet"
    main(["data", "plan", str(tmp_path), "--out", str(out)])
    whole = pq.read_table(out)
    monkeypatch.setattr(verb, "ROWS_A_GROUP", 4)
    main(["data", "plan", str(tmp_path), "--out", str(out)])
    assert pq.ParquetFile(out).num_row_groups == 3
    assert pq.read_table(out).equals(whole)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--limit", "-1"], 2),
        (["--epoch", "-1"], 2),
        (["--epoch", str(2**32)], 2),
        (["--seed", "-5"], 2),
        (["--config", "missing.yaml"], 2),
        (["--out", "/dev/null/plan.parquet"], 4),
    ],
    ids=str,
)
def test_the_verbs_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> None:
    write_images(tmp_path, 2)
    build_index(tmp_path, workers=1)
    found = main(["data", "plan", str(tmp_path), "--out", str(tmp_path / "plan.parquet"), *arguments])
    said = capsys.readouterr()
    assert found == code
    assert said.err.count("\n") == 1
    assert not (tmp_path / "plan.parquet").exists()
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_verb_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", str(tmp_path), "--out", str(tmp_path / "plan.parquet")]) == 3
    assert "mvp-fast data index" in capsys.readouterr().err
