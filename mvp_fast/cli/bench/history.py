"""`mvp-fast bench history`: draw recorded benchmark results over commits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from mvp_fast.cli.checkout import find_benchmarks
from mvp_fast.cli.parse import parse


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
    find_benchmarks("bench history")
    return int(importlib.import_module("history").run(**vars(options)))
