"""The comparison's arithmetic, on rounds whose truth is known, and what becomes of several passes."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = 0.10


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, which is no package."""
    sys.path.append(str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("verdict", "comparison", "giver")})
    sys.path.remove(str(BENCHMARKS))


def noisy(rng: np.random.Generator, rounds: int, noise: float) -> np.ndarray:
    """Factors on the times of successive rounds, as shared machines give them.

    Heavy tails, a drift, slow spells that begin and end anywhere, and single rounds that something else disturbed.
    """
    drift = np.cumsum(rng.normal(0, noise / 4, rounds)) + 0.2 * (np.cumsum(rng.random(rounds) < 0.03) % 2)
    disturbed = np.where(rng.random(rounds) < 0.1, 1 + rng.pareto(2, rounds), 1)
    return np.exp(drift + noise * rng.standard_t(3, rounds)) * disturbed


def take_pairs(seed: int, pairs: int, slower: float = 1.0, noise: float = 0.02) -> list[dict[str, Any]]:
    """Rounds as `giver.take_turns` takes them: who is first changes. `slower` is the truth."""
    rng = np.random.default_rng([seed, pairs])
    factors_P2, arms_AP2 = noisy(rng, 2 * pairs, noise).reshape(-1, 2), rng.lognormal(0, 0.05, (2, pairs, 2))
    rounds = []
    for pair in range(pairs):
        order = ("base", "current") if pair % 2 == 0 else ("current", "base")
        each: dict[str, Any] = {"first": order[0]}
        for place, side in enumerate(order):
            calibration = {"matmul": 0.003 * arms_AP2[0, pair, place], "copy": 0.004 * arms_AP2[1, pair, place]}
            seconds = 0.05 * factors_P2[pair, place] * (slower if side == "current" else 1.0)
            each[side] = {"seconds": seconds, "calibration": calibration}
        rounds.append(each)
    return rounds


def measured(tools: SimpleNamespace, rounds: list[dict[str, Any]], **counts: Any) -> Any:
    return tools.giver.Measured("a", "benchmarks/a", "cpu", rounds, counts or {"base": None, "current": None})


@pytest.fixture
def few_resamples(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.verdict, "RESAMPLES", 300)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("pairs", [11, 40])
def test_a_revision_against_itself_gives_no_alarm(tools: SimpleNamespace, pairs: int) -> None:
    said = [tools.verdict.judge(take_pairs(seed, pairs, noise=0.04), CPU).verdict for seed in range(500)]
    assert said.count("slower") == said.count("faster") == 0
    assert said.count("void") == 0


@pytest.mark.usefixtures("few_resamples")
def test_the_interval_holds_the_truth_as_often_as_it_says(tools: SimpleNamespace) -> None:
    """Near 95 %: with too wide intervals nothing would ever be found, with too narrow ones anything."""
    held = 0
    for seed in range(500):
        times = tools.verdict.judge(take_pairs(seed, 25, slower=1.3), CPU).times
        assert times.low <= times.ratio <= times.high
        held += times.low <= 1 / 1.3 <= times.high
    assert 0.90 < held / 500 < 0.98


@pytest.mark.usefixtures("few_resamples")
def test_fifteen_per_cent_are_found(tools: SimpleNamespace) -> None:
    for slower, verdict in ((1.15, "slower"), (1 / 1.15, "faster")):
        said = [tools.verdict.judge(take_pairs(seed, 60, slower), CPU).verdict for seed in range(200)]
        assert said.count(verdict) > 180
        assert set(said) <= {verdict, "no difference that can be told"}


