"""k nearest neighbours against a brute-force reference in float64, and the rules for ties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.knn import STEP, Neighbours, neighbours, vote

Array = npt.NDArray[np.float64]
T = 0.07


def brute_force(query: Array, bank: Array, label: npt.NDArray[np.int64], classes: int, k: int) -> list[list[int]]:
    """Each query's classes by votes, one query, one neighbour and one vote at a time."""
    ranked, bank = [], bank.astype(np.float64)
    for q in query.astype(np.float64):
        cosines = ((bank * q).sum(1) / np.sqrt((q * q).sum() * (bank * bank).sum(1))).tolist()
        nearest = sorted(range(len(bank)), key=lambda n: (-cosines[n], n))[:k]
        votes = [0.0] * classes
        for n in nearest:
            votes[label[n]] += np.exp(cosines[n] / T)
        ranked.append(sorted(range(classes), key=lambda c: (-votes[c], c))[:5])
    return ranked


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("queries", "rows", "width", "classes", "k"),
    [(37, 101, 16, 7, 20), (5, 64, 3, 2, 1), (9, 30, 8, 4, 25), (3, 12, 5, 12, 20), (1, 1, 4, 1, 10)],
    ids=["usual", "nearest", "k above the classes", "k above the rows", "one row"],
)
def test_it_is_what_brute_force_finds(dtype: type, queries: int, rows: int, width: int, classes: int, k: int) -> None:
    rng = np.random.default_rng(rows)
    for _ in range(2):
        query, bank = (rng.normal(size=(n, width)).astype(dtype) for n in (queries, rows))
        label = rng.integers(0, classes, rows)
        expected = brute_force(query, bank, label, classes, k)
        for query_chunk, bank_chunk in ((1024, 16384), (2, 7), (queries, rows), (3, 1)):
            found = neighbours(query, bank, k, query_chunk=query_chunk, bank_chunk=bank_chunk)
            assert found.row_QK.shape == (queries, min(k, rows))
            assert vote(found, label, classes, k, T, query_chunk=2).tolist() == expected


def test_a_vote_of_fewer_neighbours_is_that_of_a_search_for_fewer() -> None:
    rng = np.random.default_rng(3)
    query, bank, label = rng.normal(size=(20, 6)), rng.normal(size=(80, 6)), rng.integers(0, 5, 80)
    found = neighbours(query, bank, 20)
    for k in (1, 7, 20):
        expected = vote(neighbours(query, bank, k), label, 5, k)
        assert vote(found, label, 5, k).tolist() == expected.tolist() == brute_force(query, bank, label, 5, k)
    assert (np.diff(found.similarity_QK, axis=1) <= 0).all()


def test_of_equal_samples_the_first_come_first() -> None:
    """Many copies of few directions, of different lengths: most neighbours tie, in whatever pieces they are read."""
    rng = np.random.default_rng(4)
    directions = rng.normal(size=(6, 9))
    bank = directions[rng.integers(0, 6, 90)] * rng.choice([0.5, 1.0, 4.0], size=(90, 1))
    query, label = rng.normal(size=(30, 9)), rng.integers(0, 4, 90)
    expected = brute_force(query, bank, label, 4, 10)
    for chunk in (1, 13, 90):
        found = neighbours(query, bank, 10, query_chunk=chunk, bank_chunk=chunk)
        assert vote(found, label, 4, 10).tolist() == expected
        for row_K, similarity_K in zip(*found, strict=True):
            for first, second in zip(range(9), range(1, 10), strict=True):
                if similarity_K[first] == similarity_K[second]:
                    assert row_K[first] < row_K[second]


def test_of_equal_votes_the_first_class_wins() -> None:
    found = Neighbours(np.array([[2, 0, 1]]), np.array([[0.5, 0.5, 0.5]]))
    assert vote(found, np.array([3, 1, 2]), 5, 3).tolist() == [[1, 2, 3, 0, 4]]
    assert vote(found, np.array([3, 1, 3]), 5, 3).tolist() == [[3, 1, 0, 2, 4]]


def test_extremes() -> None:
    bank = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1e-30, 1e-30]])
    found = neighbours(np.array([[3e38, 0.0]], dtype=np.float32), bank.astype(np.float32), 4)
    assert found.row_QK.tolist() == [[0, 3, 2, 1]]
    np.testing.assert_allclose(found.similarity_QK, [[1, 0.5**0.5, 0, -1]], atol=STEP)
    assert vote(found, np.arange(4), 4, 4, temperature=1e-6)[0, 0] == 0  # no overflow
    assert neighbours(np.zeros((0, 2)), bank, 2).row_QK.shape == (0, 2)


@pytest.mark.parametrize(("k", "rows"), [(0, 3), (5, 0)])
def test_no_neighbours(k: int, rows: int) -> None:
    with pytest.raises(ConfigError, match="There are no"):
        neighbours(np.ones((2, 3)), np.ones((rows, 3)), k)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        vote(neighbours(np.ones((1, 2)), np.ones((1, 2)), 1), np.zeros(1, dtype=np.int64), 1, 1, temperature)


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    rng = np.random.default_rng(5)
    query, bank = (rng.normal(size=(n, 32)).astype(np.float16) for n in (300, 5000))
    here, there = (
        neighbours(query, bank, 20, device=torch.device(device), bank_chunk=777) for device in ("cpu", "cuda")
    )
    assert here.row_QK.tolist() == there.row_QK.tolist()
