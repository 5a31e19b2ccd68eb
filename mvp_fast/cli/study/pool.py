"""Runs the study's steps, several at a time, each once: a step that is done is not done again."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from mvp_fast.cli.study.notes import Notes
from mvp_fast.cli.study.worker import CRASHED, Done, Worker
from mvp_fast.errors import EnvironmentProblem, Preempted, UserError
from mvp_fast.evaluate.progress import clock
from mvp_fast.evaluate.study.steps import Step

KILLED = -1
"""In place of an exit code: the process is gone."""


class StepFailed(UserError):
    """A step ended with an error of its own; the study's exit code is the step's."""

    kind = "a step failed"

    def __init__(self, step: Step, code: int, log: Path, words: str) -> None:
        how = {CRASHED: "with an error that nobody foresaw", KILLED: "killed, perhaps for lack of memory"}.get(
            code, f"with exit code {code}"
        )
        fix = "Take fewer --processes; the same command" if code == KILLED else "When it is mended, the same command"
        super().__init__(
            f"The step {step.name} ended {how}" + (f": {words}" if words and code != KILLED else ""),
            where=str(log),
            fix=f"{fix} goes on from there, and what is done stays done",
        )
        self.exit_code = {CRASHED: UserError.exit_code, KILLED: EnvironmentProblem.exit_code}.get(code, code)


def run_steps(
    steps: Sequence[Step], folder: Path, processes: int, threads: int, say: Callable[[str], None] = print
) -> Notes:
    """Run what is not done yet.

    Args:
        steps: each after those that it needs.
        folder: for steps/ (what is done) and logs/.
        processes: steps at a time.
        threads: of each.
        say: told of each step that ends, and how long the others will take.

    Returns:
        the notes of all steps, which are done.

    Raises:
        ConfigError: the folder holds steps of other settings.
        StepFailed: a step did; those that ran beside it were let finish.
        Preempted: SIGTERM or SIGINT came; steps that train have written checkpoints.
    """
    notes = Notes(folder / "steps", steps)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    for step in steps:  # in order: one is done only where all that it needs is
        if set(step.needs) <= done and notes.is_done(step):
            done.add(step.name)
    left = [step for step in steps if step.name not in done]
    notes.check_before(left)
    if left:
        say(f"steps    {len(left)} of {len(steps)} to do, {processes} at a time, {threads} threads each")
        _Pool(left, done, notes, folder / "logs", processes, threads, say).run()
    return notes


class _Pool:
    """One call's state."""

    def __init__(
        self,
        left: list[Step],
        done: set[str],
        notes: Notes,
        logs: Path,
        processes: int,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self.left, self.done, self.notes, self.logs, self.say = left, done, notes, logs, say
        self.total = len(left) + len(done)
        self.workers = [Worker(threads) for _ in range(min(processes, len(left)))]
        self.running: dict[Any, tuple[Worker, Step]] = {}
        self.failed: StepFailed | None = None
        self.stopped = Event()
        self.by_kind: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Until nothing is left, or nothing more may be begun."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._begin()
            while self.running:
                for connection in wait(list(self.running)):
                    self._end(*self.running.pop(connection))
                self._begin()
        finally:  # with an error of our own (a full disk), what still runs is asked to stop
            for worker, _ in self.running.values():
                worker.stop()
            for worker in self.workers:
                worker.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.failed is not None:
            raise self.failed
        if self.stopped.is_set():
            raise Preempted("The study was stopped", where=str(self.logs), fix="The same command goes on from there")
        assert not self.left, self.left[0].name

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped.set()
        for worker, _ in list(self.running.values()):
            worker.stop()

    def _begin(self) -> None:
        """Give work to the workers that have none."""
        for worker in self.workers:
            if self.failed or self.stopped.is_set():
                return
            if worker.connection in self.running:
                continue
            step = next((step for step in self.left if set(step.needs) <= self.done), None)
            if step is None:
                return
            self.left.remove(step)
            self.notes.begin(step)
            self.running[worker.connection] = (worker, step)  # before the start, so that a signal finds it
            worker.start(step.argv, self._log(step))
            if self.stopped.is_set():
                worker.stop()

    def _end(self, worker: Worker, step: Step) -> None:
        """A step has ended, or its process has."""
        try:
            result = worker.result()
        except (EOFError, OSError):
            result = Done(KILLED, 0.0, "")
        seconds = self.notes.finish(step, result.seconds, done=result.code == 0)
        if result.code == 0:
            self.done.add(step.name)
            self.by_kind[step.kind].append(result.seconds)
            self.say(f"{len(self.done):>4}/{self.total}  {step.name:<44} {seconds:7.1f} s  {self._eta()}")
        elif not self.stopped.is_set() and self.failed is None:
            self.failed = StepFailed(step, result.code, self._log(step), result.words)

    def _log(self, step: Step) -> Path:
        return self.logs / f"{step.name.replace('/', '.')}.log"

    def _eta(self) -> str:
        """From what steps of the same kind took so far."""
        every = [seconds for kind in self.by_kind.values() for seconds in kind]
        usual = sum(every) / len(every)
        kinds = {kind: sum(found) / len(found) for kind, found in self.by_kind.items()}
        ahead = [*self.left, *(step for _, step in self.running.values())]
        seconds = sum(kinds.get(step.kind, usual) for step in ahead) / len(self.workers)
        return f"ETA {clock(seconds)}" if ahead else time.strftime("done at %H:%M")


def ready_folder(folder: Path) -> None:
    """Make the study's folder.

    Raises:
        EnvironmentProblem: it can't be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"The study's folder can't be made: {error.strerror}", where=str(folder), fix="Give another --folder"
        ) from error
