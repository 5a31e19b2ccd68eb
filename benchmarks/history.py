"""The speed of the benchmarks over the recorded runs, with the runs marked from which on it is another.

    python benchmarks/history.py [--out DIR] [--device NAME]    a PNG a benchmark, and index.html with all of them
    python benchmarks/history.py --docs                         the tables of docs/performance.md (docs_tables.py)

`mvp-fast bench history` does the same. Runs come from benchmarks/results/<device>/, in order of date. Those of two
machines (device, processor model, number of cores) share no line: what differs between machines is no history of the
code. Runs of `--quick` are left out.

Where a line has MARKED_FROM points or more, change points are found in its logarithm by PELT (Killick, Fearnhead and
Eckley 2012, in the package `ruptures`). Its cost is the absolute deviation from a segment's median, in units of the
noise: one strange run is no segment, and a factor counts the same at any height. See `change_points`.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from recorder import REPO, RESULTS, Rate, Ratio, Result, Run, read

from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem, UserError

OUT = REPO / "build" / "history"
MARKED_FROM = 6  # points; of fewer, noise and change can't be told apart
SHORTEST = 2  # points between two changes: a single run that differs is not a change
PENALTY = 3.0  # times log(points); see change_points
SMALLEST_NOISE = 0.01  # of a run's median: changes within a few hundredths are not worth a mark


@dataclass(frozen=True)
class Point:
    """A figure in one run; `at` counts the runs of its graph, from 0. No interval where there was one round."""

    at: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Change:
    """From the point of run `at` on, the median is `factor` times what it was since the change before."""

    at: int
    factor: float


@dataclass(frozen=True)
class Line:
    """A figure over the runs of a graph: ours, in `unit` a second, or times as fast as the peer that `name` says."""

    name: str
    points: list[Point]
    changes: list[Change]


@dataclass(frozen=True)
class Graph:
    """A benchmark on a machine: its rate, and its ratio to each peer."""

    name: str
    title: str
    unit: str
    runs: list[Run]
    rate: Line
    ratios: list[Line]

    @property
    def slug(self) -> str:
        """For file names and anchors."""
        return slug(self.name.replace(".py", ""))


@dataclass(frozen=True)
class Machine:
    """What may share a line."""

    device: str
    cpu: str
    cores: int
    graphs: list[Graph]

    @property
    def slug(self) -> str:
        """For file names and anchors."""
        return slug(f"{self.device}-{self.cpu}-{self.cores}")


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def number(value: float) -> str:
    """Three significant digits."""
    decimals = 2 - math.floor(math.log10(value))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def load(results: Path, device: str = "") -> list[tuple[Path, Run]]:
    """All recorded runs, or one device's, by date.

    Raises:
        DataError: there are none, or a file is not what it should be.
    """
    devices = sorted({path.parent.name for path in results.glob("*/*.json")})
    record = "`pytest benchmarks --record` measures this machine and records it"
    if not devices:
        raise DataError("There are no recorded results", where=str(results), fix=record)
    if device and device not in devices:
        near = difflib.get_close_matches(device, devices, n=1) or devices
        names = f"Recorded: {', '.join(devices)}. `--device {near[0]}` shows one of them; {record}"
        raise DataError(f"There are no recorded results of a device {device!r}", where=str(results), fix=names)
    runs = [(path, read(path)) for path in results.glob("*/*.json") if device in ("", path.parent.name)]
    for path, run in runs:
        if run.device != path.parent.name:
            fix = f"Move it to {path.parent.parent / run.device}: a folder holds one device"
            raise DataError(f"A results file of {run.device} lies in another device's folder", where=str(path), fix=fix)
    return sorted(runs, key=lambda pair: (pair[1].date, pair[0].name))


def rates(result: Result) -> tuple[str, dict[str, Rate]]:
    """What is counted, and how much of it a second by whom; rounds, where a benchmark does not say."""
    if "ours" in result.rates:
        return result.unit, result.rates
    p20, median, p80 = (1 / float(np.percentile(result.seconds, q)) for q in (80, 50, 20))
    return "rounds", {"ours": Rate(median, p20, p80)}


def title(result: Result) -> str:
    """What a benchmark measures, as a heading."""
    return result.title.rstrip(".").replace(". [", " [") or result.name


def machines(runs: Iterable[Run]) -> list[Machine]:
    """Everything that can be drawn, by machine and benchmark; runs of `--quick` are left out."""
    found: dict[tuple[str, str, int], dict[tuple[str, str], list[tuple[Run, Result]]]] = {}
    for run in runs:
        for result in [] if run.quick else run.results:
            where = (run.device, run.environment.cpu, run.environment.cores)
            # Another unit is another figure: its line begins anew.
            found.setdefault(where, {}).setdefault((result.name, rates(result)[0]), []).append((run, result))
    return [
        Machine(*where, [_graph(*key, pairs) for key, pairs in sorted(its.items())]) for where, its in found.items()
    ]


def _graph(name: str, unit: str, pairs: Sequence[tuple[Run, Result]]) -> Graph:
    results = [result for _, result in pairs]
    ours = [rates(result)[1]["ours"] for result in results]
    rate = _line("ours", [Point(at, r.median, r.p20, r.p80) for at, r in enumerate(ours)])
    peers = dict.fromkeys(peer for result in results for peer in result.ratios)
    ratios = [_line(peer, _points(peer, [result.ratios for result in results])) for peer in peers]
    return Graph(name, title(results[-1]), unit, [run for run, _ in pairs], rate, ratios)


def _points(peer: str, found: Sequence[dict[str, Ratio]]) -> list[Point]:
    present = [(at, ratios[peer]) for at, ratios in enumerate(found) if peer in ratios]
    return [Point(at, ratio.ratio, ratio.low, ratio.high) for at, ratio in present]


def _line(name: str, points: list[Point]) -> Line:
    values = np.array([point.value for point in points])
    starts = [0, *change_points(values), len(points)]
    medians = [float(np.median(values[i:j])) for i, j in pairwise(starts)]
    changes = [Change(points[starts[k]].at, medians[k] / medians[k - 1]) for k in range(1, len(medians))]
    return Line(name, points, changes)


def change_points(values: Sequence[float] | np.ndarray) -> list[int]:
    """Where a new level begins, in rising order; none for fewer than MARKED_FROM values.

    The noise is estimated from differences of neighbours, which a change of level touches in one place alone. In its
    units, the absolute deviation is a negative log-likelihood (Laplace), for which Bayes's information criterion asks
    log(n) of each change: half of it for each of its two parameters, the place and the level. Here it is PENALTY times
    as much, because the noise is estimated from few values itself: a false mark costs more trust than a small change
    that is marked a run or two later. tests/test_bench_history.py holds what follows for false marks and for true ones.

    Args:
        values: positive, in the order of their dates.
    """
    if len(values) < MARKED_FROM:
        return []
    import ruptures

    logarithms = np.log(np.asarray(values, dtype=float))
    noise = float(np.abs(np.diff(logarithms)).mean() * np.sqrt(np.pi) / 2)  # E|x - y| = 2 sd / sqrt(pi) for normal x, y
    search = ruptures.Pelt(model="l1", min_size=SHORTEST, jump=1).fit(logarithms / max(noise, SMALLEST_NOISE))
    return [int(end) for end in search.predict(pen=PENALTY * np.log(len(values)))[:-1]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/history.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="", help=f"folder for index.html and the PNG files; {OUT.relative_to(REPO)}")
    parser.add_argument("--device", default="", help="one device alone: a folder's name in benchmarks/results/")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/performance.md, and draw nothing")
    try:
        return run(**vars(parser.parse_args(argv)))
    except UserError as error:
        print(f"{parser.prog}: {error.kind}: {error.paragraph()}", file=sys.stderr)
        return error.exit_code


def run(out: str = "", device: str = "", docs: bool = False) -> int:
    """Draw the page, or write the documents' tables; returns the exit code.

    Raises:
        UserError: what is wrong with the options or the results.
    """
    if docs and (out or device):
        where = "--docs with " + ("--out" if out else "--device")
        raise ConfigError("--docs writes the tables of all devices and draws nothing", where=where, fix="Leave one out")
    if docs:
        from docs_tables import PAGE, write

        print(f"{'wrote' if write() else 'as it was':<9} {PAGE}")
        return 0
    runs = [run for _, run in load(RESULTS, device)]
    if all(run.quick for run in runs):
        fix = "Record a whole run: `pytest benchmarks --record` without --quick"
        raise DataError("All recorded runs are of --quick, one round each", where=str(RESULTS), fix=fix)
    missing = [package for package in ("matplotlib", "ruptures") if find_spec(package) is None]
    if missing:
        fix = "Install what development needs: `make install`, or pip install --editable '.[dev]'"
        raise EnvironmentProblem(f"The history can't be drawn without {' and '.join(missing)}", fix=fix)
    found = machines(runs)
    from history_page import write_page

    page = write_page(found, Path(out) if out else OUT, quick=sum(run.quick for run in runs))
    graphs = [graph for machine in found for graph in machine.graphs]
    marks = sum(len(line.changes) for graph in graphs for line in (graph.rate, *graph.ratios))
    print(f"runs      {len(runs)} of {len(found)} machines; {len(graphs)} benchmarks")
    print(f"changes   {marks} marked")
    print(f"page      {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
