"""The order of events in a run: take a batch, step, log, checkpoint, and the ways it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import DataError, EnvironmentProblem, Preempted
from mvp_fast.loaders.base import Batch
from mvp_fast.train.build import build_run
from mvp_fast.train.checkpoint import Checkpointer
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.guards import NonFiniteGuard, StopRequest
from mvp_fast.train.pace import Pace
from mvp_fast.train.run import Run
from mvp_fast.train.run_folder import describe_environment, prepare_folder, resume_point
from mvp_fast.train.sinks import check_sinks, open_sinks
from mvp_fast.train.stepping import Event, Stepping
from mvp_fast.train.telemetry import Display
from mvp_kernels import dispatch


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to say.

    Attributes:
        images_per_second: over the steps of this process, the first (start-up) left out.
        data_wait: share of that time this rank waited for data.
        loss: of the last metric line; None where no step was taken.
        peak_memory_bytes: of the GPU; 0 on the CPU.
    """

    folder: Path
    steps: int
    images_per_second: float
    data_wait: float
    loss: float | None
    peak_memory_bytes: int


# Builds a run from its settings, at step 0 or at a checkpoint; see `build.build_run`.
Builder = Callable[[Any, Ranks, Path | None], Run]


def train(config: RunSettings, ranks: Ranks, build: Builder = build_run) -> Outcome:
    """Train as `config` says; pre-train, unless `build` builds a run of another task.

    Raises:
        Preempted: a signal came; a checkpoint was written.
        TrainingDiverged: too many updates had to be skipped.
        UserError: anything else a user can mend; see `build_run` and `Checkpointer`.
    """
    check_sinks(config)
    # From here on, so that a run that is stopped while it starts says so by its exit code, too.
    with StopRequest() as stop:
        return _train(config, ranks, stop, build)


def _train(config: RunSettings, ranks: Ranks, stop: StopRequest, build: Builder) -> Outcome:
    checkpoint = resume_point(config)
    run = build(config, ranks, checkpoint)
    _check_ranks_agree(run)
    environment = describe_environment(ranks)
    environment |= run.about()
    environment["kernels"] = dispatch.resolve(config.kernels.impl, ranks.device.type)
    folder = Path(config.run.dir)
    if ranks.is_main:
        prepare_folder(config, environment)
    ranks.barrier()
    display = Display(run.total_steps, run.steps_done, active=ranks.is_main)
    display.say(header(run, environment["kernels"], checkpoint))
    if run.steps_done >= run.total_steps:
        display.close()
        return Outcome(folder, run.steps_done, 0.0, 0.0, None, 0)
    return _Loop(run, folder, display, stop).run()


def _check_ranks_agree(run: Run) -> None:
    """Ranks on machines with a disk each could find different checkpoints, and would train apart unnoticed."""
    furthest = run.ranks.agree(run.steps_done)
    if run.ranks.agree(int(run.steps_done != furthest)):
        raise EnvironmentProblem(
            f"The ranks don't see the same checkpoints: rank {run.ranks.rank} would go on from step {run.steps_done},"
            f" another from step {furthest}",
            where=f"run.dir {run.config.run.dir}",
            fix="Choose a --run.dir that all machines share",
        )


