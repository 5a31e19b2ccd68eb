"""`mvp-fast data bench`: what is measured, what is left out and why, and bad input. No figure is held to a value."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mvp_fast.cli.data.bench as verb
from mvp_fast.cli.main import main
from mvp_fast.config.schema import Config, DataConfig
from mvp_fast.errors import DataError, EnvironmentProblem
from mvp_fast.loaders import registry
from mvp_fast.loaders.base import StageStats
from mvp_fast.loaders.measure import ROUNDS, Candidate, Passage, measure
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index

BATCH = 4
SHORT = ["--seconds", "0.05", "--batch-size", str(BATCH), "--threads", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for i in range(16):
        Image.effect_noise((90, 70), 10 + i).convert("RGB").save(folder / f"{i}.jpg", quality=90)
    build_index(folder)
    return folder


class Steps:
    """Batches that count themselves, made on demand."""

    def __init__(self, log: list[str], name: str, fail_at: int | None = None) -> None:
        self.log, self.name, self.fail_at, self.taken, self.closed = log, name, fail_at, 0, 0
        self.stats = StageStats()

    def __iter__(self) -> Iterator[int]:
        while True:
            if self.taken == self.fail_at:
                raise DataError("too many bad samples")
            self.taken += 1
            self.log.append(self.name)
            self.stats.add("decode", 0.5, BATCH)
            yield self.taken

    def passage(self) -> Passage:
        def close() -> None:
            self.closed += 1

        return Passage(iter(self), 3, close, self.stats)


def test_candidates_take_turns_and_their_rates_are_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 0.1 s a batch of `a`, 0.2 s a batch of `b`."""
    log: list[str] = []
    monkeypatch.setattr(
        "mvp_fast.loaders.measure.time.perf_counter", lambda: 0.1 * log.count("a") + 0.2 * log.count("b")
    )
    monkeypatch.setattr("mvp_fast.loaders.measure.time.sleep", lambda seconds: None)
    a, b = Steps(log, "a"), Steps(log, "b")
    measured, failed = measure([Candidate("a", a.passage), Candidate("b", b.passage, peer=True)], BATCH, ROUNDS * 1.0)
    assert failed == {}
    assert [(found.name, found.peer) for found in measured] == [("a", False), ("b", True)]
    for found, seconds in zip(measured, (0.1, 0.2), strict=True):
        assert found.first_batch == pytest.approx(seconds)
        assert found.rates == pytest.approx([BATCH / seconds] * ROUNDS)
        assert found.rate == pytest.approx(BATCH / seconds)
        assert found.percentile(50) == pytest.approx(seconds)
        assert found.percentile(99) == pytest.approx(seconds)
        assert found.stages == {"decode": pytest.approx(BATCH / 0.5)}
    turns = "".join(log)[2:]
    assert len(set(turns.replace("b", " ").split())) <= 2  # as many each time, but for the clock's last bits
    assert turns.replace("ab", "a b").replace("ba", "b a").count(" ") == 2 * ROUNDS - 1
    assert (a.closed, b.closed) == (1, 1)


@pytest.mark.parametrize("fail_at", [0, 1, 9])
def test_who_fails_leaves_with_the_reason_and_the_others_go_on(fail_at: int) -> None:
    log: list[str] = []
    bad, good = Steps(log, "bad", fail_at), Steps(log, "good")

    def missing() -> Passage:
        raise EnvironmentProblem("It is not installed")

    candidates = [Candidate("missing", missing), Candidate("bad", bad.passage), Candidate("good", good.passage)]
    measured, failed = measure(candidates, BATCH, 1e-6)
    assert [found.name for found in measured] == ["good"]
    assert len(measured[0].rates) == ROUNDS
    assert {name: str(error) for name, error in failed.items()} == {
        "missing": "It is not installed.",
        "bad": "too many bad samples.",
    }
    assert (bad.closed, good.closed) == (1, 1)


def test_an_error_of_ours_is_not_hidden_and_all_passages_are_closed() -> None:
    steps = Steps([], "a")

    def broken() -> Passage:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure([Candidate("a", steps.passage), Candidate("b", broken)], BATCH, 1e-6)
    assert steps.closed == 1


