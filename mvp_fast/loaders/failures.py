"""Bad samples: one policy for every backend.

A sample that cannot be used is replaced by the plan's stand-in for it, and that by its own stand-in, until one
decodes; which one that is depends on the plan and the files alone, so all backends and resumed runs agree. Each bad
sample is written down once, in memory and in a JSON-lines ledger, and every replacement counts against a budget: a
share of the samples seen, as in SPDL, with a probation before which the share does not count yet.

The ledger has one object a line: key, file, reason, kind, step (where it was first met).
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders.encoded import BadKind, BadSampleError
from mvp_fast.samples.plan import PlanRows, SamplePlan

MAX_STAND_INS = 100
"""Stand-ins tried for one sample before the data set is given up."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Failure:
    """One bad sample: its key, its file, what is wrong, what kind of wrong, and the step that met it."""

    key: str
    file: str
    reason: str
    kind: BadKind
    step: int


@dataclass(frozen=True)
class Settled(Generic[T_co]):
    """What became of one planned row, or of the rows of one group.

    Attributes:
        rows: the planned ones, or the stand-in's that decoded.
        value: what the attempt on them gave; None where MAX_STAND_INS stand-ins failed as well.
        failures: the samples that failed on the way, in order.
        count: how many rows there are.
    """

    rows: PlanRows
    value: T_co | None
    failures: tuple[Failure, ...] = ()
    count: int = 1


def settle(
    plan: SamplePlan,
    step: int,
    rows: PlanRows,
    i: int,
    attempt: Callable[[PlanRows], T],
    first: BadSampleError | None = None,
    count: int = 1,
) -> Settled[T]:
    """Try row `i`, then its stand-ins in their order, until one can be used.

    A backend that decodes once for a group (plan.repeat rows of one sample) settles the group's rows together. Settled
    one by one they get the same stand-ins.

    Args:
        plan: gives the stand-ins.
        step: step of the plan, for the ledger.
        rows: rows of the plan; only those from row `i` on are looked at.
        i: which row.
        attempt: gets `count` rows; raises BadSampleError where their sample cannot be used.
        first: why the sample of row `i` is bad, where that is known already: it is not tried again.
        count: 1, or plan.repeat for the group that begins with row `i`.
    """
    row = rows.slice(i, i + count)
    failures: list[Failure] = []
    for _ in range(1 + MAX_STAND_INS):
        bad, first = first, None
        if bad is None:
            try:
                return Settled(row, attempt(row), tuple(failures), count)
            except BadSampleError as error:
                bad = error
        sample = int(row.sample_B[0])
        key, file = plan.index.key(sample), str(plan.index.file(sample))
        failures.append(Failure(key, file, bad.reason, bad.kind, step))
        row = plan.stand_ins(row)
    return Settled(row, None, tuple(failures), count)


class BadSamples:
    """The ledger of bad samples and their budget. Thread-safe; told of rows in the order of the plan.

    Args:
        config: bad_sample_budget and bad_sample_probation.
        ledger: JSON-lines file to append to; None keeps the ledger in memory alone. Samples that it already holds
            (of an earlier part of the run) are not written again, but count anew.

    Attributes:
        seen: rows accounted for, those of bad samples included.
        bad: how many of them were of bad samples; a sample counts each time it is met, and for each crop.
        failures: every bad sample once, by key, in the order met.
    """

    def __init__(self, config: DataConfig, ledger: str | Path | None = None) -> None:
        self._budget, self._probation = config.bad_sample_budget, config.bad_sample_probation
        self._ledger = None if ledger is None else Path(ledger)
        self._lock = threading.Lock()
        self._written, self._torn = _read_ledger(self._ledger)
        self.seen = self.bad = 0
        self.failures: dict[str, Failure] = {}

    def allowed(self, seen: int) -> int:
        """Bad samples that are within the budget after `seen` samples."""
        least = math.ceil(self._budget * self._probation - 1e-9)  # a product such as 0.1 * 30 is just above 3
        return max(least, math.floor(self._budget * seen + 1e-9))

    def account(self, settled: Settled[object]) -> None:
        """Book a row or a group as the consumer gets it: the samples that failed and the one that did not.

        Raises:
            DataError: more samples were bad than the budget allows, or no stand-in could be used.
        """
        with self._lock:
            for failure in settled.failures:
                self._record(failure, settled.count)
            self.seen += settled.count * (len(settled.failures) + (settled.value is not None))
            if settled.failures and self.bad > self.allowed(self.seen):
                raise self._over_budget()
            if settled.value is None:
                raise self._hopeless()

    def _record(self, failure: Failure, count: int) -> None:
        self.bad += count
        self.failures.setdefault(failure.key, failure)
        if self._ledger is None or failure.key in self._written:
            return
        self._written.add(failure.key)
        line = "\n" * self._torn + json.dumps(asdict(failure), ensure_ascii=False) + "\n"
        self._torn = False
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: the lines of several ranks do not mix.
        descriptor = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _over_budget(self) -> DataError:
        allowed = "none" if self._budget == 0 else f"a share of {self._budget:g}"
        return self._error(
            f"{self.bad} of the {self.seen} samples seen were bad (a share of {self.bad / self.seen:.2g}), and "
            f"data.bad_sample_budget allows {allowed}"
        )

    def _hopeless(self) -> DataError:
        return self._error(f"{MAX_STAND_INS} stand-ins in a row for one bad sample were bad too")

    def _error(self, what: str) -> DataError:
        failures = list(self.failures.values())
        shown = "; ".join(f"{failure.key}: {failure.reason}" for failure in failures[:3])
        rest = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        stale = sum(failure.kind != "broken" for failure in failures)
        if 2 * stale > len(failures):
            what += ". The index no longer fits its files"
            fix = "If the folder moved or changed, build its index anew with `mvp-fast data index DIR`"
        else:
            fix = "`mvp-fast data index DIR --verify` decodes every image, lists the bad ones and leaves them out"
        return DataError(
            f"{what}. The first: {shown}{rest}",
            where=f"all of them are in {self._ledger}" if self._ledger else "",
            fix=fix,
        )


def _read_ledger(ledger: Path | None) -> tuple[set[str], bool]:
    """The keys that a ledger of an earlier part of the run holds, and whether its last line was torn by a crash."""
    if ledger is None or not ledger.exists():
        return set(), False
    text = ledger.read_text(encoding="utf-8", errors="replace")
    keys: set[str] = set()
    for line in text.splitlines():
        try:
            keys.add(json.loads(line)["key"])
        except (ValueError, KeyError, TypeError):  # the torn line
            continue
    return keys, bool(text) and not text.endswith("\n")
