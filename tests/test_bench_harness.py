"""The benchmarks' harness: what it measures, in which order, and how it takes turns.

No test depends on time: variants tell scripted seconds, or a scripted clock is read.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import NameWrapper

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # is no package: its helpers are found there

import harness
from harness import Disagreement, Session, Variant, compare
from turns import Turns


class Arm:
    """A calibration arm with scripted seconds."""

    flops = 2000.0

    def __init__(self, events: list[str], seconds: Iterable[float] = ()) -> None:
        self.events, self.seconds = events, iter(seconds)

    def round(self) -> dict[str, float]:
        self.events.append("calibration")
        return {"matmul": next(self.seconds, 1.0), "copy": 0.5}


def scripted(name: str, events: list[str], seconds: Iterable[float] = (), **options: Any) -> Variant:
    """A variant that tells what happens to it, and that its rounds took so long."""
    told = iter(seconds)

    def run() -> float:
        events.append(f"{name} runs")
        return next(told, 1.0)

    return Variant(
        before=lambda: events.append(f"{name} before"),
        after=lambda: events.append(f"{name} after"),
        seconds=run,
        **options,
    )


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def session(events: list[str]) -> Session:
    session = Session(name="test_file.py::test_it[case]", title="A title [case]")
    session.calibrations["cpu"] = Arm(events)  # type: ignore[assignment]
    return session


@pytest.fixture
def new_benchmark(request: pytest.FixtureRequest) -> Callable[..., BenchmarkFixture]:
    """Makes pytest-benchmark's fixture as its plugin does, with our clock, but out of this run's own report."""
    plugin = request.config._benchmarksession  # type: ignore[attr-defined]

    def make(disabled: bool = False) -> BenchmarkFixture:
        options = {**plugin.options, "timer": NameWrapper(harness.clock)}
        return BenchmarkFixture(
            request.node,
            add_stats=[].append,
            logger=plugin.logger,
            warner=request.node.warn,
            disabled=disabled,
            **options,
        )

    return make


@pytest.fixture
def benchmark(new_benchmark: Callable[..., BenchmarkFixture]) -> BenchmarkFixture:
    return new_benchmark()


def run(benchmark: Any, session: Session, ours: Variant, **options: Any) -> dict[str, Any]:
    """`compare` with what most tests don't care for; returns extra_info."""
    settings = {"check": harness.nothing, "items": 10.0, "unit": "images", "warm_up_seconds": None, **options}
    compare(benchmark, session, ours=ours, **settings)
    return {} if benchmark is None else benchmark.extra_info


def test_medians_percentiles_rates_and_ratios(benchmark: Any, session: Session, events: list[str]) -> None:
    ours = [4.0, 1.0, 5.0, 2.0, 3.0]
    peers = {"twice": [2 * each for each in ours], "steady": [6.0] * 5}
    found = run(
        benchmark,
        session,
        scripted("ours", events, ours),
        peers={name: scripted(name, events, seconds) for name, seconds in peers.items()},
        items=60,
        per=2,
        unit="images a core",
        rounds=5,
    )
    assert benchmark.stats.stats.data == pytest.approx(ours)
    assert found["seconds_a_round"]["ours"] == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})
    assert found["rates"]["ours"] == pytest.approx({"median": 10.0, "p20": 30 / 4.2, "p80": 30 / 1.8})
    assert found["rates"]["steady"] == pytest.approx({"median": 5.0, "p20": 5.0, "p80": 5.0})
    assert found["peer_seconds"] == peers
    # Round by round exactly twice the time: only pairs that stay together leave no doubt about the ratio.
    assert found["times_the_peer"]["twice"] == pytest.approx({"ratio": 2.0, "low": 2.0, "high": 2.0, "pairs": 5})
    steady = found["times_the_peer"]["steady"]
    assert steady["ratio"] == pytest.approx(2.0)
    assert 6 / 5 <= steady["low"] < 2 < steady["high"] <= 6
    assert found["items_a_round"] == 60
    assert (found["unit"], found["title"], found["device"]) == ("images a core", "A title [case]", "cpu")
    assert found["summary"].startswith("10 images a core/s; 2.00 times as fast (2.00 to 2.00, 5 pairs) as twice (5);")


def test_one_item_is_told_in_seconds(benchmark: Any, session: Session, events: list[str]) -> None:
    peers = {"slow": scripted("slow", events, [3.0])}
    found = run(benchmark, session, scripted("ours", events, [0.25]), peers=peers, items=1, rounds=1)
    assert found["summary"] == "250 ms; 12.00 times as fast (one round: no interval) as slow (3 s)"