def test_the_ratio_is_base_over_current_and_its_middle_is_a_median(tools: SimpleNamespace) -> None:
    times = tools.verdict.paired([2.0, 2.0, 4.0, 90.0, 2.0], [1.0, 1.0, 2.0, 1.0, 1.0])
    assert (times.ratio, times.low, times.pairs) == (pytest.approx(2.0), pytest.approx(2.0), 5)
    assert str(tools.verdict.paired([1.0], [1.0])) == "1.000 (1.000 to 1.000)"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.80, 0.90, "slower"),
        (0.80, 0.92, "no difference that can be told"),  # the whole interval, not its middle
        (0.92, 0.95, "no difference that can be told"),  # slower, but by less than what counts
        (1.11, 1.30, "faster"),
        (1.09, 1.30, "no difference that can be told"),
    ],
)
def test_the_whole_interval_must_lie_beyond_the_threshold(
    tools: SimpleNamespace, low: float, high: float, verdict: str
) -> None:
    assert tools.verdict.side_of(tools.verdict.Interval((low + high) / 2, low, high, 20), CPU) == verdict


@pytest.mark.parametrize("arm", ["matmul", "copy"])
@pytest.mark.parametrize("side", ["base", "current"])
def test_a_calibration_arm_that_differs_voids_even_a_clear_difference(
    tools: SimpleNamespace, arm: str, side: str
) -> None:
    rounds = take_pairs(0, 40, slower=1.5)
    assert tools.verdict.judge(rounds, CPU).verdict == "slower"
    for each in rounds:
        each[side]["calibration"][arm] *= 1.2
    judgement = tools.verdict.judge(rounds, CPU)
    assert (judgement.verdict, judgement.drifted) == ("void", (arm,))
    finding = tools.comparison.find(measured(tools, rounds), CPU, "HEAD~1", True)
    assert finding.alarms == ()
    assert f"no revision touches differs between the two sides: {arm} " in finding.note
    assert tools.verdict.judge(rounds, 0.6).verdict == "no difference that can be told"  # half of that is the limit


def test_counts_are_compared_exactly(tools: SimpleNamespace) -> None:
    more, fewer = tools.verdict.counts_that_differ(
        {"operations": 5, "launches": 3, "peak_bytes": 100, "written_bytes": 7},
        {"operations": 6, "launches": 3, "peak_bytes": 99, "new": 1},
    )
    assert (more, fewer) == ({"operations": (5, 6)}, {"peak_bytes": (100, 99)})
    assert tools.verdict.counts_that_differ(None, {"operations": 6}) == ({}, {})
    rounds = take_pairs(0, 11)
    for count_alarms in (True, False):
        counted = measured(tools, rounds, base={"operations": 1000}, current={"operations": 1001})
        finding = tools.comparison.find(counted, CPU, "HEAD~1", count_alarms)
        assert finding.alarms == (("more operations",) if count_alarms else ())
        assert finding.row()[-1] == "more operations (1,000 to 1,001)"
    same = measured(tools, rounds, base={"operations": 5}, current={"operations": 5})
    assert tools.comparison.find(same, CPU, "HEAD~1", True).row()[-1] == "the same"


def passes(tools: SimpleNamespace, *said: str) -> Any:
    """The finding after passes that say `slower`, `same` or `void`, as many as were asked for."""
    factors = {"slower": 1.5, "same": 1.0, "void": 1.5}
    finding = None
    for number, word in enumerate(said):
        rounds = take_pairs(number, 30, factors[word])
        for each in rounds if word == "void" else ():
            each["base"]["calibration"]["copy"] *= 2
        fresh = tools.comparison.find(measured(tools, rounds), CPU, "HEAD~1", True)
        if finding is None:
            finding = fresh
        else:
            assert tools.comparison.is_open(finding), f"nothing was open before pass {number + 1}"
            finding = tools.comparison.settle(finding, fresh)
    return finding


