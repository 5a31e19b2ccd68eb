"""What verbs that write many files with several processes share: a folder's lock, and workers that end with their
parent. Imports nothing heavy, so that a process starts quickly.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvp_fast.errors import DataError


def start_worker() -> None:
    """Initializer of a worker: leave Ctrl-C to the parent, and end when the parent does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def alone(place: Path, lock: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder or file that is being made.

    Args:
        place: what is made, for messages.
        lock: the lock's file, which is made.
        what: what the other process does, in words.

    Raises:
        DataError: another process has it.
    """
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "Wait until it is done, or give another --out"
            raise DataError(f"another process {what}", where=str(place), fix=fix) from None
        except OSError as error:  # a file system without locks: go on without
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
