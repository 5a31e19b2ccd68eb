"""The checkout that the package is imported from: what it holds beside the package is not installed with it."""

from __future__ import annotations

import sys
from pathlib import Path

import mvp_fast
from mvp_fast.errors import EnvironmentProblem


def find_benchmarks(verb: str) -> Path:
    """The checkout's folder benchmarks/, whose modules can be imported afterwards.

    Args:
        verb: that needs it, for the message.

    Raises:
        EnvironmentProblem: there is no checkout around the package.
    """
    folder = Path(mvp_fast.__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "harness.py").is_file():
        raise EnvironmentProblem(
            "The benchmarks are not installed with the package; they are run from a checkout",
            where=str(folder),
            fix=f"Clone the repository, run `make install` there, and call its .venv/bin/mvp-fast {verb}",
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # no package: its modules find each other like this
    return folder
