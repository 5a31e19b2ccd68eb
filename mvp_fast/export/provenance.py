"""What is known of a run, for its model card: read from the files in its folder, without any local path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

# Sections and settings of a configuration that say nothing of what was trained, or name a place on a machine.
SURROUNDINGS = frozenset({"run", "resume", "kernels"})
PLACES = frozenset({"index", "threads", "prefetch", "device"})
# What results.json holds beside figures, by custom of `mvp-fast`'s evaluations.
ABOUT = frozenset({"schema", "verb", "date", "command", "versions", "backbone", "data", "settings"})
LONGEST_LIST = 12


@dataclass(frozen=True)
class Evaluation:
    """One results.json, flat: dotted names to numbers, truth values and short words.

    Attributes:
        verb: of mvp-fast.
        figures, data, settings: what was found, on which sets, and how.
        same_weights: whether it is of the very weights that are exported.
    """

    verb: str
    figures: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    same_weights: bool


@dataclass(frozen=True)
class Provenance:
    """Where exported weights come from.

    Attributes:
        step: optimizer steps taken; total_steps: planned.
        averaged: these are the averaged weights.
        skipped: updates that were skipped for a value that was not finite.
        config: the resolved settings, nested, without places and surroundings.
        index: fingerprint of the training set's index; empty where it is not known.
        images: in the training set; 0 where it is not known.
        loss: of the newest metric line up to this step; None where there is none.
        teacher: the teacher's fingerprint; target_width: channels of its features.
        fingerprint: of the exported network; see timm_fingerprint.
        device: that it was trained on; empty where it is not known.
        versions: of the packages that it was trained with.
        evaluations: what `mvp-fast` found of this run.
    """

    step: int
    total_steps: int
    averaged: bool
    skipped: int
    config: dict[str, Any]
    index: str
    images: int
    loss: float | None
    teacher: str
    target_width: int
    fingerprint: str
    device: str
    versions: dict[str, str]
    evaluations: tuple[Evaluation, ...]

    @property
    def images_seen(self) -> int:
        """Images in all batches so far, each as often as it came."""
        return self.step * int(self.config["train"]["batch_size"])


def read_provenance(run: Path, state: Mapping[str, Any], *, averaged: bool, fingerprint: str) -> Provenance:
    """Gather what a run's folder tells; a file that is missing or damaged leaves its part out.

    Args:
        run: the run's folder.
        state: of the checkpoint, its state.json.
        averaged: the averaged weights are exported.
        fingerprint: of the exported network; results of other weights are told apart by it.
    """
    step = int(state["step"])
    environment = _read(run / "environment.json")
    metrics = _last_metrics(run / "metrics.jsonl", step)
    config = without_places(state["config"])
    epoch = float(metrics.get("epoch") or 0)
    seen = int(metrics.get("step") or 0) * int(config["train"]["batch_size"])
    loss = metrics.get("loss")
    return Provenance(
        step=step,
        total_steps=int(state["total_steps"]),
        averaged=averaged,
        skipped=int(state["skipped"]),
        config=config,
        index=str(state["plan"].get("index", "")),
        images=round(seen / epoch) if epoch > 0 else 0,
        loss=float(loss) if isinstance(loss, int | float) else None,
        teacher=str(state["teacher"]),
        target_width=int(state["target_width"]),
        fingerprint=fingerprint,
        device=str(environment.get("device", "")),
        versions={"mvp_fast": environment.get("mvp_fast", ""), **environment.get("versions", {})}
        if environment
        else {},
        evaluations=tuple(_evaluations(run, fingerprint)),
    )


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration without what names a place on a machine; of a file's path its name is left."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in SURROUNDINGS or name in PLACES:
            continue
        kept[name] = without_places(value) if isinstance(value, Mapping) else _without_path(value)
    return kept


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names. Long lists and what looks like a path are left out; hashes are shortened."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            plain = all(isinstance(each, bool | int | float | str) and _showable(each) for each in value)
            if plain and 0 < len(value) <= LONGEST_LIST:
                found[prefix + name] = list(value)
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and value and _showable(value)):
            found[prefix + name] = value[:12] if isinstance(value, str) and _is_hash(value) else value
    return found


def _evaluations(run: Path, fingerprint: str) -> Iterator[Evaluation]:
    """The results of evaluations in folders right under the run's, by name."""
    for path in sorted(run.glob("*/results.json")):
        content = _read(path)
        if not isinstance(content.get("verb"), str):
            continue
        backbone = content.get("backbone")
        evaluated = backbone.get("fingerprint") if isinstance(backbone, Mapping) else None
        parts = [content.get(part) for part in ("data", "settings")]
        data, settings = (flat(part) if isinstance(part, Mapping) else {} for part in parts)
        figures = flat({name: value for name, value in content.items() if name not in ABOUT})
        yield Evaluation(content["verb"], figures, data, settings, evaluated == fingerprint)


def _last_metrics(path: Path, step: int) -> dict[str, Any]:
    """The newest metric line that is not later than `step`."""
    best: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return best
    for line in lines:
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # cut off in the middle
        if isinstance(metrics, dict) and best.get("step", 0) <= metrics.get("step", step + 1) <= step:
            best = metrics
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _without_path(value: Any) -> Any:
    """Of a path its last part; hf-hub:OWNER/NAME is a name."""
    if isinstance(value, str) and os.sep in value and not value.startswith(("hf-hub:", "hf_hub:")):
        return PurePath(value).name
    return value


def _showable(value: Any) -> bool:
    return not isinstance(value, str) or (len(value) <= 80 and os.sep not in value and "\n" not in value)


def _is_hash(value: str) -> bool:
    return len(value) in (40, 64) and set(value) <= set("0123456789abcdef")
