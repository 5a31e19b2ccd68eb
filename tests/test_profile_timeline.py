"""What a timeline says: time is counted once, the critical path has no hole, and waiting is booked where it belongs."""

from __future__ import annotations

import itertools
import random

import pytest

from mvp_fast.train.profile.timeline import HOST_TRACK, MAIN_STREAM, Span, Timeline, innermost, quantile
from tests.profile_cases import gpu_timeline


def nested(generator: random.Random, start: int, end: int, depth: int = 0) -> list[tuple[int, int]]:
    """Random spans that nest, some of them empty, some touching; the outer ones first."""
    found, at = [], start
    while at < end:
        begin = generator.randint(at, end)
        stop = generator.randint(begin, end)
        if begin == stop and generator.random() < 0.5:
            at = begin + 1
            continue
        found.append((begin, stop))
        if depth < 3 and generator.random() < 0.6:
            found += nested(generator, begin, stop, depth + 1)
        at = stop + generator.randint(0, 3)
        if begin == stop:
            at += 1
    return found


def owners(spans: list[tuple[int, int]], start: int, end: int) -> list[int | None]:
    """The reference: for each unit of time, the last of the spans that hold it, which is the innermost."""
    return [
        next((number for number, (begin, stop) in reversed(list(enumerate(spans))) if begin <= unit < stop), None)
        for unit in range(start, end)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_time_is_the_innermost_stages(seed: int) -> None:
    spans = nested(random.Random(seed), 0, 60)
    given = [Span(str(number), HOST_TRACK, float(a), float(b)) for number, (a, b) in enumerate(spans)]
    pieces = innermost(given)
    assert all(before.end <= after.start for before, after in itertools.pairwise(pieces))
    expected = owners(spans, 0, 60)
    for unit, owner in enumerate(expected):
        inside = [piece for piece in pieces if piece.start <= unit and piece.end >= unit + 1]
        # Spans with the same ends may change places: what counts is where the time goes.
        assert [spans[int(piece.stage)] for piece in inside] == ([] if owner is None else [spans[owner]])


@pytest.mark.parametrize("seed", range(20))
def test_on_a_cpu_what_lies_between_stages_is_host(seed: int) -> None:
    spans = nested(random.Random(seed), 0, 60)
    given = tuple(Span(str(number), HOST_TRACK, float(a), float(b)) for number, (a, b) in enumerate(spans))
    timeline = Timeline(given, (10.0, 30.0, 50.0), HOST_TRACK)
    path, between = timeline.path, owners(spans, 0, 60)[10:50].count(None)
    assert path[0].start == 10
    assert path[-1].end == 50
    assert all(before.end == after.start for before, after in itertools.pairwise(path))
    assert timeline.critical.get("host", 0.0) == between / 2
    assert sum(timeline.critical.values()) == 20
    assert timeline.step_seconds == [20, 20]


def test_on_a_gpu_a_hole_belongs_to_what_the_device_waited_for() -> None:
    timeline = gpu_timeline()
    milliseconds = {stage: 1e3 * seconds for stage, seconds in timeline.critical.items()}
    assert milliseconds == pytest.approx(
        {
            "data wait": 2,  # until the host had the batch
            "copy": 2,  # until the device had it
            "teacher": 6,  # between the batch and the student: on its own stream
            "student forward": 30,
            "loss": 2,
            "backward": 48,
            "optimizer": 6,
            "host": 4,  # two holes in which nothing ran anywhere
        }
    )
    assert sum(milliseconds.values()) == pytest.approx(100)


def test_busy_time_is_that_of_the_device_and_holds_what_is_hidden() -> None:
    busy = {stage: 1e3 * seconds for stage, seconds in gpu_timeline().busy.items()}
    assert busy["teacher"] == pytest.approx(9)  # 6 of them on the critical path
    assert busy["backward"] == pytest.approx(48)  # and not the 10 in which the host queued it
    assert busy["load"] == pytest.approx(55)  # on the host alone
    assert busy["copy"] == pytest.approx(3)


def test_a_stage_for_whose_launches_the_device_waits_is_the_hosts() -> None:
    """Queued at 5, while the device was idle from 4: it waits for the host, whatever else runs."""
    spans = (
        Span("loss", MAIN_STREAM, 0.0, 4.0, (0.0, 0.1)),
        Span("teacher", "GPU stream 2 (teacher)", 0.0, 9.0, (0.0, 0.1)),
        Span("backward", MAIN_STREAM, 8.0, 10.0, (5.0, 6.0)),
    )
    timeline = Timeline(spans, (0.0, 10.0), MAIN_STREAM)
    assert timeline.critical == pytest.approx({"loss": 4, "host": 1, "teacher": 3, "backward": 2})


def test_launch_bound_stages_are_told_from_busy_ones() -> None:
    fast = Span("loss", MAIN_STREAM, 0.00001, 1.00001, (0.0, 1.0))  # begins and ends as the host says
    busy = Span("backward", MAIN_STREAM, 1.00002, 3.0, (1.0, 1.1))  # the host was through long before
    behind = Span("optimizer", MAIN_STREAM, 3.0, 3.5, (1.1, 3.49999))  # begins long after it was queued
    timeline = Timeline((fast, busy, behind), (0.0, 2.0, 4.0), MAIN_STREAM)
    assert timeline.host_bound == pytest.approx(1.0 / 2)


def test_steps_are_cut_out_of_what_crosses_them() -> None:
    spans = (Span("teacher", HOST_TRACK, 0.5, 2.5),)
    timeline = Timeline(spans, (0.0, 1.0, 2.0, 3.0), HOST_TRACK)
    assert [(span.start, span.end) for span in timeline.within(1)] == [(1.0, 2.0)]
    assert timeline.critical == pytest.approx({"teacher": 2 / 3, "host": 1 / 3})


def test_quantiles() -> None:
    assert [quantile([4.0, 1.0, 3.0, 2.0], share) for share in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert quantile([7.0], 0.95) == 7.0
