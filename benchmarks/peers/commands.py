"""Training commands, ours and a peer's, each in a process of its own, and what their metrics.jsonl says.

A command is Python's arguments, such as `-m mvp_fast train`, and settings as `mvp-fast train` takes them. Rates are of
the steady state: the first fifth of the metric lines is left out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Variant

REPO = Path(__file__).resolve().parents[2]
OURS = ("-m", "mvp_fast", "train")
PLAIN = (REPO / "benchmarks" / "peers" / "plain_training.py",)

# Ends as the command after the number, on so many of the cores.
PINNED = (
    "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]);"
    " os.execv(sys.argv[2], sys.argv[2:])"
)

# A run that a few CPU cores can bear: real parts at small sizes.
SMALL: dict[str, object] = {
    "data.image-size": 112,
    "mask.patches": 19,
    "mask.min-block": 4,
    "student.width": 96,
    "student.depth": 2,
    "student.heads": 3,
    "teacher.name": "ViT-S-16",
    "teacher.pretrained": "random",
    "train.batch-size": 8,
    "train.precision": "fp32",
    "train.device": "cpu",
    "run.tensorboard": False,
}


class Ended(NamedTuple):
    """What a run left: its metric lines, and the rates of those in the steady state."""

    lines: list[dict[str, Any]]
    rates: list[float]
    waits: list[float]

    @property
    def rate(self) -> float:
        """Images a second."""
        return float(np.median(self.rates))

    def facts(self) -> dict[str, Any]:
        """For extra_info."""
        memory = max((line.get("peak_memory_bytes", 0) for line in self.lines), default=0)
        return {
            "images_a_second_lines": self.rates,
            "data_wait": float(np.mean(self.waits)),
            "peak_memory_bytes": memory or None,
            "loss_first_last": [self.lines[0]["loss"], self.lines[-1]["loss"]],
        }


class Training:
    """A training command that can be run again and again, each time in a new folder.

    Args:
        command: after Python's own name.
        settings: as the command line names them; train.steps and train.batch-size among them.
        folder: for the runs; each is deleted when the next begins.
        environment: more variables of the process.
        cores: that it may use; None for all.

    Attributes:
        last: what the latest run left.
    """

    def __init__(
        self,
        command: Sequence[object],
        settings: Mapping[str, object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        cores: int | None = None,
    ) -> None:
        self.command, self.settings, self.folder, self.cores = command, dict(settings), folder, cores
        self.environment = dict(environment or {})
        self.last: Ended | None = None

    @property
    def images(self) -> int:
        """Of a whole run."""
        return int(str(self.settings["train.steps"])) * int(str(self.settings["train.batch-size"]))

    def run(self) -> Ended:
        """Train, and make sure that all went well."""
        shutil.rmtree(self.folder, ignore_errors=True)
        words = settings_words({**self.settings, "run.dir": self.folder})
        whole = [*python(*self.command), *words]
        run(whole if self.cores is None else [*python("-c", PINNED, self.cores), *whole], self.environment)
        self.last = read(self.folder, int(str(self.settings["train.steps"])))
        return self.last

    def variant(self, images: int | None = None) -> Variant:
        """A round: a whole run, but the time that so many images (those of the run) take in the steady state."""
        images = self.images if images is None else images
        return Variant(seconds=lambda: images / self.run().rate)


def settings_words(settings: Mapping[str, object]) -> list[str]:
    """Settings as `mvp-fast train` takes them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def python(*words: object) -> list[str]:
    """This process's Python, with arguments."""
    return [sys.executable, *map(str, words)]


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints.

    It runs in the repository's root: `python -m` finds the package of the revision that is measured there first.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env={**os.environ, **(environment or {})})
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode} of {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def read(folder: Path, steps: int) -> Ended:
    """The metrics of a finished run.

    Raises:
        RuntimeError: it did not come to its end, an update was not taken, or a sample was bad.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if lines[-1]["step"] != steps:
        raise RuntimeError(f"{folder}: the run ended at step {lines[-1]['step']} of {steps}")
    for line in lines:
        if line["skipped_updates"] or line["bad_samples"] or not math.isfinite(line["loss"]):
            raise RuntimeError(f"{folder}: an update was skipped, a sample was bad or the loss not finite: {line}")
    steady = lines[len(lines) // 5 or 1 :] or lines
    return Ended(lines, [line["images_per_second"] for line in steady], [line["data_wait"] for line in steady])


def write_beton(index: Path, folder: Path, mode: str, side: int) -> Path:
    """Convert an index's images to `folder`/set.beton; returns its index."""
    out = folder / "set.beton"
    words = ["convert", index, "--to", "beton", "--out", out, "--mode", mode, "--side", side]
    run(python("-m", "mvp_fast", "data", *map(str, words)))
    return out.with_suffix(".parquet")
