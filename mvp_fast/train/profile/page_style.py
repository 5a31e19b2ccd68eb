"""The report's looks: colours of the stages, light and dark, the style sheet, and the script."""

from __future__ import annotations

from mvp_fast.train.stages import STAGES, Stage

# Light, and dark. What trains is blue and green, what feeds is yellow and red, what updates is brown; neighbours in a
# step differ in lightness too, for those who don't see the hues.
STAGE_COLOURS: dict[Stage, tuple[str, str]] = {
    "load": ("#c9b458", "#a8953f"),
    "data wait": ("#d1432c", "#f0674f"),
    "copy": ("#ef9a3d", "#f2a95a"),
    "patchify": ("#8fc9ea", "#7bb8dc"),
    "teacher": ("#1b8a6b", "#35ab89"),
    "student forward": ("#2f6fb7", "#4d8fd8"),
    "loss": ("#b7a3e3", "#a592d6"),
    "backward": ("#24476f", "#7f9fd0"),
    "clip": ("#d9b48f", "#c9a27c"),
    "optimizer": ("#8a5a33", "#b57f54"),
    "host": ("#a3a9b0", "#737b84"),
}
# Words in a bar: dark on light colours, and the other way round.
DARK_WORDS: tuple[tuple[Stage, ...], tuple[Stage, ...]] = (
    ("load", "copy", "patchify", "loss", "clip", "host"),
    tuple(stage for stage in STAGES if stage != "host"),
)
LIGHT_PAGE = """--ground:#fbfbfa;--sheet:#ffffff;--ink:#1d2329;--soft:#5f6973;--line:#e3e6e9;--lane:#f3f4f5;
--accent:#2f6fb7;--second:#d1772c;--shade:0 1px 2px rgb(20 30 40/.06),0 6px 24px rgb(20 30 40/.05);"""
DARK_PAGE = """--ground:#121518;--sheet:#1a1e23;--ink:#e8ebee;--soft:#9aa4ae;--line:#2c333a;--lane:#22272d;
--accent:#6aa5e8;--second:#f0a35e;--shade:none;"""


def style() -> str:
    """The whole style sheet."""
    light, dark = (_colours(theme) for theme in (0, 1))
    classes = []
    for stage in STAGES:
        name = stage.replace(" ", "-")
        classes.append(f".s-{name}{{--c:var(--{name});--w:var(--{name}-word)}}")
    return (
        f":root{{{LIGHT_PAGE}{light}}}@media (prefers-color-scheme:dark){{:root{{{DARK_PAGE}{dark}}}}}"
        + "".join(classes)
        + RULES
    )


def _colours(theme: int) -> str:
    parts = []
    for stage, colours in STAGE_COLOURS.items():
        name = stage.replace(" ", "-")
        word = "#12161a" if stage in DARK_WORDS[theme] else "#ffffff"
        parts.append(f"--{name}:{colours[theme]};--{name}-word:{word};")
    return "".join(parts)


RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1140px;margin:0 auto;padding:36px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.02em}
h2{font-size:19px;line-height:1.3;margin:0 0 4px;letter-spacing:-.01em}
p{margin:0 0 10px}
.about,.note,small{color:var(--soft)}
.note{max-width:92ch;font-size:13.5px;margin-bottom:16px}
section,.card{background:var(--sheet);border:1px solid var(--line);border-radius:12px;box-shadow:var(--shade)}
section{padding:22px 26px 24px;margin-top:20px}
#verdict{border-left:6px solid var(--accent);margin-top:24px}
#verdict.data,#verdict.cores,#verdict.ranks{border-left-color:var(--data-wait)}
#verdict.host{border-left-color:var(--host)}
#verdict h2{font-size:23px;margin-bottom:8px}
#verdict>p{max-width:92ch}
.advice{list-style:none;margin:16px 0 0;padding:0;display:grid;gap:14px}
.advice li{display:grid;grid-template-columns:96px 1fr;gap:18px;border-top:1px solid var(--line);padding-top:14px}
.advice p{margin:4px 0 0;color:var(--soft);font-size:14px;max-width:84ch}
.advice span{color:var(--soft)}
.gain b{display:block;font-size:21px;line-height:1.1;color:var(--accent)}
code{font:600 14px ui-monospace,"SF Mono",Menlo,"Liberation Mono",monospace;
background:var(--lane);border-radius:5px;padding:2px 7px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:16px;margin-top:20px}
.card{padding:16px 20px}
.card b{display:block;font-size:28px;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card small{font-size:13px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
text.label,text.rooftop{text-anchor:end}
text.tick,text.in{text-anchor:middle}
text.strong{font-weight:650;fill:var(--ink)}
.lane{fill:var(--lane)}
.grid{stroke:var(--line);stroke-width:1;pointer-events:none}
.bar rect{fill:var(--c)}
.bar circle{fill:var(--c);stroke:var(--sheet);stroke-width:1.5}
.bar text.in{fill:var(--w);font-size:11.5px;pointer-events:none}
.bar:hover rect,.bar:hover circle{opacity:.82}
text.dot{fill:var(--ink)}
.whole circle{fill:var(--ink)}
.whole text{font-weight:650}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
path.real{stroke:var(--accent)}path.synthetic{stroke:var(--second)}
svg text.name{font-weight:650;font-size:13px}
text.name.real{fill:var(--accent)}text.name.synthetic{fill:var(--second)}
.roof{fill:none;stroke:var(--ink);stroke-width:2.2}
.roof.other{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4}
.buttons{display:flex;gap:8px;margin-bottom:16px}
button{font:inherit;font-size:13.5px;color:var(--ink);background:var(--sheet);border:1px solid var(--line);
border-radius:999px;padding:4px 14px;cursor:pointer}
button[aria-pressed=true]{background:var(--ink);color:var(--sheet);border-color:var(--ink)}
button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 18px;margin:18px 0 0;padding:0;font-size:13px;
color:var(--soft)}
i{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);margin-right:8px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;font-weight:500;padding-left:0}
thead th{color:var(--soft);font-weight:500;font-size:13px}
tfoot th,tfoot td{font-weight:650;border-bottom:0}
td.track{width:26%;min-width:120px}
td.track span{display:block;height:10px;border-radius:3px;background:var(--c,var(--accent));min-width:1px}
table.memory th{width:200px}table.memory td.track{width:auto}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--sheet);font-size:13px;border-radius:7px;
padding:5px 10px;max-width:340px}
@media print{body{background:#fff}section,.card{box-shadow:none;break-inside:avoid}.buttons{display:none}}
"""

# Titles stay where scripts don't run; where they do, a tip that follows the pointer takes their place.
SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg title")) {
  const mark = title.parentNode;
  mark.dataset.tip = title.textContent;
  mark.setAttribute("aria-label", title.textContent);
  title.remove();
}
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (event.clientY + 18) + "px";
});
const buttons = document.querySelectorAll("button[data-step]");
function show(step) {
  for (const chart of document.querySelectorAll(".step")) chart.hidden = chart.dataset.step !== step;
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.step === step));
}
for (const button of buttons) button.addEventListener("click", () => show(button.dataset.step));
document.documentElement.dataset.ready = "yes";
"""
