"""The recorder: on the host; on a device made up here, with streams that run on after the host has left; on a GPU."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_fast.loaders.prefetch import THREAD
from mvp_fast.train.profile.recorder import Recorder
from mvp_fast.train.profile.timeline import HOST_TRACK, LOADER_TRACK, MAIN_STREAM
from tests.conftest import TINY, arguments, run_verb
from tests.test_profile_trace import check_trace, tracks

CUDA = torch.device("cuda", 0)


class MadeUpGpu:
    """A clock that only moves when told, and streams that are busy until some time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.busy, self.current, self.capturing = 100.0, {1: 0.0, 2: 0.0}, 1, False
        gpu = self

        class Stream:
            def __init__(self, number: int) -> None:
                self.cuda_stream = number

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self, stream: Stream) -> None:
                assert not gpu.capturing
                self.at = max(gpu.now, gpu.busy[stream.cuda_stream])

            def query(self) -> bool:
                return self.at <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.current))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda device: self.host(max(0, *self.busy.values(), 0) - self.now)
        )

    def host(self, seconds: float) -> None:
        """The host works."""
        self.now += max(seconds, 0.0)

    def queue(self, seconds: float) -> None:
        """The current stream gets work."""
        self.busy[self.current] = max(self.now, self.busy[self.current]) + seconds


def test_times_on_a_device_are_those_of_its_streams_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu(monkeypatch)
    recorder = Recorder(CUDA)
    gpu.queue(1.0)
    recorder.begin()  # waits for that
    recorder.mark()
    gpu.current = 2
    with recorder("teacher"):
        gpu.host(0.1)
        gpu.queue(3.0)
    gpu.current = 1
    with recorder("student forward"):
        gpu.host(0.1)
        gpu.queue(2.0)
    with recorder("backward"):
        gpu.host(0.1)
        gpu.queue(4.0)
    recorder.mark()
    timeline = recorder.finish()
    assert gpu.now == pytest.approx(107.2)
    device = {span.stage: (span.start - 101, span.end - 101) for span in timeline.spans if span.launched is not None}
    assert device["teacher"] == pytest.approx((0.0, 3.1))  # from when it was entered
    assert device["student forward"] == pytest.approx((0.1, 2.2))
    assert device["backward"] == pytest.approx((2.2, 6.2))  # queued at 0.2, behind the forward pass
    host = {span.stage: (span.start - 101, span.end - 101) for span in timeline.spans if span.track == HOST_TRACK}
    assert host["backward"] == pytest.approx((0.2, 0.3))
    assert timeline.tracks == [HOST_TRACK, MAIN_STREAM, "GPU stream 2 (teacher)"]
    assert timeline.main == MAIN_STREAM
    assert timeline.step_seconds == pytest.approx([6.2])
    assert timeline.critical == pytest.approx({"host": 0.1, "student forward": 2.1, "backward": 4.0})
    assert timeline.busy["teacher"] == pytest.approx(3.1)


def test_what_is_captured_into_a_graph_has_no_times_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu(monkeypatch)
    recorder = Recorder(CUDA)
    recorder.begin()
    recorder.mark()
    gpu.capturing = True
    with recorder("teacher"):
        gpu.host(0.1)
    gpu.capturing = False
    recorder.mark()
    assert [span.track for span in recorder.finish().spans] == [HOST_TRACK]


def test_threads_are_tracks_and_begin_forgets() -> None:
    recorder = Recorder(torch.device("cpu"))

    def work() -> None:
        with recorder("load"):
            pass

    with recorder("teacher"):
        pass
    recorder.begin()
    recorder.mark()
    thread = threading.Thread(target=work, name=THREAD)
    with recorder("data wait"):
        thread.start()
        thread.join()
    recorder.mark()
    timeline = recorder.finish()
    assert [(span.stage, span.track) for span in timeline.spans] == [("data wait", HOST_TRACK), ("load", LOADER_TRACK)]
    assert timeline.steps == 1
    outer, inner = timeline.spans
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert set(timeline.critical) == {"data wait", "host"}


def test_a_stage_that_raises_is_recorded_and_lets_the_error_through() -> None:
    recorder = Recorder(torch.device("cpu"))
    recorder.begin()
    recorder.mark()
    with pytest.raises(StopIteration), recorder("data wait"):
        next(iter(()))
    recorder.mark()
    assert [span.stage for span in recorder.finish().spans] == ["data wait"]


@pytest.mark.gpu
def test_overlapping_streams_on_a_gpu() -> None:
    recorder, side = Recorder(CUDA), torch.cuda.Stream(CUDA)
    torch.cuda._sleep(1000)
    recorder.begin()
    recorder.mark()
    with torch.cuda.stream(side), recorder("teacher"):
        torch.cuda._sleep(100_000_000)
    with recorder("backward"):
        torch.cuda._sleep(200_000_000)
    recorder.mark()
    timeline = recorder.finish()
    spans = {(span.stage, span.track == HOST_TRACK): span for span in timeline.spans}
    teacher, backward = spans["teacher", False], spans["backward", False]
    assert teacher.track == "GPU stream 2 (teacher)"
    assert backward.start < teacher.end < backward.end
    assert spans["backward", True].seconds < backward.seconds  # the host did not wait
    assert sum(timeline.critical.values()) == pytest.approx(timeline.seconds)
    assert "teacher" not in timeline.critical


@pytest.mark.gpu
def test_a_profile_on_a_gpu(scenes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TINY, "data.index": scenes, "run.dir": tmp_path / "run", "train.device": "cuda"}
    done = run_verb("train", "--profile", 4, *arguments(settings))
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"memory.pickle", "report.html", "stages.json", "trace.json.gz"}
    numbers = json.loads((folder / "stages.json").read_text())
    critical = sum(stage["critical_milliseconds"] for stage in numbers["stages"].values())
    assert critical == pytest.approx(numbers["step_milliseconds"], rel=0.03)
    assert numbers["measured"]["memory"]["peak"] >= numbers["measured"]["memory"]["student weights"]
    assert numbers["measured"]["rates"]["upload"] > 0
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    check_trace(trace)
    assert MAIN_STREAM in tracks(trace, 1)
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert "TFLOP/s" in done.stdout
