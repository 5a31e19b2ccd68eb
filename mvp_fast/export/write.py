"""An export's files: written beside their folder, then renamed into it, so that none of them is ever half there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvp_fast.errors import EnvironmentProblem

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new, empty folder beside `out`: what is in it at the end moves into `out`, file by file.

    Where writing fails, `out` is as it was; other files in `out` stay.

    Args:
        out: a folder, made where missing.

    Raises:
        EnvironmentProblem: `out` can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            yield partial
            shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors writes for the owner alone
            out.mkdir(exist_ok=True)
            # The weights first: they take longest, and a configuration without them is of no use.
            for path in sorted(partial.iterdir(), key=lambda path: (path.name != WEIGHTS, path.name)):
                _sync(path)
                os.replace(path, out / path.name)
            _sync(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"The export could not be written: {error.strerror or error}",
            where=str(out),
            fix="Free some space or mend the folder's rights, or give another --out",
        ) from error


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
