"""What was recorded, as pure data, and what it says: the critical path, each stage's time, overlap.

A track is a thread of the host or a stream of the GPU. The main track is the one that bounds a step: on a CPU the
thread that steps, on a GPU the stream on which the steps' updates run. The critical path is a main track without holes:
each moment of it is one stage's. So its stages add up to the steps' time.

- On the main track the innermost stage counts.
- On a CPU, what lies between stages is `host`.
- On a GPU, a hole is the device waiting. Up to when the host queued the next stage it waited for the host; from then on
  for another stream: that stream's stage is what the time is booked under. In `data wait` the device may wait on after
  the host has its batch: for the `copy`.

All times are seconds on the host's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

HOST_TRACK, LOADER_TRACK, MAIN_STREAM = "host thread", "loader thread", "GPU main stream"
# The device starts what it was waiting for this soon after the host queued it.
STARVED = 50e-6


@dataclass(frozen=True)
class Span:
    """A stage on a track.

    Attributes:
        launched: of a stage on the GPU, when the host entered and left it.
    """

    stage: str
    track: str
    start: float
    end: float
    launched: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Some steps in a row.

    Attributes:
        spans: of all tracks, by start.
        marks: when the first step began, and when each of them ended, on the main track.
        main: the main track.
    """

    spans: tuple[Span, ...]
    marks: tuple[float, ...]
    main: str

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.marks) - 1

    @property
    def seconds(self) -> float:
        """From the first step's beginning to the last one's end."""
        return self.marks[-1] - self.marks[0]

    @property
    def step_seconds(self) -> list[float]:
        """Of each step."""
        return [end - start for start, end in pairwise(self.marks)]

    @property
    def tracks(self) -> list[str]:
        """The host's thread first, then the GPU's streams, then other threads."""
        found = dict.fromkeys(span.track for span in self.spans)
        order = {HOST_TRACK: 0, self.main: 1}
        return sorted(found, key=lambda track: (order.get(track, 2 if track.startswith("GPU") else 3), track))

    def within(self, step: int) -> list[Span]:
        """What falls into a step (0-based), cut at its ends."""
        return _cut(self.spans, *self.marks[step : step + 2])

    @cached_property
    def path(self) -> list[Span]:
        """The critical path: spans without a hole from the first mark to the last, on the track "critical path"."""
        begin, end = self.marks[0], self.marks[-1]
        main = [span for span in self.spans if span.track == self.main]
        pieces: list[Span] = []
        at = begin
        for piece in innermost(main):
            if piece.end <= at or piece.start >= end:
                continue
            if piece.start > at:
                pieces += self._hole(at, min(piece.start, end), piece)
            pieces += _without_copy(_clip(piece, max(at, piece.start), min(piece.end, end)))
            at = min(piece.end, end)
        if at < end:
            pieces += self._hole(at, end, None)
        return [Span(piece.stage, "critical path", piece.start, piece.end) for piece in pieces]

    def _hole(self, start: float, end: float, following: Span | None) -> list[Span]:
        """What the main track waited for between two stages."""
        if following is None or following.launched is None:
            return [Span("host", self.main, start, end)]
        queued = min(max(following.launched[0], start), end)
        pieces = [Span("host", self.main, start, queued)] if queued > start else []
        # A batch in the making is none that a step waits for: that is `data wait`.
        streams = (span for span in self.spans if span.launched is not None and span.track != self.main)
        others = [span for span in streams if span.stage != "load"]
        # From the back: what it waited for is what ended last.
        waited: list[Span] = []
        at = end
        for span in sorted(_cut(others, queued, end), key=lambda span: span.end, reverse=True):
            if span.end < at:
                waited.append(Span("host", self.main, max(span.end, queued), at))
            if span.start < at:
                waited.append(Span(span.stage, self.main, span.start, min(span.end, at)))
                at = span.start
        if at > queued:
            waited.append(Span("host", self.main, queued, at))
        return pieces + waited[::-1]

    @property
    def critical(self) -> dict[str, float]:
        """Seconds a step on the critical path, by stage; they add up to the mean step."""
        return _totals(self.path, self.steps)

    @property
    def busy(self) -> dict[str, float]:
        """Seconds a step that each stage took wherever it ran, also beside others: on the GPU where it ran there."""
        window = _cut(self.spans, self.marks[0], self.marks[-1])
        on_gpu = {span.stage for span in window if span.launched is not None}
        pieces: list[Span] = []
        for track in dict.fromkeys(span.track for span in window):
            pieces += innermost([span for span in window if span.track == track])
        return _totals((p for p in pieces if (p.launched is not None) == (p.stage in on_gpu)), self.steps)

    @property
    def host_bound(self) -> float:
        """Seconds a step of stages on the GPU's main stream in which the device had caught up with the host at both
        ends: it did nothing but wait for launches in between, or nothing else is known of it. 0 on a CPU."""
        main = [span for span in self.spans if span.track == self.main]
        starved = (span for span in innermost(main) if span.stage != "data wait" and _starved(span))
        return sum(span.seconds for span in _cut(starved, self.marks[0], self.marks[-1])) / max(self.steps, 1)


def innermost(spans: Iterable[Span]) -> list[Span]:
    """Spans of one track, which nest, as spans that don't: where one lies in another, it is the inner one's time."""
    pieces: list[Span] = []
    stack: list[Span] = []
    at = float("-inf")

    def until(end: float) -> None:
        nonlocal at
        if end > at:
            pieces.append(_clip(stack[-1], at, end))
            at = end

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while stack and stack[-1].end <= span.start:
            until(stack[-1].end)
            stack.pop()
        if stack:
            until(span.start)
        at = max(at, span.start)
        stack.append(span)
    while stack:
        until(stack[-1].end)
        stack.pop()
    return pieces


def _without_copy(piece: Span) -> list[Span]:
    """Once the host has its batch, a device still in `data wait` waits for the copy."""
    if piece.stage != "data wait" or piece.launched is None or piece.launched[1] >= piece.end:
        return [piece]
    handed = max(piece.launched[1], piece.start)
    copied = Span("copy", piece.track, handed, piece.end, piece.launched)
    return [copied] if handed == piece.start else [_clip(piece, piece.start, handed), copied]


def _starved(span: Span) -> bool:
    if span.launched is None:
        return False
    return span.start - span.launched[0] < STARVED and span.end - span.launched[1] < STARVED


def _clip(span: Span, start: float, end: float) -> Span:
    return Span(span.stage, span.track, start, end, span.launched)


def _cut(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    inside = (span for span in spans if span.end > start and span.start < end)
    return [_clip(span, max(span.start, start), min(span.end, end)) for span in inside]


def _totals(spans: Iterable[Span], steps: int) -> dict[str, float]:
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.stage] = totals.get(span.stage, 0.0) + span.seconds / steps
    return totals


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, linearly between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