@pytest.mark.parametrize(
    ("said", "verdict", "is_open"),
    [
        (["same"], "no difference that can be told", False),
        (["slower"], "slower", True),
        (["void"], "void", True),
        (["slower", "slower"], "slower", False),
        (["slower", "same"], "no difference that can be told", False),
        (["void", "same"], "no difference that can be told", False),
        (["void", "slower"], "void", True),
        (["slower", "void"], "void", True),
        (["slower", "void", "slower"], "slower", False),
        (["void", "slower", "slower"], "slower", False),
        (["void", "slower", "same"], "no difference that can be told", False),
        (["void", "slower", "void"], "void", False),
        (["void", "void"], "void", False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_regression_is_what_two_passes_say(
    tools: SimpleNamespace, said: list[str], verdict: str, is_open: bool
) -> None:
    finding = passes(tools, *said)
    assert (finding.verdict, tools.comparison.is_open(finding)) == (verdict, is_open)
    assert finding.alarms == (("slower",) if verdict == "slower" else ())
    assert len(finding.again) == len(said) - 1
    assert finding.row()[3] == verdict


def test_more_counts_must_be_there_in_fresh_processes_too(tools: SimpleNamespace) -> None:
    counted = [
        tools.comparison.find(
            measured(tools, take_pairs(0, 11), base={"launches": 3}, current={"launches": n}), CPU, "HEAD~1", True
        )
        for n in (4, 4, 3)
    ]
    assert tools.comparison.is_open(counted[0])
    for fresh, alarms in ((counted[1], ("more launches",)), (counted[2], ())):
        finding = tools.comparison.settle(counted[0], fresh)
        assert finding.alarms == alarms
        assert not tools.comparison.is_open(finding)


def test_a_benchmark_that_fails_in_fresh_processes_fails(tools: SimpleNamespace) -> None:
    broken = tools.giver.Measured("a", "benchmarks/a", reason="it broke", whose="current", failed=True)
    fresh = tools.comparison.find(broken, CPU, "HEAD~1", True)
    finding = tools.comparison.settle(passes(tools, "slower"), fresh)
    assert (finding.verdict, finding.alarms, finding.note) == ("fails", ("fails",), "fails: it broke")
    assert not tools.comparison.is_open(finding)


def test_more_rounds_are_asked_for_where_they_could_tell(tools: SimpleNamespace) -> None:
    for slower, unsure in ((1.0, False), (1.1, True), (1.5, False), (1 / 1.5, False)):
        assert tools.comparison.is_unsure(measured(tools, take_pairs(1, 30, slower)), 0.0) == unsure


def test_the_threshold_is_the_devices_unless_one_is_given(tools: SimpleNamespace) -> None:
    rounds = take_pairs(2, 100, slower=1.08, noise=0.005)
    for device, threshold, verdict in (
        ("cpu", 0.0, "no difference that can be told"),
        ("cuda", 0.0, "slower"),
        ("cpu", 0.02, "slower"),
    ):
        each = tools.giver.Measured("a", "benchmarks/a", device, rounds, {"base": None, "current": None})
        assert tools.comparison.find(each, threshold, "HEAD~1", True).verdict == verdict


def test_markdown_is_a_table_with_notes(tools: SimpleNamespace) -> None:
    gone = tools.giver.Measured("b[x|y]", "benchmarks/b", reason="ImportError: no", whose="base", failed=True)
    findings = [passes(tools, "slower", "slower"), tools.comparison.find(gone, 0.0, "HEAD~1", True)]
    last = tools.comparison.summary(findings, None)
    text = tools.comparison.markdown(findings, ["base x"], last)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert rows[1] == "| --- | --- | --- | --- | --- |"
    assert rows[2].startswith("| a | 0.6")
    assert rows[3] == "| b[x\\|y] |  |  | not compared |  |"
    assert "- b[x|y]: does not run at HEAD~1: ImportError: no" in text.splitlines()
    assert last == "1 of 2 benchmarks compared. Regression: a (slower)."
    assert tools.comparison.summary(findings, "it died").endswith("not complete: it died. Suspected: a (slower).")
    assert tools.comparison.summary(findings[1:], None) == "0 of 1 benchmarks compared: nothing can be said."


def test_the_terminals_table_names_the_case(tools: SimpleNamespace) -> None:
    """Brackets are markup for rich."""
    from rich.console import Console

    gone = tools.giver.Measured("b.py::test[bold]", "benchmarks/b", reason="ImportError: no", whose="base")
    console = Console(width=120, file=io.StringIO())
    console.print(tools.comparison.table([tools.comparison.find(gone, 0.0, "HEAD~1", True)]))
    assert "b.py::test[bold]" in console.file.getvalue()
