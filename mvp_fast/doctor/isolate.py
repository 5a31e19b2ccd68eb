"""Each check in a process of its own: a library that crashes, hangs or ends the process takes one row with it, no more.

    parent                                    child
    look() -- argv: check, file, options -->  main(): imports the check's module, runs it, writes rows as JSON

Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvp_fast.doctor.row import Row, State, told

TIMEOUT = 240.0
"""Seconds after which a check counts as hung. A first import from a slow disk takes minutes."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        part: the row that tells where the check itself ends badly.
        module, function: takes the options, returns rows.
        fix: what then helps.
    """

    part: str
    module: str
    function: str
    fix: str = ""


def look(
    checks: list[Check],
    options: dict[str, Any],
    began: Callable[[str], None] = lambda part: None,
    timeout: float = TIMEOUT,
) -> Iterator[list[Row]]:
    """Run the checks, as many at a time as there are cores, up to four; yields each check's rows in order.

    Args:
        checks: what to look at.
        options: passed on to each check; must fit into JSON.
        began: told of each part as its check begins.
        timeout: seconds for each.
    """

    def one(check: Check) -> list[Row]:
        began(check.part)
        return run(check, options, timeout)

    with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0))))) as pool:
        yield from pool.map(one, checks)


def run(check: Check, options: dict[str, Any], timeout: float = TIMEOUT) -> list[Row]:
    """One check in a process of its own: its rows, or one that says how the process ended."""
    with tempfile.TemporaryDirectory(prefix="mvp-doctor-") as folder:
        out = Path(folder) / "rows.json"
        # The child finds modules where this process finds them: what works there works in training.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mvp_fast.doctor.isolate import main; main()"
        words = [sys.executable, "-c", code, check.module, check.function, str(out), json.dumps(options)]
        start = time.monotonic()
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - start
            return [Row(check.part, State.BROKEN, f"no answer within {seconds:.0f} s", fix=check.fix)]
        if not out.exists():
            return [Row(check.part, State.BROKEN, _end_of(done), fix=check.fix)]
        return [Row.from_dict(values) for values in json.loads(out.read_text(encoding="utf-8"))]


def _end_of(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        words = f"the process that tried it was ended by {signal.Signals(-done.returncode).name}"
    else:
        words = f"the process that tried it ended with {done.returncode}"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"{words}: {lines[-1][:200]}" if lines else words


def main() -> None:
    """The child's side. Rows are written beside and renamed: half of them would not be read."""
    module, function, out, options = sys.argv[1:]
    try:
        rows = getattr(importlib.import_module(module), function)(json.loads(options))
    except (Exception, SystemExit) as error:
        print(told(error), file=sys.stderr)
        raise SystemExit(1) from None
    beside = Path(f"{out}.part")
    beside.write_text(json.dumps([row.as_dict() for row in rows]), encoding="utf-8")
    os.replace(beside, out)
    sys.stdout.flush()
    os._exit(0)  # a library that crashes while the interpreter ends has answered all the same
