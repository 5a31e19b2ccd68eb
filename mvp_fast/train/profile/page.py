"""report.html: one page that needs nothing but itself.

The verdict, a timeline of one step, the table of stages, images a second over time, the roofline, memory, and the ranks
where there are several. Without scripts the page shows the median step; with them, the fastest and the slowest too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from mvp_fast import __version__
from mvp_fast.train.profile.charts import Line, Point, class_of, rate_chart, roofline, step_chart
from mvp_fast.train.profile.numbers import Numbers, figure
from mvp_fast.train.profile.page_style import SCRIPT, style
from mvp_fast.train.profile.table import in_order, milliseconds, share, size, stage_rows
from mvp_fast.train.profile.timeline import Timeline, quantile
from mvp_fast.train.profile.verdict import Advice, Verdict

ROOFLINE = ("patchify", "teacher", "student forward", "backward", "clip", "optimizer")


def page(numbers: Numbers, verdict: Verdict, real: Timeline, synthetic: Timeline | None) -> str:
    """The page as HTML."""
    settings = numbers.settings
    about = [
        settings.device_name if settings.world == 1 else f"{settings.world} x {settings.device_name}",
        f"{settings.precision}, batch {settings.batch_size:,}",
        f"loader {settings.loader}",
        f"{len(numbers.real.steps)} steps after {numbers.warm_up} of warm-up",
        f"mvp_fast {__version__}",
    ]
    sections = [
        _section("timeline", "Timeline of one step", TIMELINE, _timeline(real)),
        _section("stages", "Stages", _stages_note(numbers), _stages(numbers)),
        _section("rate", "Images a second over time", RATE, _rates(numbers, real, synthetic)),
        _section("roofline", "Roofline", ROOF, _roofline(numbers)),
        _section("memory", "Memory by part", _memory_note(numbers), _memory(numbers)),
    ]
    if settings.world > 1:
        sections.append(_section("ranks", "Ranks", RANKS, _ranks(numbers)))
    return PAGE.format(
        style=style(),
        script=SCRIPT,
        about=" · ".join(map(escape, about)),
        limit=verdict.limit,
        headline=escape(verdict.headline),
        sentences=escape(" ".join(verdict.sentences)),
        advice=_advice(verdict.advice),
        cards="".join(_cards(numbers)),
        sections="\n".join(sections),
    )


def _section(name: str, title: str, note: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _advice(advice: Sequence[Advice]) -> str:
    if not advice:
        return "<p>No setting that this profile knows of would make it faster by 1 % or more.</p>"
    items = []
    for each in advice:
        gain = "?" if each.gain is None else f"+{100 * (each.gain - 1):.0f} %"
        kind = "gain not known" if each.gain is None else "at most" if each.at_most else "predicted"
        change = f"<code>--{escape(each.setting)} {escape(each.to)}</code> <span>in place of {escape(each.now)}</span>"
        items.append(
            f"<li><div class='gain'><b>{gain}</b><small>{kind}</small></div>"
            f"<div>{change}<p>{escape(each.reason)}</p></div></li>"
        )
    return f'<ol class="advice">{"".join(items)}</ol>'


def _cards(numbers: Numbers) -> list[str]:
    real = numbers.real
    ceiling = "the run's own are resident" if numbers.ceiling is None else f"{figure(numbers.ceiling)} images/s"
    precision = numbers.settings.precision
    return [
        _card("images a second", figure(numbers.images_per_second), f"{milliseconds(real.step)} ms a step"),
        _card("waiting for data", share(real.share("data wait", "copy")), "of a step's time"),
        _card("with resident batches", f"{numbers.headroom:.2f}x", ceiling),
        _card(
            "of the matmul rate",
            share(numbers.matmul_share),
            f"{figure(numbers.rates.matmul[precision] / 1e12)} TFLOP/s in {precision}",
        ),
    ]


def _card(name: str, value: str, note: str) -> str:
    return f'<div class="card"><small>{escape(name)}</small><b>{escape(value)}</b><small>{escape(note)}</small></div>'


def _timeline(real: Timeline) -> str:
    seconds = real.step_seconds
    order = sorted(range(len(seconds)), key=lambda step: seconds[step])
    chosen = {"median": order[len(order) // 2], "fastest": order[0], "slowest": order[-1]}
    buttons = "".join(
        f'<button type="button" data-step="{name}" aria-pressed="{str(name == "median").lower()}">{name} step</button>'
        for name in chosen
    )
    charts = "".join(
        f'<div class="step" data-step="{name}"{"" if name == "median" else " hidden"}>{step_chart(real, step)}</div>'
        for name, step in chosen.items()
    )
    seen = {span.stage for span in real.spans} | {span.stage for span in real.path}
    legend = "".join(f'<li class="{class_of(stage)}"><i></i>{escape(stage)}</li>' for stage in in_order(seen))
    return f'<div class="buttons">{buttons}</div>{charts}<ul class="legend">{legend}</ul>'


def _stages_note(numbers: Numbers) -> str:
    words = (
        "Milliseconds a step. The critical path is what a step's time is made of: its stages add up to the step. A"
        " stage that runs beside others is longer than its part of that path. Shares of the measured rates hold while"
        " the stage runs; its operations are the plain model's, its bytes an estimate without fusion, so that a share"
        " of the copy rate may pass 100 % where caches hold what is read."
    )
    if numbers.synthetic is None:
        return words
    return f"{words} “Resident” is the critical path without a loader."


def _stages(numbers: Numbers) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "ms", "critical", "of the step", "", "resident", "of matmul", "of copy")
    )
    rows = []
    for stage, busy, critical, part, resident, matmul, copy in stage_rows(numbers):
        width = 100 * numbers.real.share(stage)
        length = f'<span style="width:{width:.1f}%"></span>' if width else ""
        bar = f'<td class="track">{length}</td>'
        cells = "".join(f"<td>{escape(text)}</td>" for text in (busy, critical, part))
        rest = "".join(f"<td>{escape(text)}</td>" for text in (resident, matmul, copy))
        rows.append(f'<tr class="{class_of(stage)}"><th><i></i>{escape(stage)}</th>{cells}{bar}{rest}</tr>')
    resident = milliseconds(numbers.synthetic.step) if numbers.synthetic else ""
    whole = ("", milliseconds(numbers.real.step), "100 %", "", resident, share(numbers.matmul_share), "")
    foot = "".join(f"<td>{text}</td>" for text in whole)
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><th>step</th>{foot}</tr></tfoot></table></div>"
    )


def _rates(numbers: Numbers, real: Timeline, synthetic: Timeline | None) -> str:
    images = numbers.settings.batch_size
    lines = [Line(f"loader {numbers.settings.loader}", _over_time(real, images), "real")]
    if synthetic is not None:
        lines.append(Line("resident batches", _over_time(synthetic, images), "synthetic"))
    low, middle, high = (milliseconds(quantile(numbers.real.steps, at)) for at in (0.05, 0.5, 0.95))
    spread = (
        f"<p class='note'>Steps: 5 % take less than {low} ms, half less than {middle} ms, 95 % less than {high} ms.</p>"
    )
    return rate_chart(lines) + spread


def _over_time(timeline: Timeline, images: int) -> list[tuple[float, float]]:
    return [(end - timeline.marks[0], images / (end - start)) for start, end in pairwise(timeline.marks)]


def _roofline(numbers: Numbers) -> str:
    points = []
    for stage in ROOFLINE:
        work, seconds = numbers.work.get(stage), numbers.real.busy.get(stage, 0.0)
        if work is not None and seconds > 0 and work.flops > 0 and work.bytes > 0:
            points.append(Point(stage, work.flops / work.bytes, work.flops / seconds, stage))
    everything = list(numbers.work.values())
    flops, moved = sum(work.flops for work in everything), sum(work.bytes for work in everything)
    points.append(Point("whole step", flops / moved, flops / numbers.real.step))
    return roofline(points, numbers.rates.matmul, numbers.settings.precision, numbers.rates.copy)


def _memory_note(numbers: Numbers) -> str:
    if numbers.settings.device == "cpu":
        return "What the run holds after a step, and this process's memory with Python, torch and the loader in it."
    return (
        "What the run holds after a step, what a step adds, and the GPU's own figures. profile/memory.pickle has every"
        " allocation of a step, for torch's memory viewer."
    )


def _memory(numbers: Numbers) -> str:
    most = max(numbers.memory.values())
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{size(count)}</td>"
        f'<td class="track"><span style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for name, count in numbers.memory.items()
    )
    return f"<div class='wide'><table class='memory'><tbody>{rows}</tbody></table></div>"


def _ranks(numbers: Numbers) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("rank", "images/s", "ms before the ranks meet", "", "ms waiting"))
    most = max(rank.alone for rank in numbers.ranks) or 1.0
    rows = []
    for rank in numbers.ranks:
        slowest = " (slowest)" if rank == numbers.straggler else ""
        rows.append(
            f"<tr><th>{rank.rank}{slowest}</th><td>{figure(rank.images_per_second)}</td><td>{milliseconds(rank.alone)}</td>"
            f'<td class="track"><span style="width:{100 * rank.alone / most:.1f}%"></span></td>'
            f"<td>{milliseconds(rank.data_wait)}</td></tr>"
        )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


TIMELINE = (
    "What each track did in one step. The critical path is what the step's time is made of; what runs on other tracks"
    " meanwhile is hidden by it. The same with all steps, and with every operator and kernel, is in"
    " profile/trace.json.gz: open it in ui.perfetto.dev."
)
RATE = "A level a step: how even the steps are, and what resident batches would give."
ROOF = (
    "Both ceilings were measured on this device in this run. Below the slope a stage is bound by moving bytes, below"
    " the level by arithmetic. Operations are those of the plain models; bytes are an estimate: every layer reads and"
    " writes once, nothing is fused."
)
RANKS = (
    "All ranks take as long as the slowest, for they average their gradients. What a rank does before they first meet,"
    " in the backward pass, shows which one the others wait for."
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{headline}: a profile by mvp_fast</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>Where each millisecond goes</h1><p class="about">{about}</p></header>
<section id="verdict" class="{limit}"><h2>{headline}</h2><p>{sentences}</p>{advice}</section>
<div class="cards">{cards}</div>
{sections}
</main>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""
