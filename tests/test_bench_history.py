"""The history of recorded results: which runs share a line, where changes are marked, and the page.

All results here are made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem, UserError
from tests.bench_results import CPU, GPU, NAME, extra, history, record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results, which `history.run` reads."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(history, "RESULTS", folder)
    return folder


def machines(folder: Path, device: str = "") -> list[Any]:
    return history.machines([run for _, run in history.load(folder, device)])


# Change points.


@pytest.mark.parametrize("runs", [6, 12, 40])
@pytest.mark.parametrize("tails", ["light", "heavy"])
def test_noise_is_hardly_ever_marked(runs: int, tails: str) -> None:
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if tails == "light" else lambda n: rng.standard_t(3, n)
    marked = sum(bool(history.change_points(np.exp(0.03 * draw(runs)))) for _ in range(100))
    assert marked <= 3


@pytest.mark.parametrize(("before", "after"), [(3, 3), (6, 3), (10, 10), (30, 4)])
@pytest.mark.parametrize("factor", [0.85, 1.2])
def test_a_change_is_marked_where_it_is(before: int, after: int, factor: float) -> None:
    rng = np.random.default_rng(0)
    level = np.repeat([100.0, 100.0 * factor], [before, after])
    found = [history.change_points(level * np.exp(0.015 * rng.standard_normal(len(level)))) for _ in range(50)]
    assert sum(places == [before] for places in found) >= 45


def test_several_changes_are_marked() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat([100, 120, 90], 8) * np.exp(0.01 * rng.standard_normal(24))
    assert history.change_points(values) == [8, 16]
    assert history.change_points(1e6 * values) == [8, 16]


@pytest.mark.parametrize(
    "values",
    [
        [100, 100, 100, 150, 150],  # too few
        [100.0] * 12,
        [*[100, 101, 99] * 5, 60, *[100, 101, 99] * 5],  # one strange run
        [*[100, 101, 99] * 10, 60],  # it may be strange, too
        [100] * 6 + [100.5] * 6,  # not worth a mark
        [],
    ],
    ids=["few", "constant", "outlier", "newest", "tiny", "none"],
)
def test_what_is_no_change_is_not_marked(values: list[float]) -> None:
    assert history.change_points(values) == []


# Which runs share a line.


def test_runs_come_by_date(results: Path) -> None:
    for day in (5, 0, 9):
        path = record(results, day, (NAME, extra(100 + day)))
        path.rename(path.with_name(f"{9 - day}.json"))
    ((graph,),) = [machine.graphs for machine in machines(results)]
    assert [point.value for point in graph.rate.points] == [100, 105, 109]
    assert [run.date.day for run in graph.runs] == [1, 6, 10]
    point = graph.rate.points[1]
    assert (point.low, point.high) == pytest.approx((105 * 0.98, 105 * 1.02))


def test_machines_are_kept_apart(results: Path) -> None:
    record(results, 0, (NAME, extra(1)))
    record(results, 1, (NAME, extra(2)), cpu="another CPU")
    record(results, 2, (NAME, extra(3)), cores=4)
    record(results, 3, (NAME, extra(4)), device=GPU)
    record(results, 4, (NAME, extra(5)))
    found = machines(results)
    lines = {(m.device, m.cpu, m.cores): [p.value for p in m.graphs[0].rate.points] for m in found}
    assert lines == {
        (CPU, "a CPU", 2): [1, 5],
        (CPU, "another CPU", 2): [2],
        (CPU, "a CPU", 4): [3],
        (GPU, "a CPU", 2): [4],
    }
    assert len({machine.slug for machine in found}) == 4
    assert [machine.device for machine in machines(results, GPU)] == [GPU]


def test_a_peer_or_a_benchmark_may_come_later(results: Path) -> None:
    record(results, 0, (NAME, extra(1, ratio=None)))
    record(results, 1, (NAME, extra(2)), ("test_x.py::test_z", extra(7)))
    (machine,) = machines(results)
    first, second = machine.graphs
    assert [(point.at, point.value) for point in first.ratios[0].points] == [(1, 2.0)]
    assert [len(first.runs), len(second.runs)] == [2, 1]


def test_another_unit_is_another_figure(results: Path) -> None:
    record(results, 0, (NAME, extra(1, unit="images")))
    record(results, 1, (NAME, extra(2, unit="images a core")))
    assert [graph.unit for machine in machines(results) for graph in machine.graphs] == ["images", "images a core"]


def test_without_rates_rounds_are_counted(results: Path) -> None:
    record(results, 0, (NAME, {}))
    ((graph,),) = [machine.graphs for machine in machines(results)]
    assert (graph.unit, graph.title, graph.rate.points[0].value) == ("rounds", NAME, 2.0)


def test_a_change_is_told_with_its_factor(results: Path) -> None:
    for day in range(8):
        record(results, day, (NAME, extra((100, 101, 99)[day % 3] * (0.8 if day >= 5 else 1))))
    ((graph,),) = [machine.graphs for machine in machines(results)]
    assert [(change.at, change.factor) for change in graph.rate.changes] == [(5, pytest.approx(0.8, rel=0.02))]
    assert graph.ratios[0].changes == []


# What can't be drawn.


def misplaced(folder: Path) -> None:
    path = record(folder, 0, (NAME, extra(1)))
    (folder / GPU).mkdir()
    path.rename(folder / GPU / path.name)


def foreign(folder: Path) -> None:
    path = record(folder, 0, (NAME, extra(1)))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))


BROKEN: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[UserError], str]] = {
    "nothing": (lambda folder: None, {}, DataError, "no recorded results"),
    "unreadable": (lambda folder: record(folder, 0, (NAME, extra(1))).write_text("{"), {}, DataError, "can't be read"),
    "foreign": (foreign, {}, DataError, "schema 1"),
    "misplaced": (misplaced, {}, DataError, "another device's folder"),
    "quick": (lambda folder: record(folder, 0, (NAME, extra(1)), rounds=1), {}, DataError, "--quick"),
    "device": (lambda folder: record(folder, 0, (NAME, extra(1))), {"device": "cpu-3cores"}, DataError, CPU),
    "docs": (lambda folder: None, {"docs": True, "out": "x"}, ConfigError, "--docs with --out"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_drawn_is_refused(results: Path, tmp_path: Path, case: str) -> None:
    prepare, options, kind, words = BROKEN[case]
    prepare(results)
    with pytest.raises(kind, match=re.escape(words)) as refused:
        history.run(**{"out": str(tmp_path / "out"), **options})
    assert "\n" not in refused.value.paragraph()
    assert not (tmp_path / "out").exists()


def test_what_the_machine_lacks_is_told(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(results, 0, (NAME, extra(1)))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(EnvironmentProblem, match="--out"):
        history.run(out=str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "kept"
    monkeypatch.setattr(history, "find_spec", lambda package: None if package == "ruptures" else package)
    with pytest.raises(EnvironmentProblem, match=r"without ruptures\..*make install"):
        history.run(out=str(tmp_path / "out"))


# The page.


def test_the_page_has_everything_and_needs_nothing(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(8):
        rate = (100, 101, 99)[day % 3] * (1.25 if day >= 4 else 1)
        record(results, day, (NAME, extra(rate, title="Work <of> some & kind.")), ("test_z.py::test_z[a/b]", extra(7)))
    record(results, 9, (NAME, extra(7)), rounds=1)
    record(results, 10, (NAME, extra(55_555)), device=GPU)
    out = tmp_path / "out"
    assert history.run(out=str(out)) == 0
    assert "3 benchmarks" in capsys.readouterr().out
    page = (out / "index.html").read_text()

    assert page.count("<svg") == page.count("</svg>") == 3
    assert page.count("<article") == 3
    assert "Work &lt;of&gt; some &amp; kind" in page
    assert not [markup for markup in ("<of>", "<?xml", "<!DOCTYPE svg", "<metadata") if markup in page]
    assert "1 of <code>--quick</code> are left out" in page
    assert page.count("+25") >= 3  # in the overview, the table and the picture
    assert "too few runs (1)" in page
    for words in ("125 <small>122 to 128</small>", "55,600 images/s", "2.00 <small>1.80 to 2.20</small>", "c000004"):
        assert words in page
    asked_for = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import|<script|<link""", page)
    assert all((target or place).startswith("#") for target, place in asked_for)
    anchors = {target[1:] for target, _ in asked_for if target}
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert anchors <= set(identifiers)
    from history_page import INKS

    pictures = page.partition("<h1>")[2]
    assert not [colour for colour, _ in INKS.values() if colour in pictures]  # all follow the theme

    files = sorted(out.rglob("*.png"))
    assert len(files) == 3
    for file in files:
        with Image.open(file) as image:
            assert image.width > 800
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