def test_calibrations_median_and_spread(benchmark: Any, session: Session, events: list[str]) -> None:
    session.calibrations["cpu"] = Arm(events, [1.0, 2.0, 3.0, 4.0, 5.0])  # type: ignore[assignment]
    found = run(benchmark, session, scripted("ours", events), rounds=5)["calibration"]
    assert found == {"matmul": {"seconds": 3.0, "spread": pytest.approx(2 / 3)}, "copy": {"seconds": 0.5, "spread": 0}}


def test_the_share_of_the_limit(benchmark: Any, session: Session, events: list[str]) -> None:
    """10 items of 30 operations in 4 seconds, beside 2,000 operations in 2 seconds: 75 of 1,000 a second."""
    session.calibrations["cpu"] = Arm(events, [1.0, 2.0, 9.0])  # type: ignore[assignment]
    ours = scripted("ours", events, [4.0, 3.0, 8.0])
    found = run(benchmark, session, ours, rounds=3, flops_an_item=lambda: events.append("flops") or 30.0)
    assert found["share_of_limit"] == {"share": pytest.approx(0.075), "of": "the matrix product's rate"}
    assert found["flops_an_item"] == 30.0
    assert found["summary"].endswith("; 7.5 % of the matrix product's rate")
    assert events.index("flops") > max(i for i, event in enumerate(events) if event == "ours after")


def test_the_order_of_events(benchmark: Any, session: Session, events: list[str]) -> None:
    def one(name: str) -> list[str]:
        return [f"{name} before", f"{name} runs", f"{name} after"]

    peers = {name: scripted(name, events) for name in ("a", "b")}
    options = {"check": lambda: events.append("check"), "warm_up_seconds": 0.0, "rounds": 2}
    run(
        benchmark, session, scripted("ours", events), peers=peers, extra=lambda: events.append("extra") or {}, **options
    )
    warm_up = ["check", *one("ours"), *one("a"), *one("b")]
    round_of_all = [*one("a"), *one("b"), "calibration", *one("ours")]
    assert events == [*warm_up, *round_of_all, *round_of_all, "extra"]


def test_quick_is_one_round(benchmark: Any, session: Session, events: list[str]) -> None:
    session.quick = True
    peers = {"peer": scripted("peer", events)}
    found = run(benchmark, session, scripted("ours", events), peers=peers, warm_up_seconds=60.0)
    assert [events.count(f"{name} runs") for name in ("ours", "peer")] == [2, 2]  # a warm-up and a round
    assert found["times_the_peer"]["peer"] == {"ratio": 1.0, "low": None, "high": None, "pairs": 1}


def test_a_process_of_its_own_needs_no_warm_up(benchmark: Any, session: Session, events: list[str]) -> None:
    session.quick = True
    run(benchmark, session, scripted("ours", events), warm_up_seconds=None)
    assert events.count("ours runs") == 1


def test_warm_up_lasts_and_the_wall_clock_is_around_the_work_alone(
    benchmark: Any, session: Session, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]

    def passing(seconds: float, event: str) -> Callable[[], None]:
        def work() -> None:
            now[0] += seconds
            events.append(event)

        return work

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    ours = Variant(passing(2.0, "runs"), passing(10.0, "before"), passing(20.0, "after"))
    begun = harness.clock()
    run(benchmark, session, ours, rounds=3, warm_up_seconds=70.0)
    assert events.count("runs") == 3 + 3  # 32 s each: the third warm-up begins at 64 s and ends after 70
    assert benchmark.stats.stats.data == pytest.approx([2.0] * 3)
    assert harness.clock() - begun == pytest.approx(6.0)


