"""Drawing: maps over images, and sheets of them with captions.

Shape legend: H and W pixels, Y and X patches down and across, C colours.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mvp_fast.samples.files import replacing

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

TILE = 224
"""About the side of a tile, pixels: the nearest multiple of the grid, so that patches have sharp edges."""
MARGIN, GAP, NOTE = 16, 8, 17
INK, FAINT, PAPER = (24, 24, 28), (100, 100, 108), (255, 255, 255)
LAY_OVER = 0.75
"""Share of the map's colour in a tile; the rest is the image in grey."""

# matplotlib's colour maps of these names (CC0), every tenth of the way.
COLOUR_MAPS: dict[str, tuple[Colour, ...]] = {
    "viridis": (
        *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
        *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
    ),
    "inferno": (
        *((0, 0, 4), (22, 11, 57), (66, 10, 104), (106, 23, 110), (147, 38, 103), (188, 55, 84)),
        *((221, 81, 58), (243, 120, 25), (252, 165, 10), (246, 215, 70), (252, 255, 164)),
    ),
}
# Okabe and Ito's colours for those who see few.
LABELS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167)),
    *((240, 228, 66), (0, 114, 178)),
)


@dataclass(frozen=True)
class Tile:
    """A picture (H, W, 3) with a line under it."""

    picture: Picture
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """What the colours of a sheet's maps mean: `low` to `high` along a colour map."""

    name: str
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Sheet:
    """A grid of tiles.

    Attributes:
        title: first line.
        about: second line.
        columns: heads.
        rows: tiles, as many in each as columns.
        scale: drawn where all maps share one.
        labels: colours and what they stand for.
    """

    title: str
    about: str
    columns: list[str]
    rows: list[list[Tile]]
    scale: Scale | None = None
    labels: list[tuple[Colour, str]] = field(default_factory=list)


def tile_side(grid: tuple[int, int]) -> int:
    """Pixels: the multiple of the grid nearest to TILE."""
    return grid[0] * max(round(TILE / grid[0]), 1)


def colour(value: npt.NDArray[np.floating], name: str) -> Picture:
    """Values in [0, 1] to colours of a map: uint8 (..., 3)."""
    table = np.array(COLOUR_MAPS[name], dtype=np.float64)
    place = np.clip(np.nan_to_num(value), 0, 1) * (len(table) - 1)
    knots = np.arange(len(table))
    channels = [np.interp(place, knots, table[:, channel]) for channel in range(3)]
    colours: Picture = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


def label_colour(number: int) -> Colour:
    """The colour of a label; those past the table go round the hues by the golden ratio."""
    if number < len(LABELS):
        return LABELS[number]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarge(image_HWC: Picture, side: int) -> Picture:
    """An image at the side of a tile."""
    if image_HWC.shape[:2] == (side, side):
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((side, side), Image.Resampling.LANCZOS))


