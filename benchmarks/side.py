"""One side of a comparison: pytest over the benchmarks, in a process that runs each round when it is told (`turns.py`).

    python -P side.py ADDRESS [pytest's arguments]

`side_process.py` starts it with the packages of its revision on PYTHONPATH. Beside what the benchmarks say through
`Turns`, it tells where its packages and those of its children were found, which benchmarks there are, and what became
of each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P keeps the script's folder off

import pytest
from turns import Gone, Line, connect

WHERE = (
    "import importlib.util, json; found = {n: importlib.util.find_spec(n) for n in ('mvp_fast', 'mvp_kernels')};"
    " print(json.dumps({name: spec and spec.origin for name, spec in found.items()}))"
)
LONGEST = 1500


def name_of(nodeid: str) -> str:
    """A benchmark's name, as `conftest.session` gives it."""
    return nodeid.rpartition("/")[2]


def why(longrepr: Any) -> str:
    """What pytest says of a failure or a skip, as one line."""
    if isinstance(longrepr, tuple):
        text = str(longrepr[2])
    elif crash := getattr(longrepr, "reprcrash", None):
        text = str(crash.message)
    else:  # of an import: the error's own lines are marked E
        lines = str(longrepr).splitlines()
        text = " ".join(line[1:] for line in lines if line.startswith("E ")) or str(longrepr)
    return " ".join(text.split())[:LONGEST]


class Reporter:
    """A pytest plugin that tells the giver what happens."""

    def __init__(self, line: Line) -> None:
        self.line, self.refused = line, {}
        self.outcomes: dict[str, tuple[str, str]] = {}

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.line.send(message)
        except Gone:
            pytest.exit("nobody gives turns any more", 1)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self) -> bool:
        """No time limit on a test: it waits for the other side. The giver has a limit of its own."""
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.refused[name_of(report.nodeid)] = why(report.longrepr)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        from recorder import device_name, environment

        machine = {"device": device_name(), "environment": environment()}
        benchmarks = {name_of(item.nodeid): item.nodeid for item in session.items}
        self.send({"benchmarks": benchmarks, "refused": self.refused, "machine": machine})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.outcomes.setdefault(report.nodeid, (report.outcome, why(report.longrepr)))
        if report.when == "teardown":
            outcome, reason = self.outcomes.get(report.nodeid, ("passed", ""))
            self.send({"over": name_of(report.nodeid), "outcome": outcome, "why": reason})


def main(argv: list[str]) -> int:
    """Run one side; returns pytest's exit code."""
    line = connect(argv[0])
    child = subprocess.run([sys.executable, "-c", WHERE], stdout=subprocess.PIPE, check=True).stdout
    words = ["--turns", argv[0], "--continue-on-collection-errors", *argv[1:]]
    line.send({"hello": json.loads(child)})
    return int(pytest.main(words, plugins=[Reporter(line)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
