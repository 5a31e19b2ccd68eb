"""Where metric lines are kept: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import EnvironmentProblem

Metrics = dict[str, Any]


class Sink(Protocol):
    """Takes metric lines."""

    def write(self, metrics: Metrics) -> None:
        """Take one line; it has `step`."""
        ...

    def close(self) -> None:
        """Flush and give back files."""
        ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line. Lines after `start_step` (of a run that went on past its checkpoint and
    was killed) are dropped at the start, so that each step is there once."""

    def __init__(self, path: Path, start_step: int) -> None:
        drop_later_lines(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Append one line, at once on disk for readers."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """tensorboard/ in the run's folder; points after `start_step` are purged."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, metrics: Metrics) -> None:
        """Write every number of the line."""
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the run's folder; a resumed run goes on in the same one."""

    def __init__(self, project: str, folder: Path, config: RunSettings) -> None:
        import wandb

        remembered = folder / "wandb_id.txt"  # two folders of one name, or a run begun anew, are two runs
        if not remembered.exists():
            remembered.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=remembered.read_text(encoding="utf-8").strip(),
            dir=str(folder),
            config=config_to_dict(config),
            resume="allow",
        )

    def write(self, metrics: Metrics) -> None:
        """Log every number of the line."""
        values = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        self._run.log(values, step=metrics["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_sinks(config: RunSettings) -> None:
    """Look for what the sinks need, before anything is built or written.

    Raises:
        EnvironmentProblem: wandb is not installed.
    """
    if config.run.wandb_project and importlib.util.find_spec("wandb") is None:
        raise EnvironmentProblem(
            "A Weights & Biases project is set, but wandb is not installed",
            where=f"run.wandb-project {config.run.wandb_project}",
            fix="Install it with `pip install 'mvp-fast[wandb]'`, or leave the field empty",
        )


def open_sinks(config: RunSettings, folder: Path, start_step: int) -> list[Sink]:
    """The sinks that the configuration asks for, `metrics.jsonl` first."""
    sinks: list[Sink] = [MetricsFile(folder / "metrics.jsonl", start_step)]
    if config.run.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", start_step))
    if config.run.wandb_project:
        sinks.append(WeightsAndBiases(config.run.wandb_project, folder, config))
    return sinks


def drop_later_lines(path: Path, start_step: int) -> None:
    """Leave out the JSON lines with a `step` after `start_step`: beside, then renamed. Makes the file where missing."""
    kept = [line for line in _lines(path) if _step_of(line) <= start_step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # damaged by a crash: dropped
