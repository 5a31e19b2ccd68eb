"""The study's plots: every seed a point, its mean a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvp_fast.evaluate.study.steps import CLIP
from mvp_fast.evaluate.study.tables import WORDS, head_of, words_of

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # Okabe and Ito's
DPI = 110


def draw_plots(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what results.json holds: figures.png, labels.png where there are parts of the labels, ablations.png.

    Returns:
        the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    targets = [kind for kind in content["settings"]["targets"] if kind in content["summary"]]
    names = [name for name in content["names"] if not name.startswith("finetune_")]
    files = [_points(content, targets, names, "learned from", folder / "figures.png")]
    parts = [name for name in content["names"] if name.startswith("finetune_")]
    if len(parts) > 1:
        files.append(_labels(content, targets, parts, folder / "labels.png"))
    ablations = [each["name"] for each in content["settings"]["ablations"]]
    if ablations:
        files.append(_points(content, [CLIP, *ablations], content["names"][:4], "differs in", folder / "ablations.png"))
    return files


def _points(content: Mapping[str, Any], kinds: list[str], names: list[str], what: str, path: Path) -> Path:
    """A panel a figure, a row a kind."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(names), figsize=(2.5 * len(names) + 2.2, 0.42 * len(kinds) + 1.1), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, names, strict=True):
        for row, kind in enumerate(kinds):
            values = _values(content, kind, name)
            colour = COLOURS[row % len(COLOURS)]
            axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            if values:
                mean = sum(values) / len(values)
                axis.plot([mean, mean], [row - 0.32, row + 0.32], color=colour, linewidth=2.2)
        axis.set_title(head_of(name), fontsize=10)
        axis.set_xlabel("%", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    words = [words_of(kind, targets=what == "learned from") for kind in kinds]
    axes[0].set_yticks(range(len(kinds)), words)
    axes[0].set_ylabel(what, fontsize=9)
    axes[0].invert_yaxis()
    return _save(figure, path)


def _labels(content: Mapping[str, Any], kinds: list[str], parts: list[str], path: Path) -> Path:
    """Accuracy against the share of the labels."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    shares = [100 * float(name.partition("_")[2]) for name in parts]
    for number, kind in enumerate(kinds):
        means = [content["summary"][kind][name]["mean"] * 100 for name in parts]
        low, high = ([content["summary"][kind][name][end] * 100 for name in parts] for end in ("least", "greatest"))
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(shares, means, "o-", color=colour, label=WORDS[kind], markersize=4)
        axis.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:g} %" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("labels")
    axis.set_ylabel("fine-tuned accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="pre-trained on", title_fontsize=8)
    return _save(figure, path)


def _values(content: Mapping[str, Any], kind: str, name: str) -> list[float]:
    return [100 * run["figures"][name] for run in content["runs"] if run["kind"] == kind and name in run["figures"]]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
