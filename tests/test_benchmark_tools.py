"""The benchmarks' own tools: the comparison's arithmetic, and what a recorded run holds."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mvp_fast.errors import DataError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytest_plugins = ["pytester"]


def tool(name: str) -> ModuleType:
    """A helper of benchmarks/, which is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, rng, inside = tool("compare"), np.random.default_rng(0), 0
    monkeypatch.setattr(compare, "RESAMPLES", 400)
    for _ in range(200):
        weather = rng.lognormal(0, 0.5, 15)  # slow spells hit both of a pair
        ours, peer = (scale * weather * rng.lognormal(0, 0.1, 15) for scale in (1.0, 1.7))
        times = compare.ratio_of_medians(ours, peer)
        assert times["low"] <= times["high"]
        inside += times["low"] <= 1.7 <= times["high"]
    assert inside >= 180


def test_the_ratio_is_of_medians() -> None:
    compare = tool("compare")
    assert compare.ratio_of_medians([1.0, 2.0, 90.0], [4.0, 6.0, 5.0])["ratio"] == 2.5
    single = compare.ratio_of_medians([2.0], [3.0])
    assert (single["ratio"], single["low"], single["pairs"]) == (1.5, None, 1)
    assert "1.50 times" in compare.in_words(single)


EXTRA = {
    "title": "So much work",
    "unit": "images",
    "device": "cpu",
    "rates": {"ours": {"median": 3.0, "p20": 2.0, "p80": 4.0}},
    "times_the_peer": {"plain": {"ratio": 1.5, "low": 1.4, "high": 1.6, "pairs": 2}},
    "calibration": {"copy": {"seconds": 0.01, "spread": 0.02}},
    "counts": {"ours": {"operations": 7}},
    "share_of_limit": {"share": 0.5, "of": "a copy"},
    "summary": "so many a second",
}


def recorded(folder: Path, name: str = "benchmarks/test_x.py::test_y[a/b]", **changes: Any) -> Path:
    """A run of one benchmark, written down."""
    run = tool("recorder").Recorder()
    run.add(name, [0.5, 0.25], {**EXTRA, **changes})
    path: Path = run.write(folder)
    return path


def change(path: Path, *keys: Any, value: Any) -> None:
    """Put a value into a file of JSON."""
    document = at = json.loads(path.read_text())
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(document))


def test_a_recorded_run_says_where_it_comes_from(tmp_path: Path) -> None:
    recorder, path = tool("recorder"), recorded(tmp_path)
    document = json.loads(path.read_text())
    assert path.parent == tmp_path / recorder.device_name()
    assert [*tmp_path.rglob("*.*")] == [path]
    assert set(document) == {"schema", "date", "commit", "dirty", "command", "device", "environment", "results"}
    environment = document["environment"]
    assert environment["cores"] == len(os.sched_getaffinity(0))
    assert environment["cpu"].partition(" (")[0] in Path("/proc/cpuinfo").read_text()
    assert environment["cuda"] == torch.version.cuda
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["versions"]["python"] == platform.python_version()
    assert (environment["gpu"] is None) == (not torch.cuda.is_available())
    if document["commit"] is not None:  # not where the sources were unpacked without their history
        assert path.stem.endswith(document["commit"][:10])


def test_a_recorded_run_is_read_as_it_was(tmp_path: Path) -> None:
    recorder = tool("recorder")
    run = recorder.read(recorded(tmp_path))
    assert run.results == [
        recorder.Result(
            name="test_x.py::test_y[a/b]",
            seconds=[0.5, 0.25],
            title="So much work",
            device="cpu",
            unit="images",
            rates={"ours": recorder.Rate(3.0, 2.0, 4.0)},
            ratios={"plain": recorder.Ratio(1.5, 1.4, 1.6, 2)},
            calibration={"copy": recorder.Arm(0.01, 0.02)},
            counts={"ours": {"operations": 7}},
            limit=recorder.Limit(0.5, "a copy"),
            extra={"summary": "so many a second"},
        )
    ]
    assert run.device == recorder.device_name()
    assert run.date.utcoffset() is not None
    assert not run.quick


def test_what_json_cannot_hold_costs_no_run(tmp_path: Path) -> None:
    (result,) = tool("recorder").read(recorded(tmp_path, dtype=torch.bfloat16)).results
    assert result.extra["dtype"] == "torch.bfloat16"


