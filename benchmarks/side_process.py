"""A side of a comparison as the giver of turns sees it: a process, the line to it, and its end (`turns.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revision import last_lines, wrong_packages
from turns import Gone, Line

from mvp_fast.errors import EnvironmentProblem

TICK_SECONDS, SILENCE_SECONDS, GRACE_SECONDS = 0.5, 1200.0, 10.0
SIDE = Path(__file__).resolve().with_name("side.py")


class Died(Exception):
    """A side's process has ended, or had to be ended, in the middle of a comparison.

    Args:
        label: of the side.
        words: how it ended, and the last lines that it printed.
    """

    def __init__(self, label: str, words: str) -> None:
        self.label, self.words = label, words
        super().__init__(f"{label}: {words}")


class Unable(Exception):
    """A side does not run a benchmark.

    Args:
        label: of the side; empty where it is neither's fault.
        reason: one line.
        failed: whether that is a failure, not a skip.
    """

    def __init__(self, label: str, reason: str, failed: bool) -> None:
        self.label, self.reason, self.failed = label, reason, failed
        super().__init__(f"{label}: {reason}")


@dataclass(frozen=True)
class Source:
    """What a side measures.

    Attributes:
        label: "base" or "current".
        python: its interpreter.
        tree: the checkout that its packages must come from.
        packages: the folder for PYTHONPATH.
    """

    label: str
    python: str
    tree: Path
    packages: Path


class Side:
    """A process that runs the benchmarks of one side.

    Args:
        source: what it measures.
        repo: the checkout whose benchmarks it runs.
        arguments: for pytest.
        folder: for its files; made here.
        silence: seconds without a message after which it is taken to hang.
    """

    def __init__(
        self, source: Source, repo: Path, arguments: Sequence[str], folder: Path, silence: float = SILENCE_SECONDS
    ) -> None:
        self.label, self.source, self.silence = source.label, source, silence
        folder.mkdir()
        self.log = folder / "log.txt"
        ours, theirs = socket.socketpair()
        ours.settimeout(min(TICK_SECONDS, silence))
        self.line = Line(ours)
        paths = [str(source.packages), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONSAFEPATH": "1",  # the current folder holds packages of these names too; children inherit this
        }
        command = [source.python, "-P", str(SIDE), str(theirs.fileno()), f"--basetemp={folder / 'files'}", *arguments]
        with theirs, self.log.open("wb") as log:
            # A session of its own: Ctrl-C is the giver's alone, and all that the side starts can be ended with it.
            self.process = subprocess.Popen(
                command,
                cwd=repo,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.benchmarks: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.machine: dict[str, Any] = {}
        self.greeted = False
        self._kept: dict[str, Any] | None = None

    def start(self) -> None:
        """Wait until it has collected its benchmarks."""
        message = self._next()
        if "benchmarks" not in message or not self.greeted:
            raise self._died(f"it began with {message}")
        self.benchmarks, self.refused, self.machine = (message[k] for k in ("benchmarks", "refused", "machine"))

    def until_ready(self, name: str, awaited: Sequence[str]) -> dict[str, Any]:
        """Wait until a benchmark is ready; returns its facts. Benchmarks that nobody waits for are sent on.

        Args:
            name: of the benchmark.
            awaited: those that come after it.

        Raises:
            Unable: it won't ever be.
        """
        if name not in self.benchmarks:
            file = name.partition("::")[0]
            raise Unable(self.label, self.refused.get(file, "there is no such benchmark"), failed=file in self.refused)
        while True:
            message = self._next()
            ready = message.get("ready")
            if ready == name:
                return dict(message["facts"])
            if ready in awaited:
                self._kept = message
                raise Unable(self.label, "its benchmarks come in another order", failed=False)
            if ready is not None:
                self.stop()
            elif message.get("over") == name:
                raise Unable(self.label, *_outcome(message))

    def turn(self, name: str) -> dict[str, Any]:
        """Have it run one round; returns seconds and calibration.

        Raises:
            Unable: the round failed.
        """
        self._send({"go": True})
        message = self._next()
        if message.get("over") == name:
            raise Unable(self.label, *_outcome(message))
        return message

    def stop(self) -> None:
        """No more rounds of the benchmark that is ready."""
        self._send({"go": False})

    def finish(self, name: str) -> None:
        """After `stop`: wait until the benchmark is over.

        Raises:
            Unable: something failed after the rounds.
        """
        while True:
            message = self._next()
            if "ready" in message:
                self.stop()
            elif message.get("over") == name:
                if message["outcome"] != "passed":
                    raise Unable(self.label, *_outcome(message))
                return

    def close(self) -> None:
        """End it and all that it has started, if need be by force."""
        self.line.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self.line.send(message)
        except Gone:
            raise self._died() from None

    def _next(self) -> dict[str, Any]:
        """The next message; a hello is checked on the way."""
        if self._kept is not None:
            message, self._kept = self._kept, None
            return message
        while "hello" in (message := self._receive()):
            if wrong := wrong_packages(message["hello"], self.source.tree):
                raise EnvironmentProblem(
                    f"The {self.label} side would measure packages of another revision: {', '.join(wrong)}",
                    where=f"PYTHONPATH={self.source.packages}",
                    fix="Something puts another copy before PYTHONPATH: look for a .pth file, a sitecustomize module"
                    " or an installed import hook of it",
                )
            self.greeted = True
        return message

    def _receive(self) -> dict[str, Any]:
        give_up = time.monotonic() + self.silence
        while True:
            ended = self.process.poll() is not None
            try:
                return self.line.receive()
            except Gone:
                raise self._died() from None
            except TimeoutError:
                if ended:  # a process that it left behind holds the line open
                    raise self._died() from None
                if time.monotonic() > give_up:
                    raise self._died(f"it has said nothing for {self.silence:.0f} seconds") from None

    def _died(self, how: str = "") -> Died:
        if not how:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            code = self.process.poll()
            if code is None:
                how = "it has closed the line"
            else:
                how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        log = self.log.read_text(errors="replace")
        return Died(self.label, f"{how}. Its last lines: {last_lines(log)}")


def _outcome(message: Mapping[str, Any]) -> tuple[str, bool]:
    """Reason and whether it failed, of a benchmark that is over before its time."""
    if message["outcome"] == "passed":
        return "it takes no turns: it does not use benchmarks/harness.py", False
    return message["why"], message["outcome"] == "failed"
