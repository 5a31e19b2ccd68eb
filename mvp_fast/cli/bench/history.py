"""`mvp-fast bench history`: draw recorded benchmark results over commits."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from mvp_fast.cli.parse import parse
from mvp_fast.errors import EnvironmentProblem


@dataclass(frozen=True)
class Options:
    """Draw the benchmarks' rates and ratios over the runs that are recorded in benchmarks/results/ (`mvp-fast bench
    --record`): a PNG file each, and index.html with all of them and the figures beside.

    Runs from which on a figure is another are marked, where there are enough of them to tell. Machines are kept apart.
    """

    out: str = ""
    """The folder to write to; build/history in the checkout where not given."""
    device: str = ""
    """One device alone: the name of a folder in benchmarks/results/."""
    docs: bool = False
    """Draw nothing: write the tables of docs/performance.md from the newest run of each device."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "bench history")
    sys.path.insert(0, str(_benchmarks()))  # no package: its modules find each other like this
    return int(importlib.import_module("history").run(**vars(options)))


def _benchmarks() -> Path:
    """The folder benchmarks/ of the checkout that this package is imported from."""
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (folder / "history.py").is_file():
        raise EnvironmentProblem(
            "The benchmarks are not installed with the package; they are run from a checkout",
            where=str(folder),
            fix="Clone the repository, run `make install` there, and call its .venv/bin/mvp-fast bench history",
        )
    return folder
