"""The study's tables as Markdown, and the page that they stand in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvp_fast.errors import DataError
from mvp_fast.evaluate.study.steps import CLIP, SUPERVISED
from mvp_fast.samples.files import replacing

SECTION = re.compile(r"<!-- study: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
WORDS = {
    CLIP: "CLIP, ours",
    SUPERVISED: "a network trained on all labels",
    "self": "a student pre-trained on pixels",
    "random": "CLIP's tower, fresh weights",
    "pixels": "normalised pixels",
    "hog": "HOG",
    "scratch": "nothing: from scratch",
}
PARTS = {"test": "", "held_out": ", held-out pairs"}
HEADS = {
    "linear": "linear",
    "linear_held_out": "linear, held out",
    "knn": "k-NN",
    "knn_held_out": "k-NN, held out",
    "miou": "mIoU",
}


def check_page(page: Path, name: str) -> None:
    """Look at a page before anything is computed for it.

    Raises:
        DataError: it can't be read, is no .md file, or has no place for the tables of the study `name`.
    """
    if page.suffix != ".md":
        raise DataError("The page is no Markdown file", where=str(page), fix="Give --page a file that ends in .md")
    filled(_read(page), name, "", str(page))


def write_page(page: Path, name: str, results: Path) -> None:
    """Put the tables of a results file between `<!-- study: NAME -->` and `<!-- end -->`.

    Raises:
        DataError: the page has no such section, or can't be read.
    """
    text, content = _read(page), json.loads(_read(results))
    link = os.path.relpath(results, page.parent)
    new = filled(text, name, tables(content, link), str(page))
    if new != text:
        with replacing(page, "--page") as file:
            file.write(new.encode())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The page can't be read: {error}", where=str(path), fix="Check --page") from error


def filled(text: str, name: str, inside: str, where: str = "") -> str:
    """A page's text with the section `name` replaced."""
    if name not in [found for found, _ in SECTION.findall(text)]:
        fix = f"Write `<!-- study: {name} -->` and `<!-- end -->`, each on a line of its own, where they are to be"
        raise DataError(f"The page has no place for the tables of the study {name}", where=where, fix=fix)
    return SECTION.sub(lambda match: match[0] if match[1] != name else _section(name, inside), text)


def _section(name: str, inside: str) -> str:
    return f"<!-- study: {name} -->\n{inside}<!-- end -->"


def tables(content: Mapping[str, Any], link: str) -> str:
    """All of them, from what results.json holds."""
    commits = ", ".join(f"`{commit[:10]}`" for commit in content["commits"])
    commit = f"commit {commits}" if commits else "an unknown commit"
    changed = " with changes that were not committed" if content["dirty"] else ""
    where, scenes = content["environment"], content["settings"]["scenes"]
    lines = [
        f"From [{link.rpartition('/')[2]}]({link}), {commit}{changed}; {where['device']}, torch {where['torch']};"
        f" {content['seconds'] / 60:.0f} minutes of work in all, {content['processes']} steps at a time."
        f" {scenes['images']:,} scenes of the profile `{scenes['profile']}` to train on, {scenes['test']:,} to test on,"
        f" {scenes['held_out']:,} of held-out pairs.",
        "",
    ]
    if "teacher" in content:
        lines += [*_teacher(content["teacher"]), ""]
    if "supervised" in content:
        lines += [
            f"The network trained on all labels has {_percent(content['supervised']['accuracy'])} % on the test set.",
            "",
        ]
    targets = [kind for kind in content["settings"]["targets"] if kind in content["summary"]]
    lines += [*_kinds(content["summary"], targets, content["names"], "learned from"), ""]
    if content["margins"]:
        lines += [*_margins(content["margins"]), ""]
    ablations = [each["name"] for each in content["settings"]["ablations"]]
    if ablations:
        lines += [*_kinds(content["summary"], [CLIP, *ablations], content["names"][:4], "what differs"), ""]
    return "\n".join(lines)


def _teacher(teacher: Mapping[str, Any]) -> list[str]:
    figures, chances = teacher["figures"], teacher["chances"]
    shown = {
        f"{part}_{name}": f"{name}{words}" for part, words in PARTS.items() for name in ("shape", "colour", "pair")
    }
    rows = [
        (words, _percent(figures[name]), _percent(chances[name])) for name, words in shown.items() if name in figures
    ]
    return _table(("our CLIP, zero-shot", "accuracy", "chance"), rows)


def words_of(kind: str, targets: bool) -> str:
    """A kind of student for people: by what it learned from, or among ablations by what differs."""
    return "nothing" if kind == CLIP and not targets else WORDS.get(kind, kind)


def _kinds(table: Mapping[str, Any], kinds: Sequence[str], names: Sequence[str], head: str) -> list[str]:
    """A row a kind: mean, and least to greatest."""
    best = {
        name: max(table[kind][name]["mean"] for kind in kinds if name in table[kind])
        for name in names
        if any(name in table[kind] for kind in kinds)
    }
    equal = len({found["seeds"] for kind in kinds for found in table[kind].values()}) == 1
    rows = []
    for kind in kinds:  # a best is marked where all rows are of as many seeds
        cells = [_cell(table[kind].get(name), best[name] if equal else None) for name in best]
        seeds = "" if equal else f" ({max(found['seeds'] for found in table[kind].values())} seeds)"
        words = words_of(kind, targets=head == "learned from")
        rows.append((words + seeds.replace("(1 seeds)", "(1 seed)"), *cells))
    return _table((head, *(head_of(name) for name in best)), rows)


def head_of(name: str) -> str:
    """A figure's name for people."""
    if name.startswith("finetune_"):
        return f"fine-tuned, {100 * float(name.partition('_')[2]):g} % of labels"
    return HEADS[name]


def _cell(found: Mapping[str, Any] | None, best: float | None) -> str:
    if found is None:
        return ""
    mean = _percent(found["mean"])
    mean = f"**{mean}**" if found["mean"] == best else mean
    return mean if found["seeds"] == 1 else f"{mean} ({_percent(found['least'])} to {_percent(found['greatest'])})"


def _margins(found: Mapping[str, Any]) -> list[str]:
    """Whether CLIP's students are ahead by more than the spread."""
    names = list(found)
    rows = []
    for kind in found[names[0]]:
        cells = []
        for name in names:
            each = found[name][kind]
            verdict = each["verdict"] or "one seed"
            cells.append(f"{100 * each['margin']:+.1f}, spread {100 * each['spread']:.1f}: {verdict}")
        rows.append((WORDS[kind], *cells))
    return _table(("CLIP's students ahead of those of", *(f"{head_of(name)}, points" for name in names)), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(row)} |" for row in (heads, marks, *rows)]
