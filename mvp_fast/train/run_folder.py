"""A run's folder: what is in it, and whether a new or a resumed run may use it.

RUN/
    config.yaml           the resolved configuration
    environment.json      versions, devices, command line, what ran where
    metrics.jsonl         one line every train.log_every steps
    bad_samples.jsonl     samples that did not decode, with the reason   (only where there were some)
    nonfinite.jsonl       skipped updates and their samples              (only where there were some)
    tensorboard/
    checkpoints/step-XXXXXXXX/
    profile/              what `mvp-fast train --profile` found; see profile/session.py
    export/
    model/                the CLIP that `mvp-fast teacher fit` trained, in open_clip's hub format; with results.json
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from mvp_fast import __version__
from mvp_fast.config.load import save_config
from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.train.checkpoint import find_checkpoint, list_checkpoints
from mvp_fast.train.distributed import Ranks

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "open_clip_torch",
    "nvidia-dali-cuda130",
    "numpy",
    "numba",
)


def resume_point(config: RunSettings) -> Path | None:
    """The checkpoint that `config.resume` asks for; None for a new run.

    Raises:
        ConfigError: the folder holds a run, and a new one, or going on from another run's checkpoint, was asked for.
        DataError: the checkpoint named is not there.
    """
    folder = Path(config.run.dir)
    if config.resume == "none":
        _refuse_other_run(folder)
        return None
    if config.resume == "auto":
        found = list_checkpoints(folder / "checkpoints")
        return found[-1] if found else None
    if (Path(config.resume) / "checkpoints").is_dir():
        found_at = find_checkpoint(Path(config.resume))
    else:
        found_at = find_checkpoint(folder, config.resume)
    if found_at.resolve().parent != (folder / "checkpoints").resolve():
        _refuse_other_run(folder)
    return found_at


def _refuse_other_run(folder: Path) -> None:
    """ConfigError where the folder holds anything that a run would lose: metric lines or checkpoints."""
    metrics = folder / "metrics.jsonl"
    if list_checkpoints(folder / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
        raise ConfigError(
            "The folder already holds a run",
            where=f"run.dir {folder}",
            fix="Go on with it by --resume auto, or choose another --run.dir",
        )


def prepare_folder(config: RunSettings, environment: dict[str, Any]) -> Path:
    """Make the folder and write config.yaml and environment.json.

    Raises:
        EnvironmentProblem: the folder can't be written.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"The run's folder can't be written: {error.strerror or error}",
            where=str(folder),
            fix="Choose another --run.dir, or mend its rights or the disk's space",
        ) from error
    return folder


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, devices and the command line, for environment.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = ranks.device.type == "cuda"
    return {
        "mvp_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "versions": versions,
        "device": torch.cuda.get_device_name(ranks.device) if gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if gpu else None,
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ranks.world,
    }
