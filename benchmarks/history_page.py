"""The history as pictures: a PNG a benchmark, and a page that holds all of them with the figures beside.

The page needs nothing but itself: its pictures are SVG, written into it, and follow the reader's light or dark theme.
PNG files are light.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.style import context
from matplotlib.ticker import FuncFormatter

from mvp_fast.samples.files import replacing

if TYPE_CHECKING:
    from history import Graph, Line, Machine, Point

from history import MARKED_FROM, number

# Light, and dark. Lines: Okabe and Ito's hues, which the colour-blind can tell apart.
INKS = {
    "ground": ("#fffffe", "#16191d"),
    "ink": ("#1f2328", "#e6e8eb"),
    "faint": ("#d8dcdf", "#363c43"),
    "line-0": ("#0072b2", "#56b4e9"),
    "line-1": ("#c04f00", "#ff9d5c"),
    "line-2": ("#00835f", "#3fd6a9"),
    "line-3": ("#a8588a", "#e79cc8"),
    "line-4": ("#806b00", "#d9c440"),
}
LINES = [light for name, (light, _) in INKS.items() if name.startswith("line")]
GROUND, INK, FAINT = (INKS[name][0] for name in ("ground", "ink", "faint"))
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": GROUND,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.facecolor": GROUND,
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH, PANEL, MOST_LABELS, DPI = 7.2, 2.3, 10, 150  # inches, inches, along the axis, dots an inch


def write_page(machines: Sequence[Machine], out: Path, quick: int) -> Path:
    """Write index.html and <machine>/<benchmark>.png; returns the page's path. `quick` runs were left out."""
    sections = []
    for machine in machines:
        blocks = []
        for graph in machine.graphs:
            with context(STYLE):
                figure = draw(graph)
                blocks.append(_block(machine, graph, svg(figure, f"{machine.slug}-{graph.slug}")))
                figure.suptitle(f"{graph.title}\n{machine.device}, {machine.cpu}")  # the page has headings of its own
                figure.set_dpi(DPI)  # for SVG it was another
                with replacing(out / machine.slug / f"{graph.slug}.png") as file:
                    FigureCanvasAgg(figure).print_png(file)
        sections.append(_section(machine, blocks))
    left_out = f" {quick} of <code>--quick</code> are left out." if quick else ""
    with replacing(out / "index.html") as file:
        file.write((PAGE.replace("LEFT_OUT", left_out).replace("SECTIONS", "\n".join(sections))).encode())
    return out / "index.html"


