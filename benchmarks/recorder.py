"""Writes down a benchmark run: one JSON file a run in results/<device>/<date>-<commit>.json.

schema     number of this format
date       UTC
commit     of the working tree; dirty: whether tracked or new files differ from it
command    as typed after `pytest`
device     the GPU's name, or cpu-<n>cores
cores      processor cores this process may use
versions   of Python and of the packages that matter
results    a list: name, seconds (each round's), extra (what the benchmark adds: rates, ratios, intervals)
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("mvp-fast", "torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "pillow", "numpy")


def device_name() -> str:
    """The GPU's name as a slug (nvidia-h100-80gb-hbm3), or cpu-<n>cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"cpu-{cores()}cores"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


class Recorder:
    """Collects the results of a run and writes them once, at its end."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def add(self, name: str, seconds: Sequence[float], extra: dict[str, Any]) -> None:
        """One benchmark's rounds, in seconds, and what else it measured."""
        self.results.append({"name": name, "seconds": list(seconds), "extra": dict(extra)})

    def document(self, now: datetime.datetime) -> dict[str, Any]:
        """What is written."""
        status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {
            "schema": SCHEMA,
            "date": now.isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
            "command": ["pytest", *sys.argv[1:]],
            "device": device_name(),
            "cores": cores(),
            "versions": _versions(),
            "results": self.results,
        }

    def write(self, folder: Path = RESULTS) -> Path:
        """Write the file and return its path; written beside and renamed."""
        now = datetime.datetime.now(datetime.UTC)
        document = self.document(now)
        commit = (document["commit"] or "unknown")[:10]
        path = folder / document["device"] / f"{now:%Y%m%dT%H%M%SZ}-{commit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(path)
        return path
