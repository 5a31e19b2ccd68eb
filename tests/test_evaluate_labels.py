"""Labels of two sets by name, and parts of a set that keep its proportions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.labels import held_out_split, match_labels, stratified_rows
from mvp_fast.samples.index import Index


def an_index(names: list[str], classes: list[str] | None = None) -> Index:
    """An index whose sample i is of the class names[i]; without files."""
    classes = sorted(set(names)) if classes is None else classes
    label = np.array([classes.index(name) if name else -1 for name in names], dtype=np.int32)
    return replace(Index.synthetic(len(names)), path=Path("somewhere"), classes=classes, label=label)


def test_classes_are_matched_by_name() -> None:
    train = an_index(["cat", "dog", "owl", "cat"])
    test = an_index(["owl", "cat", "dog"], classes=["owl", "never", "cat", "dog"])
    labels = match_labels(train, test)
    assert labels.classes == ["cat", "dog", "owl"]
    assert labels.train_N.tolist() == [0, 1, 2, 0]
    assert labels.test_N.tolist() == [2, 0, 1]


def test_a_real_set_and_its_parts(scenes: Path) -> None:
    index = Index.open(scenes)
    rows = np.random.default_rng(0).permutation(len(index))
    labels = match_labels(index, index.subset(rows))
    assert [labels.classes[label] for label in labels.train_N] == [index.key(i).split("/")[0] for i in range(96)]
    assert labels.test_N.tolist() == labels.train_N[rows].tolist()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b", "c"], ["a", "b"], r"The test set has no image of the class 'c', which .* \(somewhere\)"),
        (["a", "b"], ["a", "b", "c", "d"], "The training set has no image of the classes 'c', 'd'"),
        (["a", ""], ["a"], "In the training set 1 of the 2 images have no class, such as synthetic/000000000001"),
        (["a"], ["", ""], "In the test set the images have no class"),
        (["a"], ["a"], "one class, 'a'"),
        ([f"{i:02d}" for i in range(13)], ["00"], "'10' and 2 more"),
    ],
)
def test_sets_that_do_not_fit(train: list[str], test: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        match_labels(an_index(train), an_index(test))


def test_a_part_keeps_the_proportions() -> None:
    label_N = np.random.default_rng(1).choice(7, size=2000, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.045, 0.005])
    sizes = Counter(label_N.tolist())
    smaller: set[int] = set()
    for fraction in (0.001, 0.01, 0.1, 0.5, 1.0):
        rows = stratified_rows(label_N, fraction, seed=3)
        assert (np.diff(rows) > 0).all()
        found = Counter(label_N[rows].tolist())
        assert found == {label: max(1, int(fraction * size + 0.5)) for label, size in sizes.items()}
        assert smaller <= set(rows.tolist())
        smaller = set(rows.tolist())
    assert smaller == set(range(2000))
    assert stratified_rows(label_N, 0.1, 3).tolist() == stratified_rows(label_N, 0.1, 3).tolist()
    assert stratified_rows(label_N, 0.1, 3).tolist() != stratified_rows(label_N, 0.1, 4).tolist()


def test_every_sample_is_as_likely() -> None:
    label_N = np.zeros(20, dtype=np.int64)
    times = sum(np.bincount(stratified_rows(label_N, 0.25, seed), minlength=20) for seed in range(2000))
    assert np.abs(np.asarray(times) / 2000 - 0.25).max() < 0.05  # five standard deviations


def test_held_out_rows() -> None:
    label_N = np.repeat([0, 1, 2, 3], [100, 14, 2, 1])[np.random.default_rng(2).permutation(117)]
    kept, held = held_out_split(label_N, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(117))
    assert Counter(label_N[held].tolist()) == {0: 10, 1: 1, 2: 1}
    assert set(label_N[kept].tolist()) == {0, 1, 2, 3}
    assert held_out_split(label_N, 0.1, seed=1)[1].tolist() != held.tolist()
    most = held_out_split(label_N, 0.99, seed=0)[0]
    assert Counter(label_N[most].tolist()) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert set(stratified_rows(label_N, 0.1, 0).tolist()) != set(held.tolist())  # draws of their own
    with pytest.raises(DataError, match="No class has two training images"):
        held_out_split(np.arange(5), 0.1, seed=0)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match="but must be"):
        stratified_rows(np.zeros(4, dtype=np.int64), fraction, 0)
    with pytest.raises(ConfigError, match="but must be"):
        held_out_split(np.zeros(4, dtype=np.int64), fraction, 0)
    with pytest.raises(ConfigError, match="seed"):
        held_out_split(np.zeros(4, dtype=np.int64), 0.5, -1)