def test_a_round_that_fails_is_cleaned_up(benchmark: Any, session: Session, events: list[str]) -> None:
    def fail() -> float:
        raise RuntimeError("planted")

    ours = Variant(after=lambda: events.append("ours after"), seconds=fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(benchmark, session, ours)
    assert events == ["calibration", "ours after"]
    events.clear()
    peer = Variant(after=lambda: events.append("peer after"), seconds=fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(benchmark, session, scripted("ours", events), peers={"peer": peer}, warm_up_seconds=0.0)
    assert events == ["ours before", "ours runs", "ours after", "peer after"]


def test_disabled_benchmarks_run_once(
    new_benchmark: Callable[..., BenchmarkFixture], session: Session, events: list[str]
) -> None:
    found = run(new_benchmark(disabled=True), session, scripted("ours", events))
    assert events.count("ours runs") == 1
    assert found == {}


def test_disagreement_is_one_paragraph_and_nothing_runs(benchmark: Any, session: Session, events: list[str]) -> None:
    def check() -> None:
        raise AssertionError("the loss is 3\n  and the other's\n\nis 4")

    peers = {"peer": scripted("peer", events)}
    with pytest.raises(Disagreement) as caught:
        run(benchmark, session, scripted("ours", events), peers=peers, check=check)
    assert str(caught.value) == (
        "test_file.py::test_it[case]: the variants do not compute the same, so their speed is not compared. Mend the"
        " variant that is wrong, or the check. the loss is 3 and the other's is 4"
    )
    assert events == []


def test_disagreement_without_words_shows_the_line(session: Session, tmp_path: Path) -> None:
    """In a helper of benchmarks/ pytest gives assertions no words."""
    file = tmp_path / "a_check.py"
    file.write_text("def check():\n    found = 3\n    assert found == 4\n")
    spec = importlib.util.spec_from_file_location("a_check", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(Disagreement) as caught:
        compare(None, session, ours=Variant(), check=module.check, items=1, unit="images")
    assert str(caught.value).endswith(f"{file}:3: assert found == 4")


def test_a_check_that_breaks_is_no_disagreement(benchmark: Any, session: Session) -> None:
    def check() -> None:
        raise FileNotFoundError("planted")

    with pytest.raises(FileNotFoundError):
        run(benchmark, session, Variant(), check=check)


def test_counts_of_the_countable_alone(benchmark: Any, session: Session) -> None:
    x_8 = torch.ones(8)
    work = Variant(lambda: x_8 + 1, countable=True)
    peers = {"compiled": Variant(lambda: x_8 + 1, countable=True, compiled=True), "elsewhere": Variant(lambda: x_8 + 1)}
    found = run(benchmark, session, work, peers=peers, rounds=1)["counts"]
    assert found == {"ours": {"operations": 1, "written_bytes": 32}, "compiled": {}}


def test_a_session_has_one_arm_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(harness, "Calibration", lambda device: made.append(device) or Arm([]))
    session = Session()
    assert session.calibration("cpu") is session.calibration("cpu")
    assert made == ["cpu"]


class Giver:
    """The other end of a benchmark's line, by the words of `turns.py`: so many turns, then the end."""

    def __init__(self, path: Path, turns: int) -> None:
        self.turns = turns
        self.heard: list[dict[str, Any]] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        self.thread = threading.Thread(target=self._give, daemon=True)
        self.thread.start()

    def _give(self) -> None:
        connection, _ = self.server.accept()
        with connection, connection.makefile("rw") as line:
            self.heard += [json.loads(line.readline()), json.loads(line.readline())]
            for go in [True] * self.turns + [False]:
                line.write(json.dumps({"go": go}) + "\n")
                line.flush()
                if go:
                    self.heard.append(json.loads(line.readline()))

    def end(self) -> list[dict[str, Any]]:
        """All that it was told."""
        self.thread.join(timeout=60)
        self.server.close()
        assert not self.thread.is_alive()
        return self.heard


def test_in_turns_ours_alone_runs_when_told(session: Session, events: list[str], tmp_path: Path) -> None:
    giver = Giver(tmp_path / "giver", turns=3)
    session.turns = Turns(str(tmp_path / "giver"), {"mvp_fast": "a place"})
    x_8 = torch.ones(8)
    ours = scripted("ours", events, [9.0, 1.0, 2.0, 3.0], run=lambda: x_8 + 1, countable=True)
    options = {"check": lambda: events.append("check"), "warm_up_seconds": 0.0, "rounds": 50}
    run(None, session, ours, peers={"peer": scripted("peer", events)}, **options)
    session.turns.line.close()
    hello, ready, *rounds = giver.end()
    assert hello == {"hello": {"mvp_fast": "a place"}}
    counts = {"operations": 1, "written_bytes": 32}
    assert ready == {"ready": "test_file.py::test_it[case]", "facts": {"device": "cpu", "counts": counts}}
    assert rounds == [{"seconds": each, "calibration": {"matmul": 1.0, "copy": 0.5}} for each in (1.0, 2.0, 3.0)]
    counted = ["ours before", "ours after"]  # once more, for the counts
    turn = ["calibration", "ours before", "ours runs", "ours after"]
    assert events == ["check", "ours before", "ours runs", "ours after", *counted, *turn * 3]
