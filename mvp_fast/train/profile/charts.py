"""The report's pictures: SVG as text, with colours by CSS class, so that a page shows them light or dark.

Each figure's units are pixels at the page's full width. What a mark stands for is in its <title>, which browsers show
and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mvp_fast.train.profile.numbers import figure
from mvp_fast.train.profile.table import milliseconds
from mvp_fast.train.profile.timeline import Span, Timeline

WIDTH, GUTTER, RIGHT = 1060, 150, 16
ROW, GAP = 30, 8
LETTER = 6.4  # pixels of a letter at the labels' size, about


def class_of(stage: str) -> str:
    """The CSS class that colours a stage."""
    return "s-" + stage.replace(" ", "-")


def step_chart(timeline: Timeline, step: int) -> str:
    """One step (0-based): the critical path, and below it what ran on each track meanwhile."""
    start, end = timeline.marks[step : step + 2]
    rows = [("critical path", [span for span in timeline.path if span.end > start and span.start < end])]
    inside = timeline.within(step)
    rows += [(track, [span for span in inside if span.track == track]) for track in timeline.tracks]
    scale = (WIDTH - GUTTER - RIGHT) / (end - start)
    lanes: list[str] = []  # behind
    body: list[str] = []
    for number, (track, spans) in enumerate(rows):
        top = number * (ROW + GAP) + (10 if number else 0)
        emphasis = " strong" if number == 0 else ""
        body.append(f'<text class="label{emphasis}" x="{GUTTER - 12}" y="{top + ROW / 2 + 4}">{escape(track)}</text>')
        lanes.append(f'<rect class="lane" x="{GUTTER}" y="{top}" width="{WIDTH - GUTTER - RIGHT}" height="{ROW}"/>')
        ordered = sorted(spans, key=lambda span: (span.start, -span.end))
        body += [_bar(span, start, end, scale, top) for span in ordered]
    bottom = len(rows) * (ROW + GAP) + 10
    for tick in ticks(0.0, 1e3 * (end - start), 8):
        x = GUTTER + tick / 1e3 * scale
        lanes.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        lanes.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}">{tick:g} ms</text>')
    title = f"Step {step + 1}: {milliseconds(end - start)} ms"
    return svg(WIDTH, bottom + 24, title, lanes + body)


def _bar(span: Span, start: float, end: float, scale: float, top: float) -> str:
    left, right = max(span.start, start), min(span.end, end)
    x, width = GUTTER + (left - start) * scale, max((right - left) * scale, 0.6)
    told = f"{span.stage}, {milliseconds(span.seconds)} ms, on the {span.track}"
    bar = f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" rx="{min(3.0, width / 2):.1f}"/>'
    room = len(span.stage) * LETTER + 8 <= width
    word = (
        f'<text class="in" x="{x + width / 2:.1f}" y="{top + ROW / 2 + 4}">{escape(span.stage)}</text>' if room else ""
    )
    return f'<g class="bar {class_of(span.stage)}" tabindex="-1"><title>{escape(told)}</title>{bar}{word}</g>'


@dataclass(frozen=True)
class Line:
    """Images a second over time, one point a step.

    Attributes:
        points: seconds since the first step began, at its end; images a second.
        kind: the CSS class.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str


def rate_chart(lines: Sequence[Line]) -> str:
    """Images a second over time: each step as a level, from its beginning to its end."""
    height, top, left = 250, 12, 70
    longest = max(line.points[-1][0] for line in lines)
    most = 1.1 * max(rate for line in lines for _, rate in line.points)
    x_scale, y_scale = (WIDTH - left - 150) / longest, (height - top) / most
    body = []
    for tick in ticks(0.0, most, 5):
        y = height - tick * y_scale
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 150}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="label" x="{left - 10}" y="{y + 4:.1f}">{tick:,g}</text>')
    for tick in ticks(0.0, longest, 8):
        x = left + tick * x_scale
        body.append(f'<text class="tick" x="{x:.1f}" y="{height + 20}">{tick:g} s</text>')
    placed: list[float] = []
    for line in lines:
        path: list[str] = []
        before = 0.0
        for seconds, rate in line.points:
            y = height - rate * y_scale
            path.append(f"{'L' if path else 'M'}{left + before * x_scale:.1f} {y:.1f}H{left + seconds * x_scale:.1f}")
            before = seconds
        mean = len(line.points) / sum(1 / rate for _, rate in line.points)
        told = f"{line.name}: {figure(mean)} images/s over {len(line.points)} steps"
        body.append(f'<path class="line {line.kind}" d="{"".join(path)}"><title>{escape(told)}</title></path>')
        y = height - mean * y_scale
        while any(abs(y - other) < 30 for other in placed):
            y += 2
        placed.append(y)
        at = f'x="{WIDTH - 142}"'
        body.append(f'<text class="name {line.kind}" {at} y="{y:.1f}">{escape(line.name)}</text>')
        body.append(f'<text class="note" {at} y="{y + 14:.1f}">{figure(mean)} images/s</text>')
    return svg(WIDTH, height + 32, "Images a second over time", body)


