"""Writes down a benchmark run, and reads it again: one JSON file a run, results/<device>/<date>-<commit>.json.

schema       number of this format; files of another are refused
date         UTC
commit       of the working tree; dirty: whether tracked or new files differ from it
command      as typed
device       the GPU's name, or cpu-<n>cores
environment  gpu: name, driver, memory_mib, max_sm_mhz and max_memory_mhz, or null; cpu: its model; cores: that this
             process may use; cuda: that torch was built for; versions: of Python and of the packages that matter
results      a list, an entry a benchmark:
    name, title   file and test; what it measures in words
    device, unit  cpu or cuda; what its rates count, in the plural
    seconds       each round's
    rates         who -> median, p20, p80: `unit` a second, of `ours` and of each peer
    ratios        peer -> ratio, low, high, pairs: times as fast as the peer, with a 95 % interval
    calibration   arm -> seconds, spread (see calibration.py)
    counts        who -> what can be counted exactly (see counts.py)
    limit         share, and of what: how near ours is to what the machine can do; null where the benchmark does not say
    extra         whatever else the benchmark adds
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvp_fast.errors import DataError

SCHEMA = 2
REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("mvp-fast", "torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "pillow", "numpy")
GPU_FACTS = {  # field: what nvidia-smi calls it
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
}


@dataclass(frozen=True)
class Rate:
    """Items a second: the median of the rounds, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """Times as fast as a peer, with a 95 % interval; a single pair has none."""

    ratio: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class Arm:
    """One of the calibration arm's: its median, and its interquartile range as a share of that."""

    seconds: float
    spread: float


@dataclass(frozen=True)
class Limit:
    """How near a rate is to what the machine can do: a share, and of what, such as "the matrix product's rate"."""

    share: float
    of: str


@dataclass(frozen=True)
class Result:
    """One benchmark's, as the head of this file says."""

    name: str
    seconds: list[float]
    title: str = ""
    device: str = "cpu"
    unit: str = ""
    rates: dict[str, Rate] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    calibration: dict[str, Arm] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    limit: Limit | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """What is known of it; None where nvidia-smi can't say."""

    name: str
    driver: str | None = None
    memory_mib: int | None = None
    max_sm_mhz: int | None = None
    max_memory_mhz: int | None = None


@dataclass(frozen=True)
class Environment:
    """Where a run took place."""

    gpu: Gpu | None
    cpu: str
    cores: int
    cuda: str | None
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Run:
    """A recorded run, as the head of this file says."""

    date: datetime.datetime
    commit: str | None
    dirty: bool | None
    command: list[str]
    device: str
    environment: Environment
    results: list[Result]

    @property
    def quick(self) -> bool:
        """Whether it was one round of each, as with --quick: that they run is all that it says."""
        return all(len(result.seconds) == 1 for result in self.results)


def device_name() -> str:
    """The GPU's name as a slug (nvidia-h100-80gb-hbm3), or cpu-<n>cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"cpu-{cores()}cores"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, Any]:
    """Of this process, as the head of this file says."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    return {
        "gpu": _gpu(),
        "cpu": cpu_model(cpuinfo.read_text() if cpuinfo.exists() else "") or platform.machine(),
        "cores": cores(),
        "cuda": torch.version.cuda,
        "versions": _versions(),
    }


