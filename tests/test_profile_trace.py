"""The trace: valid Chrome trace events, the same times as the timeline, and torch's events moved onto our clock."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import pytest

from mvp_fast.train.profile.timeline import HOST_TRACK, Span, Timeline
from mvp_fast.train.profile.trace import TORCH, TracedSteps, build_trace, write_trace
from tests.profile_cases import gpu_timeline


def check_trace(trace: dict[str, Any]) -> None:
    """Each event has what the format asks of its kind, and each track that is used has a name."""
    json.loads(json.dumps(trace, allow_nan=False))
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert event["ph"] in {"X", "M", "C", "s", "t", "f", "i"}
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["ts"], float | int)
            if event["pid"] < TORCH:
                assert (event["pid"], event["tid"]) in named
                assert event["ts"] >= -1e6  # what began before the first mark may reach back a little


def tracks(trace: dict[str, Any], process: int) -> dict[str, list[dict[str, Any]]]:
    """A process's spans by the name of their track."""
    names = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name" and event["pid"] == process
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == process:
            found[names[event["tid"]]].append(event)
    return found


def test_every_thread_and_stream_is_a_track_with_its_stages() -> None:
    timeline = gpu_timeline()
    trace = build_trace({"own loader": timeline}, None, images=256)
    check_trace(trace)
    found = tracks(trace, 1)
    assert list(found) == ["steps", "critical path", *timeline.tracks]
    assert timeline.tracks[:2] == ["host thread", "GPU main stream"]
    assert [event["name"] for event in found["steps"]] == ["step 1", "step 2", "step 3"]
    for track in timeline.tracks:
        spans = [span for span in timeline.spans if span.track == track]
        assert [event["name"] for event in found[track]] == [span.stage for span in spans]
        assert [event["ts"] for event in found[track]] == pytest.approx([1e6 * span.start for span in spans], abs=1e-2)
    whole = sum(event["dur"] for event in found["critical path"])
    assert whole == pytest.approx(1e6 * timeline.seconds)
    rates = [event["args"]["images/s"] for event in trace["traceEvents"] if event["ph"] == "C"]
    assert rates == pytest.approx([2560.0] * 3)


def test_torchs_events_come_onto_our_clock_by_the_first_stage_that_both_have() -> None:
    stages = (Span("data wait", HOST_TRACK, 100.0, 100.1), Span("teacher", HOST_TRACK, 100.1, 100.5))
    ours = Timeline(stages, (100.0, 101.0), HOST_TRACK)
    theirs = [
        {"ph": "X", "cat": "user_annotation", "name": "data wait", "pid": 1, "tid": 1, "ts": 5e9, "dur": 1e5},
        {"ph": "X", "cat": "user_annotation", "name": "Optimizer.step", "pid": 1, "tid": 1, "ts": 4e9, "dur": 1e5},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 5e9 + 2e5, "dur": 3e5},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 5e9 + 3e5, "dur": 1e5},
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 5e9, "args": {"name": "python"}},
        {"ph": "?", "name": "of a kind that viewers do not know", "pid": 0, "tid": 0, "ts": 5e9},
    ]
    trace = build_trace({"own loader": gpu_timeline()}, TracedSteps(ours, theirs), images=8)
    check_trace(trace)
    torchs = {event["name"]: event for event in trace["traceEvents"] if event["pid"] >= TORCH}
    assert torchs["aten::mm"]["ts"] == pytest.approx(1e6 * 100.2)  # the axis begins with the first mark, 0
    assert torchs["gemm"]["pid"] != torchs["aten::mm"]["pid"]
    assert torchs["process_name"]["args"]["name"] == "torch.profiler: python"
    assert len(torchs) == 5
    assert list(tracks(trace, 2)) == ["steps", "critical path", "host thread"]


def test_a_file_is_the_same_json_compressed() -> None:
    trace = build_trace({"own loader": gpu_timeline(1)}, None, images=8)
    file = io.BytesIO()
    write_trace(trace, file)
    assert json.loads(gzip.decompress(file.getvalue())) == trace
