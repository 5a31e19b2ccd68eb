"""The order over shards: a bijection whatever the shards and the window, the slow reference's, without bias, local."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mvp_fast.cli.main import main
from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import ConfigError
from mvp_fast.samples.index import COLUMNS, Index
from mvp_fast.samples.index_build import write_table
from mvp_fast.samples.order import ROUNDS
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.samples.random import Stream, draws
from mvp_fast.samples.sharded_order import ShardedOrder


def starts_of(sizes: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def epoch_of(order: ShardedOrder, epoch: int) -> np.ndarray:
    n = order.samples
    return order(np.full(n, epoch), np.arange(n))


def slow_permutation(seed: int, stream: Stream, epoch: int, tweak: int, n: int) -> list[int]:
    half, out = 3, []
    while 4**half < n:
        half += 1
    for x in range(n):
        while True:
            left, right = divmod(x, 2**half)
            for block in range(ROUNDS):
                word = int(draws(seed, stream, epoch, right | tweak << 32, block)[0, 0])
                left, right = right, left ^ (word % 2**half)
            x = left * 2**half + right
            if x < n:
                break
        out.append(x)
    return out


def slow_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> list[int]:
    """As the module's text says it, with lists."""
    starts = starts_of(sizes).tolist()
    shards = slow_permutation(seed, Stream.SHARDS, epoch, 0, len(sizes))
    circle = [sample for s in shards for sample in range(starts[s], starts[s + 1])]
    low, high = (int(word) for word in draws(seed, Stream.SHARDS, epoch, 0, ROUNDS)[0, :2])
    shift = (high * 2**32 + low) * len(circle) // 2**64
    circle = circle[shift:] + circle[:shift]
    found = []
    for number, base in enumerate(range(0, len(circle), window)):
        part = circle[base : base + window]
        found += [part[i] for i in slow_permutation(seed, Stream.WINDOW, epoch, number, len(part))]
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 2**64 - 1), st.integers(1, 80),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_agrees_with_the_reference(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = ShardedOrder(starts_of(sizes), seed, window)
    assert epoch_of(order, epoch).tolist() == slow_epoch(sizes, seed, min(window, sum(sizes)), epoch)


SETS = {
    "one shard": [1000],
    "shards of one sample": [1] * 500,
    "one sample": [1],
    "equal": [100] * 20,
    "unequal": [1, 7, 300, 2, 2, 900, 33, 1],
    "many": list(np.random.default_rng(1).integers(1, 200, 700)),
}


@pytest.mark.parametrize("window", [1, 2, 64, 333, 10**9])
@pytest.mark.parametrize("name", SETS)
def test_every_sample_once_an_epoch(name: str, window: int) -> None:
    order = ShardedOrder(starts_of(SETS[name]), 5, window)
    n = order.samples
    epochs = [epoch_of(order, epoch) for epoch in (0, 1, 2**32 - 1)]
    for found in epochs:
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(n))
    if n > 1:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], epoch_of(ShardedOrder(starts_of(SETS[name]), 6, window), 0))


@pytest.mark.parametrize("name", SETS)
def test_any_position_alone(name: str) -> None:
    """Random access: single positions, in any order, of any epochs, are those of the whole."""
    order, rng = ShardedOrder(starts_of(SETS[name]), 5, 64), random.Random(0)
    whole = [epoch_of(order, epoch) for epoch in range(4)]
    fresh = ShardedOrder(starts_of(SETS[name]), 5, 64)
    where = [(rng.randrange(4), rng.randrange(order.samples)) for _ in range(200)]
    for epoch, position in where[:50]:
        assert fresh(np.array([epoch]), np.array([position]))[0] == whole[epoch][position]
    epoch_B, position_B = np.array(where).T
    assert fresh(epoch_B, position_B).tolist() == [whole[epoch][position] for epoch, position in where]


