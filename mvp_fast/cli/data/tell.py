"""What the verbs that go through many images tell a person: a progress bar, and the images that were left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvp_fast.samples.index_build import BadFile

SHOWN = 10  # bad images that are printed; the list beside the index has all


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, to be called with the number of images done and their total; None elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_bad(bad: list[BadFile], path: Path) -> None:
    """Print what was left out, and the list that has all of it."""
    if bad:
        print(f"bad      {len(bad):,} left out, listed in {path}")
    for entry in bad[:SHOWN]:
        print(f"         {entry.path}: {entry.reason}")
    if len(bad) > SHOWN:
        print(f"         and {len(bad) - SHOWN:,} more")
