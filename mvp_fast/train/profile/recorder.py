"""A `StageRecorder` that writes down when each stage began and ended: on the host, and on the stream it was queued to.

A stage that is entered on a GPU records a CUDA event on the current stream when it is entered and when it is left, so
that work on a side stream is booked on that stream, at the time at which the device did it. Events are read once all is
over: recording makes nobody wait. The host's clock is `time.perf_counter`; the device's times are told on it, from one
event that both saw (`Recorder.begin`).
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from mvp_fast.loaders.prefetch import THREAD
from mvp_fast.train.profile.timeline import HOST_TRACK, LOADER_TRACK, MAIN_STREAM, Span, Timeline
from mvp_fast.train.stages import Stage

# What threads are called in a report; others keep their own names.
_THREADS = {threading.main_thread().name: HOST_TRACK, THREAD: LOADER_TRACK}


class _Record:
    """One stage, once: a context manager that notes when."""

    __slots__ = ("_annotation", "_recorder", "end", "events", "stage", "start", "stream", "thread")

    def __init__(self, recorder: Recorder, stage: Stage) -> None:
        self._recorder, self.stage = recorder, stage
        self.thread = threading.current_thread().name
        self.start = self.end = 0.0
        self.stream = 0
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._annotation: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        if self._recorder.annotate:
            self._annotation = torch.profiler.record_function(self.stage)
            self._annotation.__enter__()
        self.start = time.perf_counter()
        # What is captured into a graph does not run now, and an event in it could not be read.
        if self._recorder.on_gpu and not torch.cuda.is_current_stream_capturing():
            self.stream = torch.cuda.current_stream(self._recorder.device).cuda_stream
            self.events = (self._recorder.event(), torch.cuda.Event(enable_timing=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.events is not None:
            self.events[1].record(torch.cuda.current_stream(self._recorder.device))
        self.end = time.perf_counter()
        if self._annotation is not None:
            self._annotation.__exit__(kind, error, trace)
        self._recorder.records.append(self)  # of several threads: append is atomic


class Recorder:
    """Records stages from `begin` to `finish`; `mark` says where a step begins and the one before ends.

    Args:
        device: the run's.

    Attributes:
        annotate: also name each stage to torch.profiler.
        on_gpu: whether stages have times on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu, self.annotate = device, device.type == "cuda", False
        self.records: list[_Record] = []
        self._marks: list[tuple[float, torch.cuda.Event | None]] = []
        self._anchor: tuple[float, torch.cuda.Event | None] = (0.0, None)
        self._main_stream = 0

    def __call__(self, stage: Stage) -> AbstractContextManager[None]:
        return _Record(self, stage)

    def event(self) -> torch.cuda.Event:
        """An event recorded now, on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def begin(self) -> None:
        """Forget what was recorded, and wait for the device: measure from some steps later, when it is busy again."""
        event = None
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            self._main_stream = torch.cuda.current_stream(self.device).cuda_stream
            event = self.event()
            event.synchronize()
        self._anchor = (time.perf_counter(), event)
        self.records, self._marks = [], []

    def mark(self) -> None:
        """A step begins, and the one before ends."""
        self._marks.append((time.perf_counter(), self.event() if self.on_gpu else None))

    def finish(self) -> Timeline:
        """What was recorded since `begin`, once the device has done all of it. Other threads may go on recording."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        records = list(self.records)
        streams = self._stream_names(records)
        spans = []
        for record in records:
            track = _THREADS.get(record.thread, record.thread)
            spans.append(Span(record.stage, track, record.start, record.end))
            # Of a stage that another thread has just left, the device may not be done yet.
            if record.events is not None and record.events[1].query():
                start, end = map(self._on_host_clock, record.events)
                launched = (record.start, record.end)
                spans.append(Span(record.stage, streams[record.stream], start, end, launched))
        marks = tuple(host if event is None else self._on_host_clock(event) for host, event in self._marks)
        spans.sort(key=lambda span: (span.start, -span.end))
        main = MAIN_STREAM if self.on_gpu else HOST_TRACK
        return Timeline(tuple(spans), marks, main)

    def _on_host_clock(self, event: torch.cuda.Event) -> float:
        host, anchor = self._anchor
        assert anchor is not None
        return host + float(anchor.elapsed_time(event)) / 1e3

    def _stream_names(self, records: list[_Record]) -> dict[int, str]:
        """The main stream is the one on which `begin` was called; the others are named after what runs on them."""
        seen: dict[int, list[str]] = {}
        for record in records:
            if record.events is not None and record.stage not in seen.setdefault(record.stream, []):
                seen[record.stream].append(record.stage)
        names, number = {self._main_stream: MAIN_STREAM}, 1
        for stream, stages in seen.items():
            if stream not in names:
                number += 1
                names[stream] = f"GPU stream {number} ({', '.join(stages)})"
        return names
