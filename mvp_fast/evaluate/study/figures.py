"""What the study found: the figures of every run, their mean and spread over seeds, and what may be said of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mvp_fast.config.study import StudyConfig
from mvp_fast.evaluate.results import read_results
from mvp_fast.evaluate.study.steps import CLIP, RESULTS, SUPERVISED, Student, run_folder, students, teacher_folder

MIOU, LINEAR = "miou", "linear"


def finetune_figure(fraction: float) -> str:
    """The figure's name for a part of the labels."""
    return f"finetune_{fraction:g}"


def figure_names(config: StudyConfig) -> list[str]:
    """Of a student that is tried on everything; ablations have the first four."""
    parts = [finetune_figure(part.fraction) for part in config.labels]
    return [LINEAR, f"{LINEAR}_held_out", "knn", "knn_held_out", *parts, MIOU]


def gather(config: StudyConfig, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Read the results of all runs.

    Args:
        config: of a study whose steps are done.
        seconds: that each step took, by its name.

    Returns:
        JSON-able: `teacher` (the CLIP's zero-shot figures and their chances), `supervised` (the accuracy of the teacher
        that was trained on labels), `runs` (kind, seed, ablation, figures, seconds, and what
        was tried), `summary` (kind -> figure -> mean, least, greatest, seeds), `margins` (see `margins`). Figures are
        shares in [0, 1].

    Raises:
        DataError: a result is missing or damaged.
    """
    runs = [_run(config, student, seconds) for student in students(config)]
    found: dict[str, Any] = {"runs": runs, "summary": summary(runs)}
    found["margins"] = margins(found["summary"], [each for each in config.targets if each != CLIP])
    if "teachers/clip" in seconds:
        content = read_results(teacher_folder(config, CLIP) / RESULTS)
        found["teacher"] = {name: content[name] for name in ("figures", "chances", "step")}
        found["teacher"]["seconds"] = round(seconds["teachers/clip"], 1)
    if "teachers/supervised" in seconds:
        content = read_results(teacher_folder(config, SUPERVISED) / RESULTS)
        spent = round(seconds["teachers/supervised"], 1)
        found["supervised"] = {"accuracy": content["test"]["accuracy"], "step": content["step"], "seconds": spent}
    return found


def _run(config: StudyConfig, student: Student, seconds: Mapping[str, float]) -> dict[str, Any]:
    folder, figures = run_folder(config, student), {}
    probes = {"": read_results(folder / "probe" / RESULTS)}
    probes["_held_out"] = read_results(folder / "probe-held-out" / RESULTS)
    for suffix, content in probes.items():
        figures[f"{LINEAR}{suffix}"] = content["linear"]["test"]["accuracy"]
        figures[f"knn{suffix}"] = content["knn"]["k"][max(content["knn"]["k"], key=int)]["accuracy"]
    if not student.ablation:
        for part in config.labels:
            content = read_results(folder / f"finetune-{part.fraction:g}" / RESULTS)
            figures[finetune_figure(part.fraction)] = content["test"]["accuracy"]
        figures[MIOU] = read_results(folder / "segment" / RESULTS)["miou"]
    spent = {
        name.partition("/")[2]: round(each, 1)
        for name, each in seconds.items()
        if name.partition("/")[0] == student.name
    }
    chosen = probes[""]["linear"]["chosen"]
    return {
        "kind": student.kind,
        "seed": student.seed,
        "ablation": student.ablation,
        "step": probes[""]["backbone"]["step"],
        "fingerprint": probes[""]["backbone"]["fingerprint"],
        "chosen": {"layer": chosen["layer"], "lr": chosen["lr"]},
        "figures": figures,
        "seconds": spent,
    }


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each kind and figure: mean, least and greatest over seeds, standard deviation where there are two or more."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, value in run["figures"].items():
            values.setdefault(run["kind"], {}).setdefault(name, []).append(value)
    return {
        kind: {
            name: {
                "mean": statistics.fmean(found),
                "least": min(found),
                "greatest": max(found),
                "deviation": statistics.stdev(found) if len(found) > 1 else None,
                "seeds": len(found),
            }
            for name, found in figures.items()
        }
        for kind, figures in values.items()
    }


def margins(table: Mapping[str, Any], others: Iterable[str], names: Iterable[str] = (LINEAR, MIOU)) -> dict[str, Any]:
    """By how much students that learn from CLIP are ahead of others, and whether that is more than the spread.

    The spread is the greater of the two ranges over seeds, greatest minus least.

    Returns:
        figure -> other kind -> margin (of the means), spread, and verdict: `ahead` or `behind` where the margin is more
        than the spread, else `within`; None where there is one seed alone.
    """
    found: dict[str, Any] = {}
    for name in names:
        for other in others:
            if name not in table.get(CLIP, {}) or name not in table.get(other, {}):
                continue
            ours, theirs = table[CLIP][name], table[other][name]
            margin = ours["mean"] - theirs["mean"]
            spread = max(each["greatest"] - each["least"] for each in (ours, theirs))
            verdict = "within" if abs(margin) <= spread else "ahead" if margin > 0 else "behind"
            told = min(ours["seeds"], theirs["seeds"]) > 1
            found.setdefault(name, {})[other] = {
                "margin": margin,
                "spread": spread,
                "verdict": verdict if told else None,
            }
    return found
