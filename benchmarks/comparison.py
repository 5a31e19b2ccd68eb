"""What a comparison of two revisions found: judged, told as a table, and written down whole.

The JSON document:

schema       number of this format; kind: "comparison"
date         UTC; command: as typed after `mvp-fast bench`
base         revision as asked for, commit, python, environment in words, machine (see recorder.py)
current      commit, dirty, differences (files that are not as committed), python, environment, machine
settings     seconds a benchmark; counts: fail or tell; least and most pairs
benchmarks   a list: name, verdict, note, alarms, device, threshold, times_as_fast (ratio, low, high, pairs),
             calibration (arm -> the same), counts (side -> name -> number), rounds (first, and of each side seconds and
             calibration), again (a list: the same, of each pass in fresh processes)
ended        null; or why not all benchmarks were run
exit_code    0 or 1, see `regression.py`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from giver import Measured
from verdict import SAME, SLOWER, THRESHOLDS, VOID, Judgement, counts_that_differ, judge

SCHEMA, MOST_PASSES = 1, 3
NOT_COMPARED, FAILED = "not compared", "fails"
COLUMNS = ("benchmark", "times as fast", "95 % interval", "verdict", "counts")


@dataclass(frozen=True)
class Finding:
    """One benchmark, judged.

    Attributes:
        measured: its rounds, or why there are none.
        verdict: see verdict.py; or NOT_COMPARED, or FAILED where the current side can't run it.
        threshold: that it was judged by.
        judgement: None where it was not compared.
        more, fewer: counts of which the current side has more or fewer: name -> (base, current).
        alarms: what is wrong: "slower", "more <count>", "fails".
        note: what the reader should know, a sentence or none.
        again: what fresh processes said, where the first ones left it open.
    """

    measured: Measured
    verdict: str
    threshold: float = 0.0
    judgement: Judgement | None = None
    more: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fewer: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    note: str = ""
    again: tuple[Finding, ...] = ()

    @property
    def judged(self) -> str:
        """The verdict of this pass alone."""
        return self.judgement.verdict if self.judgement else NOT_COMPARED

    @property
    def passes(self) -> tuple[Finding, ...]:
        """This one, and those in fresh processes."""
        return (self, *self.again)

    def counts_in_words(self) -> str:
        """For the table."""
        parts = [("more", self.more), ("fewer", self.fewer)]
        words = [f"{how} {_name(n)} ({a:,} to {b:,})" for how, pairs in parts for n, (a, b) in pairs.items()]
        counted = self.judgement is not None and all(self.measured.counts.values())
        return ", ".join(words) or ("the same" if counted else "")

    def row(self) -> tuple[str, ...]:
        """For the table; see COLUMNS."""
        name = self.measured.name
        if self.judgement is None:
            return name, "", "", self.verdict, ""
        # Of several passes the last one that says what all of them come to.
        shown = next((each for each in reversed(self.passes) if each.judged == self.verdict), self)
        assert shown.judgement is not None
        times = shown.judgement.times
        interval = f"{times.low:.3f} to {times.high:.3f}"
        return name, f"{times.ratio:.3f}", interval, self.verdict, self.counts_in_words()


def find(measured: Measured, threshold: float, revision: str, count_alarms: bool) -> Finding:
    """Judge one benchmark.

    Args:
        measured: what came out of it.
        threshold: 0 for its device's usual one.
        revision: the base's, as asked for.
        count_alarms: whether more of a count is wrong.
    """
    if measured.reason:
        failed = measured.failed and measured.whose == "current"
        where = f"does not run at {revision}" if measured.whose == "base" else "fails" if failed else "is left out"
        note = f"{where}: {measured.reason}"
        return Finding(measured, FAILED if failed else NOT_COMPARED, alarms=(FAILED,) if failed else (), note=note)
    threshold = threshold or THRESHOLDS[measured.device]
    judgement = judge(measured.rounds, threshold)
    more, fewer = counts_that_differ(measured.counts["base"], measured.counts["current"])
    alarms = [SLOWER] * (judgement.verdict == SLOWER) + [f"more {_name(name)}" for name in more if count_alarms]
    arms = ", ".join(f"{name} {judgement.calibration[name]}" for name in judgement.drifted)
    note = f"void, because work that no revision touches differs between the two sides: {arms}" if arms else ""
    return Finding(measured, judgement.verdict, threshold, judgement, more, fewer, tuple(alarms), note)


def is_unsure(measured: Measured, threshold: float) -> bool:
    """Whether more rounds could tell whether it is slower: the interval holds the threshold."""
    threshold = threshold or THRESHOLDS[measured.device]
    times = judge(measured.rounds, threshold).times
    return times.low < 1 / (1 + threshold) <= times.high


def is_open(finding: Finding) -> bool:
    """Whether fresh processes should measure it (once more): two processes may differ for as long as they live.

    Only what two passes say is a regression, and a void pass says nothing. MOST_PASSES end it; two where all are void.
    """
    most = MOST_PASSES if SLOWER in [each.judged for each in finding.passes] else MOST_PASSES - 1
    if finding.judgement is None or FAILED in finding.alarms or len(finding.passes) >= most:
        return False
    return _verdict(finding.passes) is None or (not finding.again and bool(finding.alarms))


def settle(finding: Finding, fresh: Finding) -> Finding:
    """A finding after one more pass, in fresh processes."""
    now = replace(finding, again=(*finding.again, fresh))
    if FAILED in fresh.alarms:
        return replace(now, verdict=FAILED, alarms=fresh.alarms, note=fresh.note)
    verdict = _verdict(now.passes) or VOID
    counts = [alarm for alarm in finding.alarms if alarm != SLOWER and alarm in now.again[0].alarms]
    told = "; ".join(f"{each.judged} {each.judgement.times}" if each.judgement else each.note for each in now.passes)
    note = f"measured {len(now.passes)} times, in fresh processes each: {told}"
    return replace(now, verdict=verdict, alarms=(*[SLOWER] * (verdict == SLOWER), *counts), note=note)


def _verdict(passes: Sequence[Finding]) -> str | None:
    """Of all passes; None as long as it is open."""
    said = [each.judged for each in passes if each.judged not in (VOID, NOT_COMPARED)]
    if SLOWER not in said:
        return said[0] if said else None
    if said.count(SLOWER) > 1:
        return SLOWER
    return SAME if len(said) > 1 else None


def table(findings: Sequence[Finding]) -> Any:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(*COLUMNS)
    for finding in findings:
        style = "red" if finding.alarms else "green" if finding.verdict == "faster" else None
        shown.add_row(*map(escape, finding.row()), style=style)  # a case's name stands in brackets
    return shown


def notes(findings: Iterable[Finding]) -> list[str]:
    """What is to be said beside the table, a line each."""
    return [f"{finding.measured.name}: {finding.note}" for finding in findings if finding.note]


def summary(findings: Sequence[Finding], ended: str | None) -> str:
    """The last line."""
    alarms = [f"{finding.measured.name} ({', '.join(finding.alarms)})" for finding in findings if finding.alarms]
    compared = sum(finding.judgement is not None for finding in findings)
    words = f"{compared} of {len(findings)} benchmarks compared"
    if ended:
        words += f"; the comparison is not complete: {ended}"
    if alarms:
        return f"{words}. {'Suspected' if ended else 'Regression'}: {'; '.join(alarms)}."
    return f"{words}. No regression found." if compared else f"{words}: nothing can be said."


def markdown(findings: Sequence[Finding], head: Sequence[str], last: str) -> str:
    """The same for GitHub."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [row(COLUMNS), row(["---"] * len(COLUMNS)), *(row(finding.row()) for finding in findings)]
    told = [f"- {line}" for line in notes(findings)]
    return "\n".join(["### Speed against another revision", "", *head, "", *lines, "", *told, "", last, ""])


def as_dict(finding: Finding) -> dict[str, Any]:
    """For the document."""
    measured, judgement = finding.measured, finding.judgement
    return {
        "name": measured.name,
        "verdict": finding.verdict,
        "note": finding.note,
        "alarms": list(finding.alarms),
        "device": measured.device or None,
        "threshold": finding.threshold or None,
        "times_as_fast": asdict(judgement.times) if judgement else None,
        "calibration": {name: asdict(arm) for name, arm in judgement.calibration.items()} if judgement else {},
        "counts": measured.counts,
        "rounds": measured.rounds,
        "again": [as_dict(each) for each in finding.again],
    }


def _name(count: str) -> str:
    return count.replace("_", " ")