def test_all_backends_are_measured_or_left_out_with_the_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: str, loader: str, *rest: str) -> None:
        if loader == "dali":
            raise EnvironmentProblem("The loader `dali` needs something", fix="Install it")

    monkeypatch.setattr(registry, "_need", refuse)
    out, threads = tmp_path / "deep" / "out.json", threading.active_count()
    assert main(["data", "bench", str(folder), *SHORT, "--json", str(out), "--gpu-rate", "1000"]) == 0
    assert threading.active_count() == threads
    shown = capsys.readouterr().out
    assert "left out  dali: The loader `dali` needs something. Install it." in shown
    assert "left out  synthetic: It reads no files" in shown
    assert "left out  dali on the GPU: It needs a CUDA device" in shown
    result = json.loads(out.read_text())
    names = [each["name"] for each in result["backends"]]
    assert sorted([*names, *result["left_out"]]) == sorted([*registry.LOADERS, "dali on the GPU"])
    for each in result["backends"]:
        assert len(each["rounds"]) == ROUNDS
        assert each["images_per_second"] > 0
        assert each["images_per_second_a_core"] == pytest.approx(each["images_per_second"] / 2)
        assert each["feeds_gpus"] == pytest.approx(each["images_per_second"] / 1000)
        assert each["batch_seconds"]["p99"] >= each["batch_seconds"]["p50"] > 0
        assert set(each["stage_images_per_second"]) == {"read", "decode", "transform"}
        assert f" {each['name']} " in shown
    best = max(result["backends"], key=lambda each: each["images_per_second"])
    assert f"{best['name']} feeds {best['feeds_gpus']:.2g} GPUs at 1,000 images/s\n" in shown
    assert (result["threads"], result["device"], result["images"]) == (2, "cpu", 16)


def test_the_default_rate_is_told_to_be_computed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "bench", str(folder), *SHORT, "--backend", "synthetic"]) == 0
    shown = capsys.readouterr().out
    assert "at 3,402 images/s (computed for an H100, not measured: --gpu-rate)" in shown
    assert "left out" not in shown


@pytest.mark.slow
def test_peers_of_the_checkout(folder: Path) -> None:
    words = ["data", "bench", str(folder), *SHORT, "--backend", "cpu", "--peers"]
    done = subprocess.run([sys.executable, "-m", "mvp_fast", *words], capture_output=True, text=True, check=True)
    for name in ("DataLoader, Pillow", "DataLoader, tensors", "DALI random crop", "SPDL, tensors"):
        assert f"{name} (peer)" in done.stdout
    assert "feeds     cpu feeds" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--backend", "cup"], 2, "There is no backend `cup` (--backend). Did you mean `cpu`?"),
        (["--backend", "qqqq"], 2, "Choose from all, dali, cpu"),
        (["--seconds", "0"], 2, "0 is no amount to measure with (--seconds)"),
        (["--seconds", "nan"], 2, "nan is no amount to measure with (--seconds)"),
        (["--batch-size", "-1"], 2, "-1 is no amount to measure with (--batch-size)"),
        (["--gpu-rate", "inf"], 2, "inf is no amount to measure with (--gpu-rate)"),
        (["--threads", "-2"], 2, "-2 threads can't work (--threads)"),
    ],
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str) -> None:
    assert main(["data", "bench", str(folder), *words]) == code
    assert says in capsys.readouterr().err


def test_bad_places(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["data", "bench", str(tmp_path / "none")]) == 3
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert main(["data", "bench", str(folder), *SHORT, "--json", str(tmp_path)]) == 3
    assert "Give --json a file name" in capsys.readouterr().err
    monkeypatch.setattr(verb, "__file__", str(tmp_path / "mvp_fast" / "cli" / "data" / "bench.py"))
    assert main(["data", "bench", str(folder), *SHORT, "--peers"]) == 4
    assert "The peers are not installed with the package" in capsys.readouterr().err


def test_one_backend_that_is_not_there_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: Any) -> None:
        raise EnvironmentProblem("The loader needs something", fix="Install it")

    monkeypatch.setattr(registry, "_need", refuse)
    assert main(["data", "bench", str(folder), *SHORT, "--backend", "cpu"]) == 4
    assert "The loader needs something. Install it." in capsys.readouterr().err


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_cuda_without_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "bench", str(folder), "--device", "cuda"]) == 4
    assert "There is no CUDA device (--device cuda)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "decode", "names"),
    [
        ("cuda", "auto", ["dali", "cpu", verb.ON_CPU]),
        ("cuda", "gpu", ["dali", "cpu"]),
        ("cpu", "auto", ["dali", "cpu"]),
    ],
)
def test_on_a_gpu_dali_is_measured_decoding_there_and_here(
    folder: Path, device: str, decode: Any, names: list[str]
) -> None:
    config = Config(data=DataConfig(decode=decode))
    found = verb._candidates(verb.Options(str(folder)), ["dali", "cpu"], config, Index.open(folder), 2, device)
    assert [candidate.name for candidate in found] == names
