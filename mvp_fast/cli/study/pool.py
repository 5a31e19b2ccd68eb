"""Runs the study's steps, several at a time, each once: a step that is done is not done again."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from mvp_fast.cli.study.worker import CRASHED, Done, Worker
from mvp_fast.errors import DataError, Preempted, UserError
from mvp_fast.evaluate.progress import clock
from mvp_fast.evaluate.study.steps import Step
from mvp_fast.samples.files import replacing

KILLED = 137


class StepFailed(UserError):
    """A step ended with an error of its own; the study's exit code is the step's."""

    kind = "a step failed"

    def __init__(self, step: Step, code: int, log: Path) -> None:
        how = {CRASHED: "with an error that is none of yours", KILLED: "killed"}.get(code, f"with exit code {code}")
        reason = _last_words(log)
        super().__init__(
            f"The step {step.name} ended {how}: {reason}" if reason else f"The step {step.name} ended {how}",
            where=str(log),
            fix="When it is mended, the same command goes on from there; what is done stays done",
        )
        self.exit_code = code


class Notes:
    """What is known of the steps that are done: one small file each, which holds the command and its seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: Step) -> Path:
        """Where the step's note is."""
        return self.folder / f"{step.name.replace('/', '.')}.json"

    def seconds(self, step: Step) -> float | None:
        """How long the step took; None where it is not done, or was done with another command."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self.path(step).read_text(encoding="utf-8"))
            if note["argv"] == list(step.argv):
                return float(note["seconds"])
        return None

    def write(self, step: Step, seconds: float) -> None:
        """Say that it is done."""
        with replacing(self.path(step)) as file:
            file.write((json.dumps({"argv": list(step.argv), "seconds": round(seconds, 2)}) + "\n").encode())


def run_steps(
    steps: Sequence[Step], folder: Path, processes: int, threads: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Run what is not done yet.

    Args:
        steps: each after those that it needs.
        folder: for steps/ (what is done) and logs/.
        processes: steps at a time.
        threads: of each.
        say: told of each step that ends, and how long the others will take.

    Returns:
        the seconds that each step took, now or earlier.

    Raises:
        StepFailed: a step did; those that ran beside it were let finish.
        Preempted: SIGTERM or SIGINT came; steps that train have written checkpoints.
    """
    notes = Notes(folder / "steps")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    notes.folder.mkdir(exist_ok=True)
    took: dict[str, float] = {}
    for step in steps:  # one that is done counts as long as all that it needs does
        seconds = notes.seconds(step)
        if seconds is not None and all(need in took for need in step.needs):
            took[step.name] = seconds
    left = [step for step in steps if step.name not in took]
    if left:
        say(f"steps    {len(left)} of {len(steps)} to do, {processes} at a time, {threads} threads each")
        _Pool(left, took, notes, folder / "logs", processes, threads, say).run()
    return took


class _Pool:
    """One call's state."""

    def __init__(
        self,
        left: list[Step],
        took: dict[str, float],
        notes: Notes,
        logs: Path,
        processes: int,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self.left, self.took, self.notes, self.logs, self.say = left, took, notes, logs, say
        self.total = len(left) + len(took)
        self.workers = [Worker(threads) for _ in range(min(processes, len(left)))]
        self.running: dict[Any, tuple[Worker, Step]] = {}
        self.failed: StepFailed | None = None
        self.stopped = False
        self.by_kind: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Until nothing is left, or nothing more may be begun."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._begin()
            while self.running:
                for connection in wait(list(self.running)):
                    worker, step = self.running.pop(connection)
                    self._end(worker, step)
                self._begin()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for worker in self.workers:
                worker.close()
        if self.failed is not None:
            raise self.failed
        if self.stopped:
            raise Preempted("The study was stopped", where=str(self.logs), fix="The same command goes on from there")
        if self.left:
            raise DataError(f"The step {self.left[0].name} needs one that is not there", where=str(self.logs))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        for worker, _ in self.running.values():
            worker.stop()

    def _begin(self) -> None:
        """Give work to the workers that have none."""
        busy = {id(worker) for worker, _ in self.running.values()}
        for worker in self.workers:
            if id(worker) in busy or self.failed or self.stopped or not worker.process.is_alive():
                continue
            step = next((step for step in self.left if all(need in self.took for need in step.needs)), None)
            if step is None:
                return
            self.left.remove(step)
            worker.start(step.argv, self.logs / f"{step.name.replace('/', '.')}.log")
            self.running[worker.connection] = (worker, step)

    def _end(self, worker: Worker, step: Step) -> None:
        """A step has ended, or its process has."""
        try:
            done = worker.result()
        except (EOFError, OSError):
            done = Done(KILLED, 0.0)
        log = self.logs / f"{step.name.replace('/', '.')}.log"
        if done.code == 0:
            self.took[step.name] = done.seconds
            self.by_kind[step.kind].append(done.seconds)
            self.notes.write(step, done.seconds)
            self.say(f"{len(self.took):>4}/{self.total}  {step.name:<40} {done.seconds:7.1f} s  {self._eta()}")
        elif not self.stopped and self.failed is None:
            self.failed = StepFailed(step, done.code, log)

    def _eta(self) -> str:
        """From what steps of the same kind took so far."""
        every = [seconds for kind in self.by_kind.values() for seconds in kind]
        usual = sum(every) / len(every)
        kinds = {kind: sum(found) / len(found) for kind, found in self.by_kind.items()}
        ahead = [*self.left, *(step for _, step in self.running.values())]
        seconds = sum(kinds.get(step.kind, usual) for step in ahead) / max(len(self.workers), 1)
        return f"ETA {clock(seconds)}" if ahead else time.strftime("done at %H:%M")


def _last_words(log: Path) -> str:
    """What a log ends with."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")
    return ""
