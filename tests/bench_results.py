"""Made-up results of benchmarks, written down as recorded runs; and the files of benchmarks/ that read them."""

from __future__ import annotations

import datetime
import importlib
import json
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / "benchmarks"))  # no package: its files find each other like this
docs_tables, history, recorder = map(importlib.import_module, ("docs_tables", "history", "recorder"))

CPU, GPU = "cpu-2cores", "nvidia-h100-80gb-hbm3"
H100 = {"name": "NVIDIA H100", "driver": "570.1", "memory_mib": 81920, "max_sm_mhz": 1980, "max_memory_mhz": None}
NAME = "test_x.py::test_y"
DAY = datetime.timedelta(days=1)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def extra(
    rate: float, unit: str = "images", ratio: float | None = 2.0, title: str = "Work", **more: Any
) -> dict[str, Any]:
    """What a benchmark reports."""
    pairs = {"ratio": ratio, "low": ratio * 0.9, "high": ratio * 1.1, "pairs": 5} if ratio else None
    return {
        "title": title,
        "unit": unit,
        "rates": {"ours": {"median": rate, "p20": rate * 0.98, "p80": rate * 1.02}},
        "times_the_peer": {"plain": pairs} if pairs else {},
        "calibration": {"copy": {"seconds": 0.01, "spread": 0.013}},
        **more,
    }


def record(
    folder: Path,
    day: int,
    *benchmarks: tuple[str, dict[str, Any]],
    device: str = CPU,
    rounds: int = 5,
    **environment: Any,
) -> Path:
    """Write a run of a day down."""
    run = recorder.Recorder()
    for name, each in benchmarks:
        run.add(name, [0.5] * rounds, each)
    date = START + day * DAY
    document = run.document(date) | {"device": device, "commit": f"c{day:06x}".ljust(40, "0"), "dirty": False}
    document["environment"] |= {"cpu": "a CPU", "cores": 2, "gpu": H100 if device == GPU else None, **environment}
    path = folder / device / f"{date:%Y%m%dT%H%M%SZ}-c{day:06x}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path