@pytest.mark.parametrize("window", [1, 10, 64, 150, 1000])
@pytest.mark.parametrize("name", ["one shard", "equal", "unequal", "many"])
def test_a_window_of_positions_lies_in_few_shards(name: str, window: int) -> None:
    """Any W positions in a row are taken from 2 W neighbours of the circle; how many shards that can be is counted."""
    sizes = SETS[name]
    starts = starts_of(sizes)
    order = ShardedOrder(starts, 8, window)
    n, reach = order.samples, 2 * min(window, order.samples)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for epoch in range(3):
        shard_B = shard_of[epoch_of(order, epoch)]
        circle = order._circle(epoch)
        places = np.repeat(np.arange(len(sizes)), np.diff(np.append(circle.begin_S.astype(int), n)))
        step = max(1, n // 200)
        # Stretches a little longer than they may be, so that looking at every step-th place is enough.
        doubled = np.concatenate([places, places])
        most = max(len(np.unique(doubled[place : place + min(reach + step, n)])) for place in range(0, n, step))
        firsts = range(0, n - min(window, n) + 1, max(1, n // 900))
        met = [len(np.unique(shard_B[first : first + window])) for first in firsts]
        assert max(met) <= most
        if name == "many" and window <= 150:
            assert max(met) < len(sizes) / 2
        if name == "equal" and window <= 150:
            assert max(met) <= 2 + -(-2 * window // 100)


@pytest.mark.parametrize(
    ("sizes", "window"), [([10] * 6, 20), ([10] * 6, 7), ([60], 16), ([1] * 40, 9), ([1, 30, 4, 9], 11)]
)
def test_every_sample_at_every_position_equally_often(sizes: list[int], window: int) -> None:
    n, epochs = sum(sizes), 3000
    order = ShardedOrder(starts_of(sizes), 321, window)
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), epoch_of(order, epoch)] += 1
    statistic = ((counts - epochs / n) ** 2 / (epochs / n)).sum() * (n - 1) / n
    # Neighbours of a window come together, so that counts are correlated: bounds wider than for `order` alone.
    assert 1e-6 < stats.chi2.sf(statistic, (n - 1) ** 2) < 1 - 1e-9


def test_shards_follow_each_other_in_any_order() -> None:
    """With windows of one sample the circle itself is seen: which shard comes after which, all pairs equally often."""
    sizes, epochs = [3] * 7, 6000
    order, counts = ShardedOrder(starts_of(sizes), 11, 1), np.zeros((7, 7))
    for epoch in range(epochs):
        shards = [shard for shard, _ in itertools.groupby((epoch_of(order, epoch) // 3).tolist())][1:-1]
        for a, b in itertools.pairwise(shards):
            counts[a, b] += 1
    off_diagonal = counts[~np.eye(7, dtype=bool)]
    assert not counts.diagonal().any()
    assert stats.chisquare(off_diagonal).pvalue > 1e-6


def test_within_a_window_neighbours_are_torn_apart() -> None:
    order = ShardedOrder(starts_of([500] * 8), 1, 1000)
    found = epoch_of(order, 0)
    assert np.abs(np.diff(found)).min() >= 1
    assert (np.abs(np.diff(found)) == 1).mean() < 0.01
    inside = [stats.spearmanr(np.arange(1000), found[at : at + 1000]).statistic for at in range(0, 4000, 1000)]
    assert np.abs(inside).max() < 0.2
    windows = [epoch_of(order, 0)[at : at + 1000].argsort().tolist() for at in range(0, 4000, 1000)]
    assert all(a != b for a, b in itertools.combinations(windows, 2)), "each window has a permutation of its own"


def test_large_sets_take_a_table_of_shards_alone() -> None:
    """Five billion samples in half a million shards: rows far inside, no list of samples."""
    starts = np.arange(0, 5 * 10**9 + 1, 10_000)
    order = ShardedOrder(starts, 3, 65_536)
    position_B = np.random.default_rng(0).integers(0, order.samples, 3000)
    found = order(np.full(3000, 7), position_B)
    assert len(np.unique(found)) == len(np.unique(position_B))
    assert found.min() >= 0
    assert found.max() < order.samples
    near = order(np.full(1000, 7), np.arange(10**9, 10**9 + 1000)) // 10_000
    assert len(np.unique(near)) <= 2 + 2 * 65_536 // 10_000 + 1


@pytest.mark.parametrize(
    ("starts", "window"), [([0], 1), ([1, 5], 1), ([0, 5, 5], 1), ([0, 5, 3], 1), ([0, 5], 0), ([0, 2**62], 3)]
)
def test_out_of_range(starts: list[int], window: int) -> None:
    with pytest.raises(ValueError, match=r"shards begin|windows of"):
        ShardedOrder(np.array(starts), 0, window)


# --- In the plan


def sharded_index(folder: Path, sizes: list[int]) -> Index:
    """An index of shards of these sizes, without the files."""
    n = sum(sizes)
    path = np.repeat([f"shard-{s:06d}.tar" for s in range(len(sizes))], sizes)
    columns = {
        "key": pa.array([f"{i:05d}" for i in range(n)], pa.large_string()),
        "path": pa.array(path, pa.large_string()),
        "offset": np.concatenate([512 + 1536 * np.arange(size) for size in sizes]),
        **{name: np.full(n, value) for name, value in (("length", 800), ("width", 90), ("height", 70), ("label", -1))},
    }
    about = {"version": 1, "classes": [], "root": ".", "root_absolute": str(folder)}
    write_table(pa.table(columns).cast(COLUMNS), about, folder / "index.parquet")
    return Index.open(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return sharded_index(tmp_path_factory.mktemp("sharded"), [5, 9, 1, 12, 7, 3])


def make_plan(index: Index, batch_size: int = 8, rank: int = 0, world: int = 1, **data: Any) -> SamplePlan:
    config = DataConfig(image_size=32, **{"order": "sharded", "shuffle_window": 10, **data})
    mask = MaskConfig(patches=1, min_block=1)
    return SamplePlan(index, seed=4, batch_size=batch_size, data=config, mask=mask, rank=rank, world=world)


def test_shards_are_the_runs_of_a_path(index: Index, tmp_path: Path) -> None:
    starts = index.shard_starts()
    assert starts is not None
    assert starts.tolist() == [0, 5, 14, 15, 27, 34, 37]
    assert [index.file(i).name for i in (0, 4, 5, 14, 15, 36)] == [f"shard-{s:06d}.tar" for s in (0, 0, 1, 2, 3, 5)]
    single = sharded_index(tmp_path, [1] * 9).shard_starts()
    assert single is not None
    assert single.tolist() == list(range(10))


def test_the_plan_follows_the_order(index: Index) -> None:
    plan = make_plan(index)
    stream = np.concatenate([plan.step(k).sample_B for k in range(37)])
    for epoch in range(8):
        assert stream[37 * epoch : 37 * epoch + 37].tolist() == slow_epoch([5, 9, 1, 12, 7, 3], 4, 10, epoch)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("repeat", [1, 2])
def test_ranks_and_resumption(index: Index, world: int, repeat: int) -> None:
    whole = [make_plan(index, 16, repeat=repeat).step(k) for k in range(12)]
    for k in (11, 3, 0, 7):  # in any order: there is no state
        parts = [make_plan(index, 16, rank, world, repeat=repeat).step(k) for rank in range(world)]
        for name in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B", "mask_BN", "position_B", "epoch_B"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole[k], name))


def test_state(index: Index, tmp_path: Path) -> None:
    state = make_plan(index).state()
    assert json.loads(json.dumps(state)) == state
    assert state["order"] == "sharded"
    others = [make_plan(index, **change).state() for change in ({"shuffle_window": 11}, {"order": "shuffled"})]
    others.append(make_plan(sharded_index(tmp_path, [9, 5, 1, 12, 7, 3])).state())
    assert all(state != other for other in others)
    assert make_plan(index, shuffle_window=37).state() == make_plan(index, shuffle_window=10**6).state()
    before = {"version", "seed", "batch_size", "index", "image_size", "patch_size", "crop_scale", "crop_ratio", "flip"}
    shuffled = make_plan(index, order="shuffled", shuffle_window=3).state()
    assert set(shuffled) == before | {"mask_patches", "mask_min_block", "mask_min_aspect"}


def test_a_sharded_plan_travels_to_other_processes(index: Index) -> None:
    plan = make_plan(index)
    plan.step(0)
    assert pickle.loads(pickle.dumps(plan)).step(9).sample_B.tolist() == plan.step(9).sample_B.tolist()


def test_files_of_their_own_are_refused(scenes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for plain in (Index.open(scenes), Index.synthetic(100)):
        with pytest.raises(ConfigError, match=r"each image in a file of its own.*--to shards"):
            make_plan(plain)
    (tmp_path / "c.yaml").write_text("data:\n  order: sharded\n")
    words = ["data", "plan", str(scenes), "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "p.parquet")]
    assert main(words) == 2
    assert "data.order" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="shuffle_window is 0"):
        make_plan(sharded_index(tmp_path, [3, 4]), shuffle_window=0)