def draw(graph: Graph) -> Figure:
    """The rate, and below it the ratios to the peers, over the same runs."""
    panels = 2 if graph.ratios else 1
    figure = Figure(figsize=(WIDTH, PANEL * panels + 0.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    _plot(axes[0], graph.rate, LINES[0])
    axes[0].set_ylabel(f"{graph.unit}/s")
    for at, line in enumerate(graph.ratios):
        _plot(axes[1], line, LINES[1 + at % (len(LINES) - 1)], label=line.name, row=at)
    if graph.ratios:
        axes[1].set_ylabel("times as fast")
        axes[1].axhline(1, color=INK, linewidth=0.8)
        axes[1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    for each, lines in zip(axes, ([graph.rate], graph.ratios), strict=False):
        each.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        each.margins(y=0.15)
        rows = max((at + 1 for at, line in enumerate(lines) if line.changes), default=0)
        low, high = each.get_ylim()
        each.set_ylim(low, high + 0.08 * rows * (high - low))  # room for what changes say
    step = -(-len(graph.runs) // MOST_LABELS)
    axes[-1].set_xlim(-0.5, len(graph.runs) - 0.5)
    axes[-1].set_xticks(range(0, len(graph.runs), step), [_when(run, "\n") for run in graph.runs[::step]])
    return figure


def _plot(axes: Any, line: Line, colour: str, label: str | None = None, row: int = 0) -> None:
    """A line and its band; what its changes say stands in a row of its own."""
    at = [point.at for point in line.points]
    axes.plot(at, [p.value for p in line.points], color=colour, marker="o", markersize=4, label=label)
    bounds = [(p.value, p.value) if p.low is None else (p.low, p.high) for p in line.points]
    axes.fill_between(at, *zip(*bounds, strict=True), color=colour, alpha=0.2, linewidth=0)
    if len(at) == 1:  # a band of one run has no width
        axes.vlines(at, *zip(*bounds, strict=True), color=colour, alpha=0.4, linewidth=4)
    for change in line.changes:
        axes.axvline(change.at - 0.5, color=colour, linestyle="--", linewidth=1)
        axes.annotate(
            _percent(change.factor),
            (change.at - 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -1 - 11 * row),
            textcoords="offset points",
            va="top",
            color=colour,
            fontweight="bold",
            bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def svg(figure: Figure, salt: str) -> str:
    """The figure for a page, as wide as its place there: colours are variables, identifiers are made from `salt`."""
    text = io.BytesIO()
    with context({"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue().decode()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # as figure_1: all of the page's have one
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", drawn, count=1)
    for name, (light, _) in INKS.items():
        drawn = drawn.replace(light, f"var(--{name})")
    return drawn


def _section(machine: Machine, blocks: Sequence[str]) -> str:
    rows = []
    for graph in machine.graphs:
        newest = graph.rate.points[-1]
        against = [f"{_ratio(line.points[-1])} {escape(line.name)}" for line in graph.ratios]
        changes = [
            f"{escape(line.name)} {_percent(change.factor)} from {escape(_when(graph.runs[change.at], ' '))}"
            for line in (graph.rate, *graph.ratios)
            for change in line.changes
        ]
        few = f"too few runs ({len(graph.runs)})" if len(graph.runs) < MARKED_FROM else "none"
        rows.append(
            f'<tr><td><a href="#{machine.slug}-{graph.slug}">{escape(graph.title)}</a></td>'
            f"<td class=n>{number(newest.value)} {escape(graph.unit)}/s</td>"
            f"<td>{'<br>'.join(against)}</td><td>{'<br>'.join(changes) or few}</td></tr>"
        )
    environment = machine.graphs[-1].runs[-1].environment
    gpu = f"{environment.gpu.name}; " if environment.gpu else ""
    return (
        f'<section id="{machine.slug}"><h2>{escape(machine.device)}</h2>'
        f"<p>{escape(gpu)}{escape(machine.cpu)}, {machine.cores} cores</p>"
        "<table class=overview><thead><tr><th>benchmark<th class=n>newest run<th>times as fast as<th>changes</thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{''.join(blocks)}</section>"
    )


def _block(machine: Machine, graph: Graph, drawn: str) -> str:
    columns = [graph.rate, *graph.ratios]
    cells: list[dict[int, str]] = []
    for line in columns:
        changes = {change.at: f" <b>{_percent(change.factor)}</b>" for change in line.changes}
        say = _rate if line is graph.rate else _ratio
        cells.append({point.at: say(point) + changes.get(point.at, "") for point in line.points})
    rows = []
    for at, run in reversed(list(enumerate(graph.runs))):
        figures = "".join(f"<td class=n>{column.get(at, '')}</td>" for column in cells)
        dirty = ' <span title="with changes that were not committed">*</span>' if run.dirty else ""
        rows.append(f"<tr><td>{run.date:%Y-%m-%d %H:%M}</td><td><code>{_commit(run)}</code>{dirty}</td>{figures}</tr>")
    heads = "".join(
        f"<th class=n>{escape(name)}" for name in (f"{graph.unit}/s", *(line.name for line in graph.ratios))
    )
    label = escape(f"{graph.title}: {graph.unit} a second over {len(graph.runs)} runs")
    return (
        f'<article id="{machine.slug}-{graph.slug}"><h3>{escape(graph.title)}</h3>'
        f"<p><code>{escape(graph.name)}</code></p>"
        f'<div class=pair><figure role="img" aria-label="{label}">{drawn}</figure>'
        f"<div class=rows><table><thead><tr><th>date (UTC)<th>commit{heads}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></div></article>"
    )


def _rate(point: Point) -> str:
    return f"{number(point.value)}{_interval(point, number)}"


def _ratio(point: Point) -> str:
    return f"{point.value:.2f}{_interval(point, '{:.2f}'.format)}"


def _interval(point: Point, say: Any) -> str:
    return "" if point.low is None else f" <small>{say(point.low)} to {say(point.high)}</small>"


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f} %"


def _when(run: Any, between: str) -> str:
    return f"{_commit(run)}{between}{run.date:%y-%m-%d}"


def _commit(run: Any) -> str:
    return (run.commit or "unknown")[:7]


def _variables(which: int) -> str:
    return "".join(f"--{name}: {pair[which]}; " for name, pair in INKS.items())


PAGE = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mvp_fast: speed over commits</title>
<style>
:root {{ color-scheme: light dark; {_variables(0)}}}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)}}} }}
body {{ background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 84rem; padding: 0 1rem; }}
h2 {{ border-top: 2px solid var(--faint); margin-top: 3rem; padding-top: 1rem; }}
h3 {{ margin: 2.5rem 0 0; }} h3 + p {{ margin: 0 0 .5rem; opacity: .75; }} a {{ color: var(--line-0); }}
code {{ font: .9em ui-monospace, monospace; }} small {{ opacity: .75; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--faint); padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; }}
thead th {{ background: var(--ground); position: sticky; top: 0; }}
.n {{ text-align: right; }} .rows td, .rows th {{ font-size: .85rem; }} .rows td {{ white-space: nowrap; }}
.pair {{ align-items: start; display: flex; flex-wrap: wrap; gap: 1.5rem; }}
figure {{ flex: 3 1 26rem; margin: 0; min-width: 0; }} figure svg {{ display: block; height: auto; width: 100%; }}
figure svg text {{ font-family: system-ui, sans-serif !important; }}
.rows {{ flex: 2 1 20rem; max-height: 26rem; overflow: auto; }}
</style>
<h1>Speed over commits</h1>
<p>One point is one recorded run.LEFT_OUT Rates: the median of a run's rounds, in a band from their 20th to their 80th
percentile. Ratios: times as fast as what one would run instead, which took turns with ours, in a band of 95 %
confidence. Rates follow the machine's state as well as the code; ratios follow the code. A dashed line marks where a
new level begins, and by how much it differs from the level before; with fewer than {MARKED_FROM} runs nothing is
marked, because noise and change can't be told apart. * marks a run with changes that were not committed.</p>
SECTIONS
"""
