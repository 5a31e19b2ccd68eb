"""The report: it holds what it should, needs nothing but itself, and opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvp_fast.train.profile.charts import Line, class_of, rate_chart, ticks
from mvp_fast.train.profile.numbers import RankNumbers
from mvp_fast.train.profile.page import page
from mvp_fast.train.profile.page_style import STAGE_COLOURS, style
from mvp_fast.train.profile.verdict import judge
from mvp_fast.train.stages import STAGES
from tests.profile_cases import gpu_timeline, numbers, stretch

PARTS = ("timeline", "stages", "rate", "roofline")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,2600"),
)
VOID = {"meta", "line", "rect", "circle", "path", "br", "i"}


def report(world: int = 1) -> str:
    timeline = gpu_timeline(6)
    real = stretch(timeline.critical, 6, busy=timeline.busy)
    ranks = [RankNumbers(rank, 100.0, 0.05 + 0.01 * rank, 0.0) for rank in range(world)]
    made = numbers(real, replace(real, steps=[0.08] * 6), ranks=ranks, world=world, device_name="<GPU & more>")
    return page(made, judge(made), timeline, gpu_timeline(6))


class Outline(HTMLParser):
    """Which tags are open where; fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pictures: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id")
        if name:
            self.ids.append(name)
        if tag == "svg":
            self.pictures[self.ids[-1]] = self.pictures.get(self.ids[-1], 0) + 1
        if tag not in VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID or tag == "path":
            assert self.open.pop() == tag


def test_the_page_has_its_parts_and_is_well_formed() -> None:
    outline = Outline()
    outline.feed(report())
    assert outline.open == []
    assert [name for name in outline.ids if name in PARTS] == list(PARTS)
    assert outline.ids[0] == "verdict"
    assert outline.pictures == {"timeline": 3, "rate": 1, "roofline": 1}


def test_the_page_needs_nothing_but_itself() -> None:
    text = report()
    assert not re.search(r"https?:|//|@import|url\(|<link|\bsrc=|<img|<iframe", re.sub(r"image/svg", "", text))
    assert "&lt;GPU &amp; more&gt;" in text
    assert "<GPU" not in text


def test_every_stage_has_a_colour_of_its_own_in_both_themes() -> None:
    assert set(STAGE_COLOURS) == set(STAGES)
    for theme in (0, 1):
        assert len({colours[theme] for colours in STAGE_COLOURS.values()}) == len(STAGES)
    text = style()
    for stage in STAGES:
        assert f".{class_of(stage)}{{" in text


def test_several_ranks_have_a_table_that_names_the_slowest() -> None:
    text = report(world=4)
    assert '<section id="ranks">' in text
    assert "3 (slowest)" in text
    assert '<section id="ranks">' not in report()


def test_a_steps_rate_stands_where_and_as_long_as_the_step() -> None:
    picture = rate_chart([Line("a", [(1.0, 100.0), (4.0, 50.0)], "real")])
    found = re.search(r'd="M([\d.]+) ([\d.]+)H([\d.]+)L([\d.]+) ([\d.]+)H([\d.]+)"', picture)
    assert found
    x0, y0, x1, x2, y1, x3 = map(float, found.groups())
    assert x2 == x1
    assert (x3 - x2) / (x1 - x0) == pytest.approx(3, rel=0.01)
    zero = 250.0
    assert (zero - y0) / (zero - y1) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.037), (0.0, 12345.0), (0.0, 9.99)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert low <= found[0]
    assert found[-1] <= high
    assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in found)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: .ci/browser installs it")
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    assert BROWSER is not None
    file = tmp_path / "report.html"
    file.write_text(report(world=2))

    def browser(*words: str, profile: str) -> str:
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / profile}", *words, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        return done.stdout

    dom = browser("--dump-dom", profile="dom")
    assert 'data-ready="yes"' in dom  # the script came to its end
    for part in PARTS:
        assert f'<section id="{part}">' in dom
    assert dom.count("data-tip=") > 50
    assert "<title>" not in dom.partition("</head>")[2]  # moved into the tips
    picture = tmp_path / "report.png"
    browser(f"--screenshot={picture}", profile="shot")
    with Image.open(picture) as image:
        pixels_HWC = np.asarray(image.convert("RGB"))
    assert pixels_HWC.shape == (2600, 1280, 3)
    shown = {tuple(int(value) for value in pixel) for pixel in np.unique(pixels_HWC.reshape(-1, 3), axis=0)}
    for stage in ("student forward", "backward", "teacher", "optimizer"):
        light, dark = (tuple(bytes.fromhex(colour[1:])) for colour in STAGE_COLOURS[stage])  # type: ignore[index]
        assert light in shown or dark in shown