class _Loop:
    """The loop's moving parts, so that each event is a short method."""

    def __init__(self, run: Run, folder: Path, display: Display, stop: StopRequest) -> None:
        self.parts, self.folder, self.display, self.stop = run, folder, display, stop
        self.last_loss: float | None = None
        self.pace = Pace(run.ranks, sharded=run.step.sharded)
        self.open = contextlib.ExitStack()  # what must be closed, even where opening the next thing fails
        with contextlib.ExitStack() as opened:
            opened.callback(display.close)
            self._open_parts(opened)
            self.open = opened.pop_all()

    def _open_parts(self, opened: contextlib.ExitStack) -> None:
        run, folder = self.parts, self.folder
        config, ranks = run.config, run.ranks
        keep = config.train.keep_checkpoints
        self.checkpointer = Checkpointer(folder / "checkpoints", keep, ranks.is_main, run.steps_done)
        opened.callback(self.checkpointer.close)
        for path in self.checkpointer.superseded:
            self.display.say(f"aside     a checkpoint later than step {run.steps_done:,}: now {path}")
        self.sinks = open_sinks(config, folder, run.steps_done) if ranks.is_main else []
        for sink in self.sinks:
            opened.callback(sink.close)
        ledger = folder / "nonfinite.jsonl" if ranks.is_main else None
        budget = config.train.nonfinite_budget
        self.guard = NonFiniteGuard(run.whole_plan(), budget, ledger, run.skipped, run.steps_done)
        # Each rank decodes other samples, so each keeps its own ledger; one rank's is the usual name.
        name = "bad_samples.jsonl" if ranks.world == 1 else f"bad_samples.rank{ranks.rank}.jsonl"
        self.loader = run.build_loader(folder / name)
        opened.callback(self.loader.close)
        self.stepping = Stepping(run, self.loader, self.stop, self.pace)
        opened.callback(self.stepping.close)
        # From here on: what the prefetching thread does is no part of the step.
        run.step.stage = self.pace.recorder(run.step.stage)

    def run(self) -> Outcome:
        run, train = self.parts, self.parts.config.train
        try:
            run.interval.restart_clock(self.stepping.prefetcher.wait_seconds)
            self.pace.restart(self.stepping.prefetcher.wait_seconds)
            begun, since = run.steps_done, self._clock()
            while run.steps_done < run.total_steps:
                self.stepping.step(self._next_batch())
                done = run.steps_done
                self.display.advance(done)
                if done % train.log_every == 0 or done == run.total_steps:
                    self._log()
                if run.evaluation_due():
                    self._evaluate()
                if (train.checkpoint_every and done % train.checkpoint_every == 0) or done == run.total_steps:
                    self._save()
                if done == begun + 1 < run.total_steps:
                    since = self._clock()
            steps, seconds, waited = (now - then for now, then in zip(self._clock(), since, strict=True))
            self.checkpointer.wait()
            memory = torch.cuda.max_memory_allocated() if run.ranks.device.type == "cuda" else 0
            rate = steps * train.batch_size / seconds
            return Outcome(self.folder, run.steps_done, rate, waited / seconds, self.last_loss, memory)
        finally:
            self.open.close()

    def _next_batch(self) -> Batch:
        """The next batch, or one of the agreed ends: all ranks save the same state before any of them leaves."""
        agreed, batch, failure = self.stepping.next_batch()
        if agreed is Event.GO_ON and batch is not None:
            return batch
        self._save()
        self.checkpointer.wait()
        self.parts.ranks.barrier()
        if self.parts.ranks.world > 1:
            # torchrun sends SIGTERM to all ranks as soon as one has ended: their exit codes shall tell why they ended.
            self.stop.ignore_signals()
        if agreed is Event.DATA_FAILED:
            raise failure or DataError("Another rank's data failed", fix="Its message says how")
        raise Preempted(
            f"{self.stop.signal_name or 'A signal on another rank'} came, step {self.parts.steps_done} of"
            f" {self.parts.total_steps} was finished and its checkpoint written",
            where=str(self.folder),
            fix="The same command with --resume auto goes on from there",
        )

    def _log(self) -> None:
        run = self.parts
        first, timed = run.steps_done - len(run.interval), run.interval.timed_steps
        wait_seconds = self.stepping.prefetcher.wait_seconds
        metrics, skipped = run.interval.read(run.ranks, run.config.train.batch_size, wait_seconds)
        metrics = {
            "step": run.steps_done,
            **metrics,
            "lr": self.stepping.rate,
            "epoch": run.steps_done * run.config.train.batch_size / len(run.plan.index),
            "skipped_updates": len(skipped),
            "bad_samples": int(run.all_replaced()),
            **self.pace.read(timed * run.plan.local_batch_size, wait_seconds),
        }
        if run.ranks.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        self.last_loss = metrics["loss"]
        for sink in self.sinks:
            sink.write(metrics)
        self.display.show(metrics)
        self.guard.note([first + offset for offset in skipped])
        run.skipped = self.guard.skipped

    def _evaluate(self) -> None:
        """A line of its own in the metrics; its time counts neither as training nor as a rank's slowness."""
        run, waited = self.parts, self.stepping.prefetcher.wait_seconds
        self.pace.pause()
        figures = run.evaluate(lambda: self.stop.requested)
        run.interval.restart_clock(waited)
        if not figures:
            return
        for sink in self.sinks:
            sink.write({"step": run.steps_done, **figures})
        told = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.display.say(f"evaluated step {run.steps_done:,}  {told}")

    def _save(self) -> None:
        """Called by all ranks at the same step: what they measured differs, and the checkpoint holds the mean."""
        run = self.parts
        self.pace.pause()
        parts = run.checkpoint_parts()
        if run.ranks.is_main:
            self.checkpointer.save(run.steps_done, parts, run.checkpoint_state())

    def _clock(self) -> tuple[int, float, float]:
        """Steps done, the time, and the time waited for data so far; once the device has done all its work.

        Called at the ends and after the first step only: the run's overall rate is of finished work, without start-up.
        """
        if self.parts.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return self.parts.steps_done, time.perf_counter(), self.stepping.prefetcher.wait_seconds


def header(run: Run, kernels: str, checkpoint: Path | None) -> str:
    """What runs, in a few lines."""
    lines = [*run.header(kernels), f"run       {run.total_steps:,} steps in {run.config.run.dir}"]
    if checkpoint is not None:
        lines.append(f"resumed   at step {run.steps_done:,} from {checkpoint}")
    lines += [f"changed   {setting}" for setting in run.changed]
    return "\n".join(lines)
