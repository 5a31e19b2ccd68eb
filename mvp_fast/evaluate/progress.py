"""How far a long piece of work is and when it will be done: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines

Tell = Callable[[int], None]
"""Called with how much is done so far."""


@contextmanager
def progress(
    what: str, total: int, start: int = 0, *, console: Console | None = None, every: float = EVERY
) -> Iterator[Tell]:
    """Show `what` while `total` things are done, `start` of which were done before.

    On a terminal the bar goes away at the end; elsewhere a line comes every `every` seconds, so that quick work says
    nothing.

    Yields:
        a function to call with the number of things done so far.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"))
        with Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=start)
            yield lambda done: bar.update(task, completed=done)
        return
    begin = last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every or done <= start:
            return
        last = now
        left = (now - begin) / (done - start) * (total - done)
        line = f"{what}  {done:,}/{total:,}  ETA {clock(left)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield tell


def clock(seconds: float) -> str:
    """Minutes and seconds, hours before them where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
