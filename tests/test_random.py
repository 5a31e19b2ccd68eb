"""Philox against its published vectors and a slow reference; the counter's layout; streams that never meet."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from mvp_fast.samples.compiled import compiled, philox4x32_scalar
from mvp_fast.samples.random import BLOCKS, Stream, below, draws, key_words, philox4x32, uniforms

# Random123's kat_vectors, the lines "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's round function on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (p1 // 2**32) ^ c1 ^ r0, p1 % 2**32, (p0 // 2**32) ^ c3 ^ r1, p0 % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("given", "wanted"), KNOWN_ANSWERS)
def test_known_answers(given: str, wanted: str) -> None:
    words = hexes(given)
    assert [int(word) for word in philox4x32(tuple(words[:4]), tuple(words[4:]))] == hexes(wanted)
    assert list(philox4x32_scalar(*map(np.uint64, words))) == hexes(wanted)
    assert slow_philox(words[:4], words[4:]) == hexes(wanted)


def test_vectorised_and_compiled_agree_with_the_reference() -> None:
    rng = np.random.default_rng()
    counters = rng.integers(0, 1 << 32, (200, 4), dtype=np.uint32)
    key = rng.integers(0, 1 << 32, 2, dtype=np.uint32)
    together = np.stack(philox4x32(tuple(counters.T), (key[0], key[1])), axis=1)
    assert together.dtype == np.uint32
    for counter, words in zip(counters, together, strict=True):
        wanted = slow_philox([int(c) for c in counter], [int(k) for k in key])
        assert words.tolist() == wanted
        assert list(philox4x32_scalar(*counter.astype(np.uint64), *key.astype(np.uint64))) == wanted


def test_counter_words_broadcast() -> None:
    words = philox4x32((np.arange(6).reshape(2, 3), 0, 7, np.uint32(9)), (1, 2))
    assert all(word.shape == (2, 3) for word in words)
    assert [int(word[1, 2]) for word in words] == slow_philox([5, 0, 7, 9], [1, 2])


def test_layout_of_the_counter() -> None:
    rng = random.Random()
    for _ in range(50):
        seed, epoch, position = rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(63)
        stream, block = rng.choice(list(Stream)), rng.getrandbits(16)
        counter = [position % 2**32, position // 2**32, epoch, stream * 2**16 + block]
        wanted = slow_philox(counter, [seed % 2**32, seed // 2**32])
        assert draws(seed, stream, [epoch], [position], block).tolist() == [wanted]


def test_draws_differ_in_every_coordinate() -> None:
    base = {"seed": 5, "stream": Stream.CROP, "epoch_B": 3, "position_B": 8, "block": 2}
    changes = [
        {},
        {"seed": 5 + 2**32},
        {"stream": Stream.MASK},
        {"epoch_B": 4},
        {"position_B": 8 + 2**32},
        {"block": 3},
    ]
    assert len({draws(**{**base, **change}).tobytes() for change in changes}) == len(changes)


def test_streams_are_distinct_and_fit_their_half_word() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)
    assert all(0 < stream < 1 << 16 for stream in Stream)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
def test_uniforms_are_the_words_in_order(count: int) -> None:
    position_B = np.array([0, 1, 2**40])
    found = uniforms(7, Stream.SCENES, 1, position_B, count)
    words = np.concatenate([draws(7, Stream.SCENES, 1, position_B, block) for block in range(3)], axis=1)
    assert found.shape == (3, count)
    assert found.dtype == np.float64
    assert np.array_equal(found, words[:, :count] / 2**32)


def test_uniforms_are_uniform_and_below_one() -> None:
    numbers = uniforms(0, Stream.CROP, 0, np.arange(50_000), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.02


def test_below_covers_its_range_evenly() -> None:
    words = draws(1, Stream.CROP, 0, np.arange(60_000), 0)[:, 0]
    assert not below(words, 1).any()
    for bound in (2, 7):
        assert stats.chisquare(np.bincount(below(words, bound), minlength=bound)).pvalue > 1e-4
    extremes = np.array([0, 2**32 - 1], dtype=np.uint32)
    assert below(extremes, np.array([2**31, 2**31])).tolist() == [0, 2**31 - 1]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"epoch_B": -1},
        {"epoch_B": 2**32},
        {"position_B": -1},
        {"block": -1},
        {"block": BLOCKS},
    ],
    ids=str,
)
def test_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"not in|negative"):
        draws(**{"seed": 0, "stream": Stream.CROP, "epoch_B": 0, "position_B": 0, "block": 0, **change})


def test_uniforms_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        uniforms(0, Stream.CROP, 0, 0, 0)
    assert uniforms(0, Stream.CROP, 0, np.empty(0, np.int64), 3).shape == (0, 3)


def test_key_words() -> None:
    assert key_words(2**64 - 2) == (2**32 - 2, 2**32 - 1)


def test_machine_code_is_kept_where_it_can_be_and_made_anew_where_not() -> None:
    assert philox4x32_scalar.stats.cache_path is not None
    space: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x\n", space)  # no file, so no place for a cache
    twice = compiled(space["twice"])
    assert twice(21) == 42
    assert twice.stats.cache_path is None


def test_index_and_random_do_not_import_numba() -> None:
    code = (
        "import sys, mvp_fast.samples.index, mvp_fast.samples.random, mvp_fast.samples.index_build\n"
        "print([name for name in ('numba', 'torch') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
