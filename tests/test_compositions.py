"""Held-out compositions: chosen evenly, and in no object of a training set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mvp_fast.errors import ConfigError
from mvp_fast.samples.scenes import PROFILES, all_pairs, chosen_pairs, held_out_pairs, layout
from mvp_fast.samples.scenes.vocabulary import COLOURS, SHAPES, Pair
from tests.conftest import Launcher


@pytest.mark.parametrize(("share", "each"), [(0.2, 2), (0.001, 1), (0.5, 5), (0.999, 9)])
def test_every_word_is_held_out_as_often(share: float, each: int) -> None:
    held = held_out_pairs(share, seed=3)
    assert held < all_pairs()
    assert Counter(colour for colour, _ in held) == dict.fromkeys(COLOURS, each)
    assert Counter(shape for _, shape in held) == dict.fromkeys(SHAPES, each)


def test_the_seed_decides() -> None:
    sets = [held_out_pairs(0.2, seed) for seed in range(30)]
    assert len(set(sets)) == 30
    assert held_out_pairs(0.2, 7) == sets[7]
    # Any pair may be among them: 30 sets of 20 leave out a given pair with a probability of 0.001.
    assert len(frozenset().union(*sets)) > 95


def test_the_default_is_pinned() -> None:
    """The study's figures are of these pairs."""
    assert sorted(held_out_pairs())[:6] == [
        *[("black", "cross"), ("black", "star"), ("blue", "ring")],
        *[("blue", "star"), ("brown", "circle"), ("brown", "crescent")],
    ]


@pytest.mark.parametrize(("share", "seed"), [(0.0, 0), (1.0, 0), (float("nan"), 0), (0.2, -1), (0.2, 1 << 64)])
def test_what_cannot_be_held_out(share: float, seed: int) -> None:
    with pytest.raises(ConfigError, match=r"holdout"):
        held_out_pairs(share, seed)


def shown(folder: Path) -> Counter[Pair]:
    rows = pq.read_table(folder / "scenes.parquet", columns=["objects"]).to_pylist()
    return Counter((thing["colour"], thing["shape"]) for row in rows for thing in row["objects"])


def test_no_object_of_a_drawn_training_set_is_held_out(launcher: Launcher, tmp_path: Path) -> None:
    draw = ["data", "scenes", "--profile", "small", "--workers", 1, "--images", 32]
    for name in ("seen", "held-out"):
        launcher.run(*draw, "--out", tmp_path / name, "--pairs", name)
    seen, held = shown(tmp_path / "seen"), shown(tmp_path / "held-out")
    assert set(held) <= held_out_pairs()
    assert not set(seen) & held_out_pairs()
    assert sum(seen.values()) > 50
    manifest = json.loads((tmp_path / "seen" / "scenes.json").read_text())
    assert {tuple(pair) for pair in manifest["held_out_pairs"]} == held_out_pairs()
    other = launcher.run(*draw, "--out", tmp_path / "seen", "--pairs", "seen", "--holdout-seed", 1, code=3)
    assert "differs in held_out_pairs" in other.err
    assert (
        "--holdout-share"
        in launcher.run(*draw, "--out", tmp_path / "x", "--pairs", "seen", "--holdout-share", 2, code=2).err
    )


@pytest.mark.parametrize("profile", list(PROFILES))
def test_no_object_of_many_scenes_is_held_out(profile: str) -> None:
    held, pairs = held_out_pairs(), chosen_pairs("seen")
    assert pairs == all_pairs() - held
    found = {(t.colour, t.shape) for image in range(250) for t in layout(5, PROFILES[profile], image, pairs).objects}
    assert not found & held
    assert len(found) > 70  # of 80
    assert chosen_pairs("all") is None
    assert chosen_pairs("held-out") == held
