"""The benchmarks' own tools: the comparison's arithmetic, and what a recorded run holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytest_plugins = ["pytester"]


def tool(name: str) -> ModuleType:
    """A helper of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    compare, rng, inside = tool("compare"), np.random.default_rng(0), 0
    compare.RESAMPLES = 400
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


def test_a_recorded_run_says_where_it_comes_from(tmp_path: Path) -> None:
    recorder = tool("recorder")
    run = recorder.Recorder()
    run.add("a benchmark", [0.5, 0.25], {"rate": 3})
    path = run.write(tmp_path)
    document = json.loads(path.read_text())
    assert path.parent == tmp_path / recorder.device_name()
    assert [*tmp_path.rglob("*.*")] == [path]
    assert set(document) == {
        *("schema", "date", "commit", "dirty", "command", "device", "cores", "versions", "results")
    }
    assert document["schema"] == 1
    assert document["results"] == [{"name": "a benchmark", "seconds": [0.5, 0.25], "extra": {"rate": 3}}]
    assert document["versions"]["torch"]
    if document["commit"] is not None:  # not where the sources were unpacked without their history
        assert path.stem.endswith(document["commit"][:10])


def test_the_harness_runs_records_and_leaves_out(pytester: pytest.Pytester) -> None:
    """The real conftest over two benchmarks, in a process of its own."""
    for name in ("conftest.py", "recorder.py"):
        pytester.path.joinpath(name).write_text((BENCHMARKS / name).read_text())
    pytester.makeini("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    pytester.makepyfile(
        """
        import pytest, torch

        def test_work(benchmark, quick):
            benchmark.pedantic(sum, args=([1, 2],), rounds=1 if quick else 4, iterations=1)
            benchmark.extra_info["summary"] = "so many a second"

        @pytest.mark.gpu
        def test_on_gpu():
            assert torch.cuda.is_available()
        """
    )
    done = pytester.runpytest_subprocess("--quick", "--record", "-p", "no:cacheprovider")
    import torch

    if torch.cuda.is_available():
        done.assert_outcomes(passed=2)
    else:
        done.assert_outcomes(passed=1, deselected=1)
        done.stdout.fnmatch_lines(["*1 benchmarks left out: they need a CUDA device*"])
    done.stdout.fnmatch_lines(["*test_work: so many a second", "recorded: *"])
    (path,) = (pytester.path / "results").rglob("*.json")
    (result,) = json.loads(path.read_text())["results"]
    assert len(result["seconds"]) == 1
