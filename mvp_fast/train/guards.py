"""What may end a run early: a signal from outside, and updates that keep being skipped for non-finite values."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType, TracebackType

from mvp_fast.errors import TrainingDiverged
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.sinks import drop_later_lines


class StopRequest:
    """Notes SIGTERM and SIGINT while its block runs, so that the step under way can finish.

    A second signal of the same kind acts as it would without this class: Ctrl-C twice stops at once.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, signal._HANDLER] = {}
        self._ignoring = False

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ignoring:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def ignore_signals(self) -> None:
        """Let no further signal change how this process ends, also after the block; for a process about to exit."""
        self._ignoring = True
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)


class NonFiniteGuard:
    """Counts skipped updates, writes down their samples, and ends the run over the budget.

    Args:
        plan: the plan of the whole batch (one rank of one), to name the samples (as planned, before stand-ins).
        budget: skipped updates that are tolerated.
        ledger: nonfinite.jsonl, one line a skipped update; None on ranks that write nothing.
        skipped: updates skipped before a resume.
        start_step: steps done before a resume; lines of later steps, which the run takes again, are dropped.
    """

    def __init__(self, plan: SamplePlan, budget: int, ledger: Path | None, skipped: int, start_step: int) -> None:
        self.plan, self.budget, self.ledger, self.skipped = plan, budget, ledger, skipped
        if ledger is not None and ledger.exists():
            drop_later_lines(ledger, start_step)

    def note(self, steps: list[int]) -> None:
        """Take in the 0-based steps whose updates were skipped since the last call.

        Raises:
            TrainingDiverged: more were skipped than the budget allows.
        """
        if not steps:
            return
        self.skipped += len(steps)
        if self.ledger is not None:
            with self.ledger.open("a", encoding="utf-8") as file:
                for step in steps:
                    file.write(json.dumps({"step": step + 1, "keys": self._keys(step)}) + "\n")
        if self.skipped > self.budget:
            keys = self._keys(steps[-1])
            named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise TrainingDiverged(
                f"{self.skipped} updates were skipped for a non-finite loss or gradient,"
                f" train.nonfinite-budget allows {self.budget}; the last at step {steps[-1] + 1} on {named}",
                where=f"all samples are in {self.ledger}" if self.ledger else "",
                fix="Lower optim.lr, lengthen optim.warmup-fraction or try --train.precision fp32, and go on from a"
                " checkpoint before the first skipped step with --resume PATH",
            )

    def _keys(self, step: int) -> list[str]:
        return [self.plan.index.key(int(sample)) for sample in self.plan.step(step).sample_B]
