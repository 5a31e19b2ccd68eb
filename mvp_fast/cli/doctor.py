"""`mvp-fast doctor`: what this machine has for training, what it lacks, and the commands that bring it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvp_fast import __version__
from mvp_fast.cli.parse import parse
from mvp_fast.errors import EnvironmentProblem

if TYPE_CHECKING:
    from mvp_fast.doctor.report import Report
    from mvp_fast.doctor.row import Row


@dataclass(frozen=True)
class Options:
    """Try out everything that training runs on: GPU, driver, packages, cores, limits, disk.

    Each part is tried in a process of its own, on something small and real. What is missing is shown with the command
    that brings it and with what one loses without it. Exit code 0 where training with the default settings can run, 4
    where something that it needs is missing or broken.
    """

    data: str = ""
    """An index, or a folder of images: how fast its files are read is measured, for some four seconds."""
    json: str = ""
    """Write all that was found to this file."""
    runs: str = "runs"
    """Where runs go: its free space is looked at."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "doctor")

    from mvp_fast.doctor.report import examine

    with _progress() as began:
        report = examine(options.data, options.runs, began)
    _show(report)
    if options.json:
        from mvp_fast.samples.files import replacing

        with replacing(Path(options.json), "--json") as file:
            file.write(json.dumps({"version": __version__, **report.as_dict()}, indent=1).encode() + b"\n")
    print(report.verdict)
    return 0 if report.can_train else EnvironmentProblem.exit_code


def _show(report: Report) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except (Exception, SystemExit):  # itself one of the parts
        _show_plainly(report)
        return
    colours = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "red"}
    table = Table(show_lines=False)
    table.add_column("part", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in report.rows:
        urgent = row.needed and not row.works
        state = Text(str(row.state), style="bold red" if urgent else colours[row.state])
        table.add_row(Text(row.part), state, Text(row.found))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    _show_remedies(report)


def _show_plainly(report: Report) -> None:
    for row in report.rows:
        print(f"{row.part:<22} {row.state:<8} {row.found}")
    _show_remedies(report)


def _show_remedies(report: Report) -> None:
    """Below the table and unwrapped, so that commands can be copied."""
    for row in _wanting(report.rows):
        print(f"\n{row.part}{' (needed)' if row.needed and not row.works else ''}")
        if row.loses:
            print(f"  without it   {row.loses}" if not row.works else f"  costs        {row.loses}")
        if row.fix:
            print(f"  to mend it   {row.fix}")
    print()


def _wanting(rows: list[Row]) -> list[Row]:
    """What is to be mended, the needed first."""
    wanting = [row for row in rows if row.loses or row.fix]
    return sorted(wanting, key=lambda row: not row.needed or row.works)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being looked at, on a terminal; nothing elsewhere."""
    try:
        from rich.console import Console

        console = Console(stderr=True)
    except (Exception, SystemExit):
        yield lambda part: None
        return
    if not console.is_terminal:
        yield lambda part: None
        return
    with console.status("looking around") as status:
        yield lambda part: status.update(f"looking at {part}")
