"""Takes the steps that a profile is made of, in the training loop's own way of taking them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mvp_fast.errors import DataError
from mvp_fast.loaders.base import Loader, StageStats
from mvp_fast.loaders.registry import make_loader, resolve
from mvp_fast.train.build import PretrainRun
from mvp_fast.train.guards import StopRequest
from mvp_fast.train.pace import Pace
from mvp_fast.train.profile import memory
from mvp_fast.train.profile.numbers import Stretch
from mvp_fast.train.profile.recorder import Recorder
from mvp_fast.train.profile.timeline import Timeline
from mvp_fast.train.profile.trace import TracedSteps, read_torch_trace
from mvp_fast.train.stepping import Event, Stepping

# Steps before the measured ones, besides those whose batches lay ready: compilation, autotuning, the allocator, clocks.
WARM_UP = {"cpu": 2, "cuda": 10}
TRACED = 2  # under torch.profiler, which slows them: apart from the measured ones
Tell = Callable[[str], None]


@dataclass
class Taken:
    """What was recorded of a run.

    Attributes:
        real, synthetic: the measured steps; None where the run's own loader is synthetic.
        stretches: the same in numbers, by "real" and "synthetic".
        traced: steps under torch.profiler.
        memory: bytes by part.
        warm_up: steps before the measured ones.
    """

    real: Timeline
    synthetic: Timeline | None
    stretches: dict[str, Stretch]
    traced: TracedSteps
    memory: dict[str, int] = field(default_factory=dict)
    warm_up: int = 0


def take(run: PretrainRun, steps: int, snapshot: Path | None, tell: Tell) -> Taken:
    """Take all steps: with the run's loader, measured and then traced, and with resident batches.

    Args:
        run: at its first step; it is another afterwards.
        steps: measured in each of the two stretches.
        snapshot: where the snapshot of a GPU's memory goes; None on ranks that write nothing.
        tell: gets a word on what is being done.

    Raises:
        DataError: the loader failed.
    """
    recorder = Recorder(run.ranks.device)
    run.step.stage = recorder
    warm_up = WARM_UP[run.ranks.device.type] + run.config.data.prefetch + 1
    with _Steps(run, run.build_loader(None), recorder) as real:
        timeline, stretch = real.measured(warm_up, steps, lambda text: tell(f"own loader: {text}"))
        tell("memory")
        parts = memory.of_step(run.ranks.device, real.step)
        parts = {**memory.resident(run), **parts, **memory.of_process()}
        if recorder.on_gpu:
            tell("memory snapshot")
            memory.snapshot(run.ranks.device, real.step, snapshot)
        traced = real.traced(lambda text: tell(f"torch.profiler: {text}"))
    taken = Taken(timeline, None, {"real": stretch}, traced, parts, warm_up)
    config = run.config
    if resolve(config.data.loader, config.data, run.ranks.device) != "synthetic":
        synthetic = make_loader("synthetic", config.data, seed=config.seed, device=run.ranks.device)
        with _Steps(run, synthetic, recorder) as resident:
            again = config.data.prefetch + 2  # all else is warm
            taken.synthetic, taken.stretches["synthetic"] = resident.measured(
                again, steps, lambda text: tell(f"resident batches: {text}")
            )
    return taken


class _Steps:
    """A loader under way, and steps with its batches."""

    def __init__(self, run: PretrainRun, loader: Loader, recorder: Recorder) -> None:
        self.run, self.loader, self.recorder = run, loader, recorder
        self.open = ExitStack()

    def __enter__(self) -> _Steps:
        with ExitStack() as opened:
            opened.callback(self.loader.close)
            pace = Pace(self.run.ranks, sharded=self.run.step.sharded)
            # Signals keep their usual effect: there is nothing to save.
            self.stepping = Stepping(self.run, self.loader, StopRequest(), pace)
            opened.callback(self.stepping.close)
            self.open = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.open.close()

    def step(self) -> None:
        """As the loop does it, with the reading of the device every train.log_every steps."""
        agreed, batch, failure = self.stepping.next_batch()
        if agreed is not Event.GO_ON or batch is None:
            raise failure or DataError("Another rank's data failed", fix="Its message says how")
        self.stepping.step(batch)
        if len(self.run.interval) >= self.run.config.train.log_every:
            self._read()

    def _read(self) -> None:
        run = self.run
        waited = self.stepping.prefetcher.wait_seconds
        _, skipped = run.interval.read(run.ranks, run.config.train.batch_size, waited)
        run.skipped += len(skipped)

    def measured(self, warm_up: int, steps: int, tell: Tell) -> tuple[Timeline, Stretch]:
        """Measure `steps` steps after `warm_up` others; of those, the last is taken after the clocks are set."""
        for number in range(warm_up - 1):
            tell(f"warming up, step {number + 1} of {warm_up}")
            self.step()
        self.recorder.begin()
        self.step()
        before, skipped = _copied(self.loader.stats()), self.run.skipped
        self.recorder.mark()
        for number in range(steps):
            tell(f"step {number + 1} of {steps}")
            self.step()
            self.recorder.mark()
        timeline = self.recorder.finish()
        after = self.loader.stats()
        self._read()
        loader = {
            name: {
                "seconds": (after.seconds[name] - before.seconds[name]) / steps,
                "items": (after.items[name] - before.items[name]) / steps,
            }
            for name in after.seconds
        }
        stretch = Stretch(
            timeline.critical,
            timeline.busy,
            timeline.step_seconds,
            timeline.host_bound,
            loader,
            self.run.skipped - skipped,
        )
        return timeline, stretch

    def traced(self, tell: Tell) -> TracedSteps:
        """Some steps under torch.profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.recorder.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.recorder.begin()
        self.recorder.annotate = True
        try:
            with torch.profiler.profile(activities=activities, acc_events=True) as profile:
                self.recorder.mark()
                for number in range(TRACED):
                    tell(f"step {number + 1} of {TRACED}")
                    self.step()
                    self.recorder.mark()
                timeline = self.recorder.finish()
        finally:
            self.recorder.annotate = False
        return TracedSteps(timeline, torch_events(profile))


def torch_events(profile: Any) -> list[dict[str, Any]]:
    """What torch.profiler recorded, as events of a Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return read_torch_trace(path)


def _copied(stats: StageStats) -> StageStats:
    return replace(stats, seconds=dict(stats.seconds), items=dict(stats.items))
