"""A process that runs verbs of `mvp-fast`, one after the other: their imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

CRASHED = 70  # an error that no verb foresaw; sysexits' EX_SOFTWARE


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        code: the verb's exit code.
        seconds: it took.
    """

    code: int
    seconds: float


class Worker:
    """The process, as its owner sees it.

    Args:
        threads: of torch and of OpenMP, in the process.
    """

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch does not live through a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads), name="study-worker")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read where torch is imported first, which is there
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def start(self, argv: tuple[str, ...], log: Path) -> None:
        """Begin a command; what it says goes to `log`. Its end can be waited for on `connection`."""
        self.connection.send((argv, str(log)))

    def result(self) -> Done:
        """How the command ended, once `connection` is ready; EOFError where the process did not live."""
        code, seconds = self.connection.recv()
        return Done(code, seconds)

    def stop(self) -> None:
        """Ask the command to stop, as a scheduler would: verbs that train write a checkpoint."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the process when its command has ended."""
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    """The process: run what comes until nothing comes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the owner says who stops, and how
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            argv, log = connection.recv()
        except EOFError:
            return
        start = time.monotonic()
        code = _run(list(argv), log)
        connection.send((code, time.monotonic() - start))


def _run(argv: list[str], log: str) -> int:
    from mvp_fast.cli.main import main

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # what C libraries print, too
        os.dup2(out, stream)
    os.close(out)
    sys.argv = ["mvp-fast", *argv]
    print("$ mvp-fast", *argv, flush=True)
    try:
        return main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except Exception:
        traceback.print_exc()
        return CRASHED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
