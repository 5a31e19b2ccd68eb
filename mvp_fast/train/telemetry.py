"""What a run tells people: the figures of an interval of steps, and their display.

The device is read once an interval (`train.log_every` steps), never in between. Where figures are kept: `sinks`.
"""

from __future__ import annotations

import math
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from mvp_fast.train.distributed import Ranks
from mvp_fast.train.pace import in_words
from mvp_fast.train.sinks import Metrics
from mvp_fast.train.update import StepResult


class Interval:
    """Results of the steps since the last metric line; they stay on the device until `read`."""

    def __init__(self) -> None:
        self._results: list[StepResult] = []
        self.restart_clock(0.0)

    def __len__(self) -> int:
        return len(self._results)

    @property
    def timed_steps(self) -> int:
        """Steps since the clock was started; steps of before a resume are in the results alone."""
        return self._timed_steps

    def restart_clock(self, wait_seconds: float) -> None:
        """Begin to measure time now; `wait_seconds` is the loader's total so far."""
        self._timed_steps, self._start, self._wait_start = 0, time.perf_counter(), wait_seconds

    def add(self, result: StepResult) -> None:
        """Take in one step."""
        self._results.append(result)
        self._timed_steps += 1

    def state(self, ranks: Ranks) -> dict[str, Tensor]:
        """The results so far as tensors (K,), K steps; losses are means over the ranks, so every rank must call this.

        For the metric line, and for a checkpoint, so that a resumed run writes the same lines with any number of ranks.
        """
        if not self._results:
            return {
                "losses": torch.zeros(0),
                "grad_norms": torch.zeros(0),
                "finite": torch.zeros(0, dtype=torch.bool),
            }
        return {
            "losses": ranks.mean(torch.stack([result.loss for result in self._results])),
            "grad_norms": torch.stack([result.grad_norm for result in self._results]),
            "finite": torch.stack([result.finite for result in self._results]),
        }

    def load_state(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Put back what `state` returned."""
        columns = (tensors[name].to(device).unbind() for name in ("losses", "grad_norms", "finite"))
        self._results = [StepResult(*row) for row in zip(*columns, strict=True)]

    def read(self, ranks: Ranks, batch_size: int, wait_seconds: float) -> tuple[Metrics, list[int]]:
        """Read the interval from the device, empty it, and restart the clock.

        Args:
            batch_size: global images a step.
            wait_seconds: the time this rank's host has waited for data so far.

        Returns:
            The metrics, and which steps of the interval (0-based) had their update skipped.
        """
        state = self.state(ranks)
        losses, finite, grad_norms = (state[name].tolist() for name in ("losses", "finite", "grad_norms"))
        now = time.perf_counter()  # after the reads above, so that the device has done the work that is timed
        seconds = max(now - self._start, 1e-9)
        kept = [loss for loss, good in zip(losses, finite, strict=True) if good and math.isfinite(loss)]
        norms = [norm for norm, good in zip(grad_norms, finite, strict=True) if good]
        metrics: Metrics = {
            "loss": sum(kept) / len(kept) if kept else None,
            "images_per_second": self._timed_steps * batch_size / seconds,
            "data_wait": min((wait_seconds - self._wait_start) / seconds, 1.0),
            "grad_norm": sum(norms) / len(norms) if norms else None,
        }
        self._results = []
        self.restart_clock(wait_seconds)
        return metrics, [i for i, good in enumerate(finite) if not good]


class Display:
    """A live progress bar on a terminal, one plain line an interval elsewhere; silent where `active` is False."""

    def __init__(self, total: int, start_step: int, active: bool = True, console: Console | None = None) -> None:
        self._console = console or Console()
        self._active, self._total, self._start_step = active, total, start_step
        self._begin = time.perf_counter()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if active and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total, completed=start_step, line="starting")
            self._progress.start()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, metrics: Metrics) -> None:
        """Show one metric line."""
        loss = "non-finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        line = (
            f"loss {loss}  {metrics['images_per_second']:.1f} images/s  lr {metrics['lr']:.2e}"
            f"  data wait {100 * metrics['data_wait']:.0f} %"
        )
        if straggler := in_words(metrics):
            line += f"  {straggler}"
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics["step"], line=line)
            return
        done = metrics["step"] - self._start_step
        left = (time.perf_counter() - self._begin) / max(done, 1) * (self._total - metrics["step"])
        self.say(f"step {metrics['step']}/{self._total}  {line}  ETA {_clock(left)}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