def cpu_model(cpuinfo: str) -> str:
    """The first processor's name in the text of /proc/cpuinfo; empty where it has none.

    Virtual machines cut names short ("AMD EPYC"): family and model number tell generations apart.
    """
    first = cpuinfo.strip().partition("\n\n")[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name, numbers = facts.get("model name", ""), (facts.get("cpu family"), facts.get("model"))
    return f"{name} (family {numbers[0]}, model {numbers[1]})" if name and all(numbers) else name


def gpu_facts(line: str) -> dict[str, Any]:
    """What nvidia-smi answers to the query for GPU_FACTS, by field; None for what it does not know."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(GPU_FACTS):
        return {}
    driver, *numbers = (None if word.startswith("[") else word for word in words)
    return dict(zip(GPU_FACTS, [driver, *(int(n) if n and n.isdecimal() else None for n in numbers)], strict=True))


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    # By its UUID: torch's number 0 may be another GPU for nvidia-smi, which knows no CUDA_VISIBLE_DEVICES.
    query = (
        f"--id=GPU-{properties.uuid}",
        "--format=csv,noheader,nounits",
        f"--query-gpu={','.join(GPU_FACTS.values())}",
    )
    facts = dict.fromkeys(GPU_FACTS) | gpu_facts(_output("nvidia-smi", *query) or "")
    return {"name": properties.name, **facts, "memory_mib": facts["memory_mib"] or properties.total_memory >> 20}


def _output(*command: str) -> str | None:
    """What a command prints; None where it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
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

    def add(self, name: str, seconds: Sequence[float], extra: Mapping[str, Any]) -> None:
        """One benchmark's rounds, in seconds, and what else it measured: the harness's `extra_info`."""
        extra, (file, colons, test) = dict(extra), name.partition("::")  # a case's name may hold slashes
        self.results.append(
            {
                "name": Path(file).name + colons + test,
                "title": extra.pop("title", ""),
                "device": extra.pop("device", "cpu"),
                "unit": extra.pop("unit", ""),
                "seconds": list(seconds),
                "rates": extra.pop("rates", {}),
                "ratios": extra.pop("times_the_peer", {}),
                "calibration": extra.pop("calibration", {}),
                "counts": extra.pop("counts", {}),
                "limit": extra.pop("share_of_limit", None),
                "extra": extra,
            }
        )

    def document(self, now: datetime.datetime) -> dict[str, Any]:
        """What is written."""
        git = ("git", "-C", str(REPO))
        status = _output(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {
            "schema": SCHEMA,
            "date": now.isoformat(timespec="seconds"),
            "commit": _output(*git, "rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "device": device_name(),
            "environment": environment(),
            "results": self.results,
        }

    def write(self, folder: Path = RESULTS) -> Path:
        """Write the file, beside its place and renamed, and return its path. What JSON can't hold becomes text."""
        now = datetime.datetime.now(datetime.UTC)
        document = self.document(now)
        commit = (document["commit"] or "unknown")[:10]
        path = folder / document["device"] / f"{now:%Y%m%dT%H%M%SZ}-{commit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(document, indent=1, default=repr) + "\n")
        beside.replace(path)
        return path


def read(path: Path) -> Run:
    """A recorded run.

    Raises:
        DataError: the file can't be read, has another schema, or does not hold what this one says.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Restore it from the repository's history, or delete it"
        raise DataError(f"A results file can't be read: {error}", where=str(path), fix=fix) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"A results file has schema {schema!r}, and this revision reads {SCHEMA} alone",
            where=str(path),
            fix="Delete it and record anew (pytest benchmarks --record), or read it at the commit that it names",
        )
    run = _structured(document, path)
    numbers = [number for result in run.results for number in _positive(result)]
    if not run.results or not all(math.isfinite(number) and number > 0 for number in numbers):
        what = "holds no result" if not run.results else "holds a time, rate or ratio that is not positive and finite"
        raise DataError(f"A results file {what}", where=str(path), fix="Delete it and record anew")
    return run


def _structured(document: Mapping[str, Any], path: Path) -> Run:
    import cattrs

    converter = cattrs.Converter()
    converter.register_structure_hook(datetime.datetime, lambda text, _: _utc(text))
    try:
        return converter.structure(document, Run)
    except cattrs.BaseValidationError as error:
        reasons = cattrs.transform_error(error, path="file", format_exception=lambda e, _: f"{type(e).__name__}: {e}")
        what = f"A results file does not hold what schema {SCHEMA} says: {'; '.join(reasons[:3])}"
        raise DataError(what, where=str(path), fix="Restore it from the repository's history, or delete it") from error


def _utc(text: str) -> datetime.datetime:
    date = datetime.datetime.fromisoformat(text)
    if date.tzinfo is None:
        raise ValueError("a date without its time zone")
    return date.astimezone(datetime.UTC)


def _positive(result: Result) -> list[float]:
    """What must be positive: of it logarithms and quotients are taken."""
    rates = [number for rate in result.rates.values() for number in (rate.median, rate.p20, rate.p80)]
    ratios = [n for ratio in result.ratios.values() for n in (ratio.ratio, ratio.low, ratio.high) if n is not None]
    return [*result.seconds, *rates, *ratios, *(arm.seconds for arm in result.calibration.values())]
