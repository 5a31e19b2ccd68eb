"""Writing a file in one go: readers see the old one or the whole new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mvp_fast.errors import DataError, EnvironmentProblem


@contextmanager
def replacing(path: Path, option: str = "--out") -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all went well, and vanishes when not.

    It is made at once, beside `path`, so that a folder without rights is told before the work. Missing folders are
    made too.

    Args:
        path: the file to be.
        option: the command-line option that says where it goes, for messages.

    Raises:
        DataError: `path` is a folder.
        EnvironmentProblem: there is no writing there.
    """
    if path.is_dir():
        raise DataError(
            "A file is to be written, but this is a folder", where=str(path), fix=f"Give {option} a file name"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise EnvironmentProblem(
            f"The file can't be written: {error.strerror or error}",
            where=str(path),
            fix=f"Give {option} a place with room and the rights to write",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