def cells(colour_YXC: Picture, side: int) -> Picture:
    """A colour a patch as sharp squares: (side, side, 3)."""
    rows, columns = colour_YXC.shape[:2]
    return colour_YXC.repeat(side // rows, axis=0).repeat(side // columns, axis=1)


def lay_over(tile_HWC: Picture, colour_YXC: Picture) -> Picture:
    """Colours of the patches over the image in grey."""
    grey_HW1 = tile_HWC.astype(np.float64) @ np.array([[0.299], [0.587], [0.114]])
    over_HWC = LAY_OVER * cells(colour_YXC, len(tile_HWC)) + (1 - LAY_OVER) * grey_HW1
    over: Picture = np.rint(over_HWC).astype(np.uint8)
    return over


def mark(tile_HWC: Picture, row: int, column: int, grid: tuple[int, int]) -> Picture:
    """The tile with a frame around one patch, white within black: visible on any ground."""
    side = len(tile_HWC) // grid[0]
    picture = Image.fromarray(tile_HWC)
    draw, x, y = ImageDraw.Draw(picture), column * side, row * side
    draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=(0, 0, 0), width=2)
    draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(255, 255, 255), width=2)
    return np.asarray(picture)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The sheet as a picture."""
    side = len(sheet.rows[0][0].picture)
    width = 2 * MARGIN + len(sheet.columns) * (side + GAP) - GAP
    heads = [_wrap(head, side, _font(14), 3) for head in sheet.columns]
    legend = _rows_of_labels(sheet.labels, width - 2 * MARGIN)
    title, about = (
        _wrap(text, width - 2 * MARGIN, _font(size), 3) for text, size in ((sheet.title, 20), (sheet.about, 13))
    )
    top = MARGIN + 26 * len(title) + 18 * len(about) + 8
    scale_top, top = top, top + (40 if sheet.scale else 0)
    legend_top, top = top, top + 24 * len(legend) + (4 if legend else 0)
    head_top, top = top, top + 18 * max(map(len, heads)) + 4
    height = top + len(sheet.rows) * (side + NOTE + GAP) - GAP + MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    _lines(draw, MARGIN, MARGIN, title, 20, 26, INK)
    _lines(draw, MARGIN, MARGIN + 26 * len(title), about, 13, 18, FAINT)
    if sheet.scale:
        _draw_scale(picture, draw, sheet.scale, scale_top, min(width - 2 * MARGIN, 320))
    for number, line in enumerate(legend):
        _draw_labels(draw, line, legend_top + 24 * number)
    tallest = max(map(len, heads))
    for column, head in enumerate(heads):
        x = MARGIN + column * (side + GAP)
        _lines(draw, x, head_top + 18 * (tallest - len(head)), head, 14, 18, INK)
        for row, tiles in enumerate(sheet.rows):
            y = top + row * (side + NOTE + GAP)
            picture.paste(Image.fromarray(tiles[column].picture), (x, y))
            note = _end(tiles[column].note, side, _font(12))
            draw.text((x, y + side + 2), note, fill=FAINT, font=_font(12))
    return picture


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG: beside its place, then renamed.

    Raises:
        EnvironmentProblem: it can't be written.
    """
    with replacing(path) as file:
        picture.save(file, format="PNG")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], size: int, pitch: int, ink: Colour) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + pitch * number), line, fill=ink, font=_font(size))


def _wrap(text: str, width: int, font: Any, most: int) -> list[str]:
    """Text in lines that fit; the last ends in an ellipsis where there is more."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [_start(line, width, font) for line in lines]


def _start(text: str, width: int, font: Any) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


def _end(text: str, width: int, font: Any) -> str:
    """The end of a text that does not fit: names differ at their ends."""
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text


def _draw_scale(picture: Image.Image, draw: ImageDraw.ImageDraw, scale: Scale, top: int, width: int) -> None:
    strip = np.broadcast_to(colour(np.linspace(0, 1, width), scale.name), (12, width, 3))
    picture.paste(Image.fromarray(np.ascontiguousarray(strip)), (MARGIN, top))
    font, below = _font(12), top + 14
    low, high = f"{scale.low:.3g}", f"{scale.high:.3g}"
    draw.text((MARGIN, below), low, fill=INK, font=font)
    draw.text((MARGIN + width, below), high, fill=INK, font=font, anchor="ra")
    room = width - 16 - font.getlength(low) - font.getlength(high)
    draw.text((MARGIN + width / 2, below), _start(scale.words, int(room), font), fill=FAINT, font=font, anchor="ma")


def _rows_of_labels(labels: Sequence[tuple[Colour, str]], width: int) -> list[list[tuple[int, Colour, str]]]:
    """Labels with where each begins, in lines that fit."""
    lines: list[list[tuple[int, Colour, str]]] = []
    x = width + 1
    for ink, words in labels:
        words = _start(words, width - 24, _font(14))
        length = 24 + int(_font(14).getlength(words)) + 18
        if x + length - 18 > width:
            lines.append([])
            x = 0
        lines[-1].append((x, ink, words))
        x += length
    return lines


def _draw_labels(draw: ImageDraw.ImageDraw, line: list[tuple[int, Colour, str]], top: int) -> None:
    for x, ink, words in line:
        draw.rectangle((MARGIN + x, top + 1, MARGIN + x + 15, top + 16), fill=ink)
        draw.text((MARGIN + x + 22, top), words, fill=INK, font=_font(14))
