"""The epoch's order: a bijection for every length, the slow reference's, and without bias."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from mvp_fast.samples.order import ROUNDS, order
from mvp_fast.samples.random import Stream, draws


def slow_order(seed: int, epoch: int, position: int, n: int) -> int:
    """Feistel with cycle walking on Python integers; the round function through `draws`."""
    half = 3
    while 4**half < n:
        half += 1
    x = position
    while True:
        left, right = divmod(x, 2**half)
        for block in range(ROUNDS):
            word = int(draws(seed, Stream.ORDER, epoch, right, block)[0, 0])
            left, right = right, left ^ (word % 2**half)
        x = left * 2**half + right
        if x < n:
            return x


def test_every_small_length_is_permuted() -> None:
    for n in range(1, 301):
        for epoch in (0, 1, 17):
            assert np.array_equal(np.sort(order(n, epoch, np.arange(n), n)), np.arange(n)), (n, epoch)


@pytest.mark.parametrize("n", [4**8 - 1, 4**8, 4**8 + 1, 100_003, 1_281_167])
def test_large_lengths_are_permuted(n: int) -> None:
    found = order(3, 2, np.arange(n), n)
    assert found.dtype == np.int64
    assert np.array_equal(np.bincount(found, minlength=n), np.ones(n))


def test_agrees_with_the_reference() -> None:
    rng = random.Random()
    for _ in range(60):
        n = rng.choice([rng.randint(1, 20), rng.randint(1, 10**6), rng.randint(2**32, 2**40), 2**62])
        seed, epoch, position = rng.getrandbits(64), rng.getrandbits(32), rng.randrange(n)
        assert order(seed, epoch, position, n).tolist() == [slow_order(seed, epoch, position, n)], (
            seed,
            epoch,
            position,
            n,
        )


def test_epochs_may_differ_within_a_call() -> None:
    epoch_B, position_B = np.array([0, 5, 2**32 - 1]), np.array([999, 0, 500])
    together = order(1, epoch_B, position_B, 1000)
    alone = [order(1, epoch, position, 1000)[0] for epoch, position in zip(epoch_B, position_B, strict=True)]
    assert together.tolist() == alone


def test_differs_by_epoch_and_seed() -> None:
    position_B = np.arange(1000)
    orders = {order(seed, epoch, position_B, 1000).tobytes() for seed in (0, 1, 2**32, 2**63) for epoch in range(25)}
    assert len(orders) == 100


def test_two_epochs_share_places_as_often_as_chance() -> None:
    """A random permutation keeps one element in place on average, whatever its length."""
    n, epochs = 5000, 200
    orders = np.stack([order(9, epoch, np.arange(n), n) for epoch in range(epochs)])
    same_as_before = (orders[1:] == orders[:-1]).sum(axis=1)
    assert abs(same_as_before.mean() - 1) < 0.3
    ranks = [stats.spearmanr(a, b).statistic for a, b in itertools.pairwise(orders[:50])]
    assert abs(np.mean(ranks)) < 4 / np.sqrt(n * len(ranks))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 16, 17, 50, 64, 100])
def test_every_element_lands_everywhere_equally_often(n: int) -> None:
    epochs = 20_000
    epoch_B, position_B = np.divmod(np.arange(epochs * n), n)
    landed = order(123, epoch_B, position_B, n)
    counts = np.zeros((n, n))
    np.add.at(counts, (position_B, landed), 1)
    # Rows and columns are fixed by the bijection: (n - 1)**2 degrees of freedom, as in a contingency table.
    statistic = ((counts - epochs / n) ** 2 / (epochs / n)).sum() * (n - 1) / n
    assert 1e-4 < stats.chi2.sf(statistic, (n - 1) ** 2) < 1 - 1e-6


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_all_permutations_of_a_few_are_equally_likely(n: int) -> None:
    epochs = 40_000
    epoch_B, position_B = np.divmod(np.arange(epochs * n), n)
    codes = order(77, epoch_B, position_B, n).reshape(epochs, n) @ n ** np.arange(n)
    counts = np.unique(codes, return_counts=True)[1]
    wanted = np.prod(np.arange(1, n + 1))
    assert len(counts) == wanted
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("n", [8, 12, 16, 20, 64])
def test_all_pair_orders_are_equally_likely(n: int) -> None:
    """Where two neighbours land, jointly: n * (n - 1) outcomes."""
    epochs = 100_000
    pairs = np.stack([order(5, np.arange(epochs), position, n) for position in (n // 2 - 1, n // 2)])
    counts = np.bincount(pairs[0] * n + pairs[1], minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("epoch", "position", "n"),
    [(0, 0, 0), (0, 0, 2**62 + 1), (-1, 0, 5), (2**32, 0, 5), (0, 5, 5), (0, -1, 5)],
)
def test_out_of_range(epoch: int, position: int, n: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        order(0, epoch, position, n)


def test_no_rows() -> None:
    assert order(0, 0, np.empty(0, np.int64), 5).shape == (0,)
