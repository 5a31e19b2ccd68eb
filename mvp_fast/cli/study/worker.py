"""A process that runs verbs of `mvp-fast`, one after the other: their imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from mvp_fast.samples.workers import start_worker

CRASHED = 70
"""An error that no verb foresaw: its traceback is in the log."""


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        code: the verb's exit code.
        seconds: it took.
        words: of an error, the last line that the command wrote.
    """

    code: int
    seconds: float
    words: str


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
        """Begin a command; what it says goes to `log`. Its end, or the process's, can be waited for on `connection`."""
        with suppress(BrokenPipeError):  # the process is gone, which `result` tells
            self.connection.send((argv, str(log)))

    def result(self) -> Done:
        """How the command ended, once `connection` is ready; EOFError or OSError where the process did not live."""
        return Done(*self.connection.recv())

    def stop(self) -> None:
        """Ask the command to stop, as a scheduler would: verbs that train write a checkpoint."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the process when its command has ended."""
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    """The process: run what comes until nothing comes any more."""
    os.setpgid(0, 0)  # what is sent to a group comes once, by the owner, who says how to stop
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            argv, log = connection.recv()
        except EOFError:
            return
        start = time.monotonic()
        code, words = _run(list(argv), log)
        with suppress(BrokenPipeError):
            connection.send((code, time.monotonic() - start, words))
        if "torch._dynamo" in sys.modules:  # graphs of one command are no use to the next, and there is a limit to them
            torch._dynamo.reset()


def _run(argv: list[str], log: str) -> tuple[int, str]:
    """The exit code of a verb, and of one that failed its last words."""
    from mvp_fast.cli.main import main

    begin, code = 0, CRASHED
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        begin = os.fstat(out).st_size
        for stream in (1, 2):  # what C libraries print, too
            os.dup2(out, stream)
        os.close(out)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.argv = ["mvp-fast", *argv]
        print("$", shlex.join(sys.argv))
        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2 if end.code else 0
    except OSError as error:  # the log can't be written, most likely
        with suppress(OSError):
            traceback.print_exc()
        return CRASHED, f"{type(error).__name__}: {error}"
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
    return code, _last_words(log, begin) if code else ""


def _last_words(log: str, begin: int) -> str:
    """The last line of what was written from `begin` on."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")
    return ""
