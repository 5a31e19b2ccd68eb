"""The tables of docs/performance.md, from the newest recorded run of each device.

    python benchmarks/docs_tables.py        the same as `mvp-fast bench history --docs`

What stands between `<!-- results: DEVICE -->` and `<!-- end -->` is written by this file; the rest is left alone. A
device that has results and no section yet gets one after the others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from history import load, main, number, rates, title
from recorder import REPO, RESULTS, Ratio, Result, Run

from mvp_fast.errors import DataError
from mvp_fast.samples.files import replacing

PAGE = REPO / "docs" / "performance.md"
SECTION = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
NOT_YET = "Not measured yet.\n"
LIMIT = "copy"  # a peer that nothing can beat: what is beside it is a share of the limit
COLUMNS = ("what", "rate", "times as fast as", "share of the limit", "peak memory")


def write(page: Path = PAGE, results: Path = RESULTS) -> bool:
    """Write the tables into a page; returns whether it changed.

    Raises:
        DataError: the page or a results file is not what it should be.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"The page can't be read: {error.strerror}", where=str(page), fix="Restore it") from error
    new = filled(text, results, str(page))
    if new != text:
        with replacing(page, "the page") as file:
            file.write(new.encode())
    return new != text


def filled(text: str, results: Path, where: str = "") -> str:
    """A page's text with the tables that the results give."""
    runs = load(results) if any(results.glob("*/*.json")) else []
    found = {device: [pair for pair in runs if pair[1].device == device] for device in {run.device for _, run in runs}}
    sections = SECTION.findall(text)
    if not sections or len(sections) != text.count("<!-- results:") or len(sections) != text.count("<!-- end -->"):
        fix = "Mend the markers: `<!-- results: DEVICE -->` and `<!-- end -->`, each on a line of its own, in pairs"
        raise DataError("The page's markers for tables are not in pairs, or there are none", where=where, fix=fix)
    new = "".join(_section(device) for device in sorted(found.keys() - {device for device, _ in sections}))
    end = list(SECTION.finditer(text))[-1].end()
    text = text[:end] + new + text[end:]
    return SECTION.sub(lambda match: _filled_section(match[1], found.get(match[1], [])), text)


def _section(device: str) -> str:
    return f"\n\n## `{device}`\n\n<!-- results: {device} -->\n<!-- end -->"


def _filled_section(device: str, runs: Sequence[tuple[Path, Run]]) -> str:
    whole = [pair for pair in runs if not pair[1].quick]
    return f"<!-- results: {device} -->\n{_tables(*whole[-1], whole[:-1]) if whole else NOT_YET}<!-- end -->"


def _tables(path: Path, run: Run, earlier: Iterable[tuple[Path, Run]]) -> str:
    """One device's, as Markdown."""
    link = f"[{path.name}](../benchmarks/results/{run.device}/{path.name})"
    commit = f"commit `{run.commit[:10]}`" if run.commit else "an unknown commit"
    lines = [
        f"From {link}, {commit}{' with changes that were not committed' if run.dirty else ''}. {_machine(run)}",
        "",
    ]
    results = sorted(run.results, key=lambda result: result.name.partition("::")[0])
    for file, group in groupby(results, key=lambda result: result.name.partition("::")[0]):
        lines += [f"### `{file}`", "", *_table([_row(result) for result in group]), ""]
    names = {result.name for result in run.results}
    missing = sorted({result.name for _, before in earlier for result in before.results} - names)
    if missing:
        lines += [f"Measured earlier, and not in this run: {', '.join(f'`{name}`' for name in missing)}.", ""]
    return "\n".join(lines)


def _machine(run: Run) -> str:
    where, gpu, words = run.environment, run.environment.gpu, []
    if gpu:
        facts = {
            "driver": gpu.driver,
            "memory": gpu.memory_mib and f"{gpu.memory_mib / 1024:.0f} GiB",
            "multiprocessors": gpu.max_sm_mhz and f"up to {gpu.max_sm_mhz} MHz",
            "memory clock": gpu.max_memory_mhz and f"up to {gpu.max_memory_mhz} MHz",
        }
        known = ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact)
        words.append(f"{gpu.name} ({known})" if known else gpu.name)
    words.append(f"{where.cpu}, {where.cores} cores")
    cuda = f" (CUDA {where.cuda})" if where.cuda and gpu else ""
    words.append(f"torch {where.versions.get('torch')}{cuda}, Python {where.versions.get('python')}")
    spreads: dict[str, float] = {}
    for result in run.results:
        for name, arm in result.calibration.items():
            spreads[name] = max(arm.spread, spreads.get(name, 0.0))
    text = "; ".join(words) + "."
    if spreads:
        arms = ", ".join(f"{name} {100 * spread:.1f} %" for name, spread in sorted(spreads.items()))
        text += f" How far the calibration arm spread within a benchmark, at most: {arms}."
    return text


def _row(result: Result) -> tuple[str, ...]:
    unit, who = rates(result)
    ours = who["ours"]
    rate = f"{number(ours.median)} {unit}/s ({number(ours.p20)} to {number(ours.p80)})"
    if ours.median < 1:
        rate += f", {number(1 / ours.median)} s each"
    against = [f"{_ratio(ratio)} {name}" for name, ratio in result.ratios.items() if name != LIMIT]
    shares = [f"{_share(result.ratios[LIMIT])} of a {LIMIT}"] if LIMIT in result.ratios else []
    if result.limit:
        shares.append(f"{100 * result.limit.share:.0f} % of {result.limit.of}")
    peaks = {name: counts["peak_bytes"] for name, counts in result.counts.items() if "peak_bytes" in counts}
    memory = [f"{name} {size / 2**30:.2f} GiB" for name, size in peaks.items()]
    return title(result), rate, "<br>".join(against), "<br>".join(shares), "<br>".join(memory)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.ratio:.2f}" if ratio.low is None else f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _share(ratio: Ratio) -> str:
    share = f"{100 * ratio.ratio:.0f} %"
    return share if ratio.low is None else f"{share} ({100 * ratio.low:.0f} to {100 * ratio.high:.0f})"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Markdown, without the columns that hold nothing."""
    kept = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    cells = [
        [COLUMNS[c] for c in kept],
        ["---"] * len(kept),
        *([row[c].replace("|", "\\|") for c in kept] for row in rows),
    ]
    return ["| " + " | ".join(line) + " |" for line in cells]


if __name__ == "__main__":
    sys.exit(main(["--docs", *sys.argv[1:]]))