def test_one_round_of_each_is_a_quick_run(tmp_path: Path) -> None:
    recorder = tool("recorder")
    run = recorder.Recorder()
    run.add("a", [0.5], {})
    assert recorder.read(run.write(tmp_path)).quick
    run.add("b", [0.5, 0.6], {})
    assert not recorder.read(run.write(tmp_path / "more")).quick


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["schema"], 1, "schema 1, and this revision reads 2"),
        (["schema"], "2", "schema '2'"),
        (["environment"], None, "environment"),
        (["environment", "cores"], "many", "cores"),
        (["date"], "2026-01-01T00:00:00", "time zone"),
        (["results"], [], "holds no result"),
        (["results", 0, "rates", "ours", "median"], 0, "not positive"),
        (["results", 0, "ratios", "plain", "low"], float("nan"), "not positive"),
        (["results", 0, "seconds", 1], float("inf"), "finite"),
    ],
    ids=str,
)
def test_results_that_are_not_what_they_should_be_are_refused(
    tmp_path: Path, keys: list[Any], value: Any, words: str
) -> None:
    path = recorded(tmp_path)
    change(path, *keys, value=value)
    with pytest.raises(DataError) as refused:
        tool("recorder").read(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(DataError, match=r"file\.json"):
        tool("recorder").read(tmp_path / "file.json")


def test_a_processor_is_told_by_more_than_its_name() -> None:
    model = tool("recorder").cpu_model
    text = (
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: B\n"
    )
    assert model(text.format(17)) == "AMD EPYC (family 25, model 17)"
    assert model(text.format(1)) != model(text.format(17))
    assert model("processor : 0\nBogoMIPS : 50.00\n") == ""  # ARM has no name there
    assert model("") == ""


def test_what_nvidia_smi_says() -> None:
    facts = tool("recorder").gpu_facts
    known = {"driver": "570.133.20", "memory_mib": 81559, "max_sm_mhz": 1980, "max_memory_mhz": 2619}
    assert facts("570.133.20, 81559, 1980, 2619") == known
    assert facts("570.133.20, 81559, [N/A], [Not Supported]") == known | {"max_sm_mhz": None, "max_memory_mhz": None}
    assert facts("[N/A], 81559, 1980, 2619") == known | {"driver": None}
    assert facts("No devices were found") == {}
    assert facts("") == {}


@pytest.mark.gpu
def test_the_gpu_is_recorded() -> None:
    gpu = tool("recorder").environment()["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["memory_mib"] == pytest.approx(torch.cuda.get_device_properties(0).total_memory / 2**20, rel=0.05)
    if shutil.which("nvidia-smi"):
        assert gpu["driver"]


def test_the_harness_runs_records_and_leaves_out(pytester: pytest.Pytester) -> None:
    """The real conftest and harness over two benchmarks, in a process of its own."""
    for path in BENCHMARKS.glob("*.py"):
        if not path.name.startswith("test_"):
            shutil.copy(path, pytester.path)
    pytester.makeini("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    pytester.makepyfile(
        """
        import pytest, torch
        from harness import Variant, compare

        def test_work(benchmark, session):
            "So much work."
            numbers = list(range(1000))
            plain = Variant(lambda: [number + 1 for number in numbers])
            compare(
                benchmark, session, ours=Variant(lambda: sum(numbers)), peers={"plain": plain}, check=lambda: None,
                items=1000, unit="numbers", rounds=3, warm_up_seconds=0.0,
            )

        @pytest.mark.gpu
        def test_on_gpu():
            assert torch.cuda.is_available()
        """
    )
    done = pytester.runpytest_subprocess("--quick", "--record", "-p", "no:cacheprovider")
    if torch.cuda.is_available():
        done.assert_outcomes(passed=2)
    else:
        done.assert_outcomes(passed=1, deselected=1)
        done.stdout.fnmatch_lines(["*1 benchmarks left out: they need a CUDA device*"])
    done.stdout.fnmatch_lines(["*test_work: * numbers/s; * times as fast * as plain *", "recorded: *"])
    (path,) = (pytester.path / "results").rglob("*.json")
    run = tool("recorder").read(path)
    (result,) = run.results
    assert run.quick
    assert (result.title, result.unit) == ("So much work.", "numbers")
    assert set(result.rates) == {"ours", "plain"}
    assert (result.ratios["plain"].pairs, result.ratios["plain"].low) == (1, None)
    assert set(result.calibration) == {"matmul", "copy"}
