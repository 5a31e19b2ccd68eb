"""trace.json.gz: the steps as Chrome trace events, for ui.perfetto.dev.

One process for the steps with the run's own loader, one for those with resident batches, one for the steps under
torch.profiler, each with a track a thread or stream and one for the steps; behind them, what torch.profiler recorded:
operators on the host's threads, kernels on the GPU's streams. All on one axis, microseconds since the first mark.

The format: "Trace Event Format" (Google, 2016), the JSON object form.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from mvp_fast.train.profile.timeline import HOST_TRACK, Timeline

STEPS_TRACK, PATH_TRACK = "steps", "critical path"
# torch's own numbers of processes may be any: they are counted from here.
TORCH = 100
Events = list[dict[str, Any]]


@dataclass(frozen=True)
class TracedSteps:
    """Steps under torch.profiler: our stages of them, and torch's events on a clock of its own."""

    timeline: Timeline
    events: Events


def read_torch_trace(path: Path) -> Events:
    """The events of a file that torch.profiler exported."""
    with path.open(encoding="utf-8") as file:
        events: Events = json.load(file)["traceEvents"]
    return events


def build_trace(stretches: dict[str, Timeline], traced: TracedSteps | None, images: int) -> dict[str, Any]:
    """The whole trace.

    Args:
        stretches: by the name of their process.
        traced: what torch.profiler recorded beside our stages.
        images: a step, for the rate.
    """
    everything = [*stretches.values(), *([traced.timeline] if traced else [])]
    origin = min(timeline.marks[0] for timeline in everything)
    events: Events = []
    for number, (name, timeline) in enumerate(stretches.items(), start=1):
        events += _stretch(timeline, number, name, origin, images)
    if traced is not None:
        number = len(stretches) + 1
        events += _stretch(traced.timeline, number, "under torch.profiler (slower)", origin, images)
        events += _torch(traced, origin)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_trace(trace: dict[str, Any], file: IO[bytes]) -> None:
    """Write it, compressed."""
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as compressed:
        compressed.write(json.dumps(trace, allow_nan=False).encode())


def _stretch(timeline: Timeline, process: int, name: str, origin: float, images: int) -> Events:
    tracks = [STEPS_TRACK, PATH_TRACK, *timeline.tracks]
    events = [_named("process_name", process, 0, name), _sorted("process_sort_index", process, 0, process)]
    for number, track in enumerate(tracks):
        events += [_named("thread_name", process, number, track), _sorted("thread_sort_index", process, number, number)]
    for number, (start, end) in enumerate(pairwise(timeline.marks), start=1):
        events.append(_event(f"step {number}", process, 0, start - origin, end - start))
        rate = {"name": "images/s", "ph": "C", "pid": process, "tid": 0, "ts": 1e6 * (start - origin)}
        events.append({**rate, "args": {"images/s": images / (end - start)}})
    of_track = {track: number for number, track in enumerate(tracks)}
    events += [_event(span.stage, process, 1, span.start - origin, span.seconds) for span in timeline.path]
    for span in timeline.spans:
        event = _event(span.stage, process, of_track[span.track], span.start - origin, span.seconds)
        if span.launched is not None:
            event["args"] = {"queued ms before": 1e3 * (span.start - span.launched[0])}
        events.append(event)
    return events


def _torch(traced: TracedSteps, origin: float) -> Events:
    """torch's events, moved to our clock by the first stage that both have."""
    spans = [span for span in traced.timeline.spans if span.track == HOST_TRACK]
    stages = {span.stage for span in spans}
    marked = [e for e in traced.events if e.get("cat") == "user_annotation" and e.get("name") in stages]
    if not spans or not marked:
        return []
    first = min(marked, key=lambda event: float(event["ts"]))
    ours = min(span.start for span in spans if span.stage == first["name"])
    shift = 1e6 * (ours - origin) - float(first["ts"])
    numbers: dict[Any, int] = {}
    events = []
    for event in traced.events:
        if event.get("ph") not in ("X", "M", "s", "t", "f", "i"):
            continue
        moved = {**event, "pid": numbers.setdefault(event.get("pid"), TORCH + len(numbers))}
        if event["ph"] == "M" and event.get("name") == "process_name":
            moved["args"] = {"name": f"torch.profiler: {event['args'].get('name', '')}"}
        if "ts" in event:
            moved["ts"] = float(event["ts"]) + shift if event["ph"] != "M" else 0.0
        events.append(moved)
    return events


def _event(name: str, process: int, track: int, start: float, seconds: float) -> dict[str, Any]:
    times = {"ts": round(1e6 * start, 3), "dur": round(1e6 * max(seconds, 0.0), 3)}
    return {"name": name, "cat": "mvp_fast", "ph": "X", "pid": process, "tid": track, **times}


def _named(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def _sorted(kind: str, process: int, track: int, index: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"sort_index": index}}