@dataclass(frozen=True)
class Point:
    """A stage on the roofline.

    Attributes:
        intensity: operations a byte.
        rate: operations a second.
        stage: whose colour it has; empty for the whole step.
    """

    name: str
    intensity: float
    rate: float
    stage: str = ""


def roofline(points: Sequence[Point], matmul: dict[str, float], precision: str, copy: float) -> str:
    """Operations a second over operations a byte, both logarithmic, under the two measured ceilings.

    The roofline model: Williams, Waterman and Patterson, 2009 (doi 10.1145/1498765.1498785).
    """
    height, top, left = 372, 28, 80
    ridge = matmul[precision] / copy
    low_x = 10 ** math.floor(math.log10(min([point.intensity for point in points] + [ridge]) / 2))
    high_x = 10 ** math.ceil(math.log10(max([point.intensity for point in points] + [ridge]) * 2))
    highest = max([*matmul.values(), *(point.rate for point in points)])
    low_y = 10 ** math.floor(math.log10(min([point.rate for point in points] + [copy * low_x]) / 1.2))
    high_y = 10 ** math.ceil(math.log10(highest * 1.2))
    wide, tall = WIDTH - left - RIGHT, height - top

    def x_of(value: float) -> float:
        return left + wide * math.log(value / low_x) / math.log(high_x / low_x)

    def y_of(value: float) -> float:
        return height - tall * math.log(value / low_y) / math.log(high_y / low_y)

    body = []
    for power in range(round(math.log10(low_x)), round(math.log10(high_x)) + 1):
        x = x_of(10.0**power)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height + 18}">{10.0**power:g}</text>')
    for power in range(round(math.log10(low_y)), round(math.log10(high_y)) + 1):
        y = y_of(10.0**power)
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="label" x="{left - 10}" y="{y + 4:.1f}">{10.0**power / 1e12:,g}</text>')
    for name, rate in matmul.items():
        kind = "roof" if name == precision else "roof other"
        begin = max(rate / copy, low_x)
        bends = f"M{x_of(low_x):.1f} {y_of(copy * low_x):.1f}L{x_of(begin):.1f} {y_of(copy * begin):.1f}"
        told = f"matrix product in {name}: {figure(rate / 1e12)} TFLOP/s; copy: {figure(copy / 1e9)} GB/s"
        body.append(f'<path class="{kind}" d="{bends}H{WIDTH - RIGHT}"><title>{escape(told)}</title></path>')
        at = f'x="{WIDTH - RIGHT - 4}" y="{y_of(rate) - 7:.1f}"'
        body.append(f'<text class="rooftop" {at}>matmul {name}, {figure(rate / 1e12)} TFLOP/s</text>')
    slope = math.degrees(math.atan2(y_of(copy * low_x) - y_of(matmul[precision]), x_of(ridge) - x_of(low_x)))
    middle = math.sqrt(low_x * ridge)
    x, y = x_of(middle), y_of(copy * middle) - 8
    turned = f'transform="rotate({-slope:.1f} {x:.1f} {y:.1f})"'
    body.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" {turned}>copy, {figure(copy / 1e9)} GB/s</text>')
    body += _points(points, x_of, y_of)
    body.append(f'<text class="note" x="{left}" y="{height + 38}">operations a byte</text>')
    body.append(f'<text class="note" x="{left - 46}" y="11">TFLOP/s</text>')
    return svg(WIDTH, height + 44, "Roofline: reached rate over operations a byte", body)


def _points(points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    body: list[str] = []
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: -point.rate):
        x, y = x_of(point.intensity), y_of(point.rate)
        text = y + 4
        while any(abs(text - other) < 15 and abs(x - at) < 130 for at, other in placed):
            text += 3
        placed.append((x, text))
        told = f"{point.name}: {figure(point.rate / 1e12)} TFLOP/s at {figure(point.intensity)} operations a byte"
        kind = class_of(point.stage) if point.stage else "whole"
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if point.stage else 8}"/>'
        word = f'<text class="dot" x="{x + 13:.1f}" y="{text:.1f}">{escape(point.name)}</text>'
        body.append(f'<g class="bar {kind}"><title>{escape(told)}</title>{dot}{word}</g>')
    return body


def svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """A figure that fills the page's width."""
    frame = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return frame + "".join(body) + "</svg>"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, `about` as many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, int(high / step + 1e-9) + 1)]
