"""`mvp-fast train --profile` on real steps: it adds up, finds what is slow, and touches nothing but RUN/profile/."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_fast.cli.train import main
from mvp_fast.config.load import parse_overrides
from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.loaders.synthetic import SyntheticLoader
from mvp_fast.models.teachers.clip import ClipTeacher
from mvp_fast.train.build import build_run
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.profile.measure import TRACED, WARM_UP, Taken, take
from mvp_fast.train.profile.recorder import Recorder
from mvp_fast.train.profile.session import profile
from mvp_fast.train.profile.timeline import HOST_TRACK, LOADER_TRACK
from mvp_fast.train.stages import STAGES, unrecorded
from mvp_fast.train.step import TrainStep
from tests.conftest import TINY, Launcher, arguments
from tests.test_profile_trace import check_trace, tracks

CPU = Ranks(0, 1, 1, torch.device("cpu"))
STEPS = 5
FILES = {"report.html", "stages.json", "trace.json.gz"}
# On the critical path of every step on a CPU.
STAGES_OF_A_STEP = set(STAGES) - {"load"}


def config_of(scenes: Path, run: Path, **overrides: Any) -> Config:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
    settings = {**TINY, "data.index": scenes, "run.dir": run, "data.loader": "torchvision", **named}
    return parse_overrides(Config(), arguments(settings), "test", "")


def taken_of(config: Config, steps: int = STEPS) -> Taken:
    return take(build_run(config, CPU, None), steps, None, lambda text: None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_stages_on_the_critical_path_add_up_to_the_step(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a clock of its own, read where a step ends; and by another way, no time is in two stages."""
    clocks: list[list[float]] = []
    begin, mark = Recorder.begin, Recorder.mark

    def begun(self: Recorder) -> None:
        clocks.append([])
        begin(self)

    def marked(self: Recorder) -> None:
        mark(self)
        clocks[-1].append(time.perf_counter())

    monkeypatch.setattr(Recorder, "begin", begun)
    monkeypatch.setattr(Recorder, "mark", marked)
    taken = taken_of(config_of(scenes, tmp_path, data__loader="synthetic", train__accumulate=2))
    measured, real, timeline = clocks[0], taken.stretches["real"], taken.real
    assert len(measured) == STEPS + 1
    assert sum(real.critical.values()) == pytest.approx((measured[-1] - measured[0]) / STEPS, rel=0.03)
    assert set(real.critical) == STAGES_OF_A_STEP
    # The thread that steps leaves a stage before it enters the next one: as they stand, they leave `host` over.
    begin_of_all, end_of_all = timeline.marks[0], timeline.marks[-1]
    own = [s for s in timeline.spans if s.track == HOST_TRACK and begin_of_all <= s.start < end_of_all]
    assert all(before.end <= after.start for before, after in pairwise(own))
    assert {s.stage: 0 for s in own}.keys() == STAGES_OF_A_STEP - {"host"}
    named = sum(s.seconds for s in own) / STEPS
    assert named + real.critical["host"] == pytest.approx(real.step, rel=1e-6)


def test_a_stage_that_is_slow_is_the_one_that_shows_it(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ClipTeacher.forward

    def slow(self: ClipTeacher, *given: Any) -> Any:
        time.sleep(0.25)
        return forward(self, *given)

    monkeypatch.setattr(ClipTeacher, "forward", slow)
    real = taken_of(config_of(scenes, tmp_path, data__loader="synthetic"), 2).stretches["real"]
    assert real.critical["teacher"] >= 0.25
    assert max(real.critical, key=lambda stage: real.critical[stage]) == "teacher"
    assert real.step >= 0.25


def test_a_slow_loader_shows_as_waiting(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is begun when the step before it has ended, and takes half a second; resident batches are at hand."""
    from mvp_fast.loaders.torchvision import TorchvisionLoader

    batches, call, ended = TorchvisionLoader.batches, TrainStep.__call__, threading.Semaphore(1)

    def slow(self: Any, *given: Any) -> Any:
        for batch in batches(self, *given):
            ended.acquire(timeout=60)
            time.sleep(0.5)
            yield batch

    def step(self: TrainStep, batch: Any, following: Any = None) -> Any:
        result = call(self, batch, following)
        ended.release()
        return result

    monkeypatch.setattr(TorchvisionLoader, "batches", slow)
    monkeypatch.setattr(TrainStep, "__call__", step)
    taken = taken_of(config_of(scenes, tmp_path), 3)
    real = taken.stretches["real"]
    assert real.critical["data wait"] > 0.25  # the host's own work after a step is taken off
    assert real.busy["load"] >= 0.5
    assert "load" not in real.critical  # it is beside the step, not in it
    assert LOADER_TRACK in taken.real.tracks
    assert taken.synthetic is not None
    assert {"data wait", "load"} & set(taken.stretches["synthetic"].busy) == {"data wait", "load"}


def test_the_steps_are_the_loops_own(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as were asked for, of the plan's batches in their order, updated as in training."""
    seen: list[int] = []
    call = TrainStep.__call__

    def counted(self: TrainStep, batch: Any, following: Any = None) -> Any:
        seen.append(batch.step)
        return call(self, batch, following)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    config = config_of(scenes, tmp_path, train__ema_decay=0.9)
    run = build_run(config, CPU, None)
    before = {name: weight.clone() for name, weight in run.student.named_parameters()}
    taken = take(run, STEPS, None, lambda text: None)
    own = WARM_UP["cpu"] + config.data.prefetch + 1 + STEPS + 1 + TRACED
    assert seen == list(range(own + config.data.prefetch + 2 + STEPS))
    assert run.steps_done == len(seen)
    assert all(bool((weight != before[name]).any()) for name, weight in run.student.named_parameters())
    assert taken.synthetic is not None
    assert taken.real.steps == taken.synthetic.steps == STEPS
    assert {"student weights", "gradients", "optimizer state", "averaged weights", "teacher"} <= set(taken.memory)


def test_a_profile_writes_its_folder_and_leaves_a_run_as_it_was(
    scenes: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [
        *arguments({**TINY, "data.index": scenes, "run.dir": run, "data.loader": "torchvision"}),
        "--train.steps",
        "2",
    ]
    launcher.run("train", *words)
    before = contents(run)
    process = launcher.run("train", *words, "--profile", "3", "--resume", "auto")
    after = contents(run)
    assert {path: content for path, content in after.items() if path.parts[0] != "profile"} == before
    assert {path.name for path in after if path.parts[0] == "profile"} == FILES
    for said in ("Where a step's time goes, 3 steps", "student forward", "images/s", "profile/report.html"):
        assert said in process.out
    numbers = json.loads((run / "profile" / "stages.json").read_text())
    critical = sum(stage["critical_milliseconds"] for stage in numbers["stages"].values())
    assert critical == pytest.approx(numbers["step_milliseconds"], rel=1e-6)
    assert numbers["verdict"][0] in " ".join(process.out.split())
    assert 0 < numbers["share_of_matmul"] < 1
    assert numbers["measured"]["rates"]["copy"] > 0
    trace = json.loads(gzip.decompress((run / "profile" / "trace.json.gz").read_bytes()))
    check_trace(trace)
    assert list(tracks(trace, 1)) == ["steps", "critical path", HOST_TRACK, LOADER_TRACK]
    assert list(tracks(trace, 2))[2] == HOST_TRACK  # with resident batches
    # torch's operators lie in the stages that ran them, on one clock.
    traced = tracks(trace, 3)[HOST_TRACK]
    forward = [event for event in traced if event["name"] == "student forward"]
    products = [
        event for event in trace["traceEvents"] if event.get("cat") == "cpu_op" and event["name"] == "aten::addmm"
    ]
    ends = [(event["ts"] - 50, event["ts"] + event["dur"] + 50) for event in forward]  # 50 us: entering takes time
    inside = [p for p in products for start, end in ends if start <= p["ts"] and p["ts"] + p["dur"] <= end]
    assert len(forward) == TRACED
    assert len(inside) >= TRACED * 2 * 4
    launcher.run("train", *words, "--resume", "auto")  # the run goes on as if nothing had been


def test_a_run_can_begin_where_only_a_profile_was(scenes: Path, launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments({**TINY, "data.index": scenes, "run.dir": run, "data.loader": "synthetic", "train.steps": 1})
    launcher.run("train", "--profile=1", *words)
    assert {path.name for path in run.iterdir()} == {"profile"}
    launcher.run("train", *words)


def test_two_ranks_take_the_same_steps_and_the_first_one_reports(
    scenes: Path, launcher: Launcher, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    settings = {**TINY, "data.index": scenes, "run.dir": tmp_path / "run", "data.loader": "torchvision"}
    words = ["train", "--profile", "2", *arguments(settings)]
    ranks = [launcher.start(*words, env={**common, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    for rank in ranks:
        assert rank.wait() == 0, rank.err
    assert ranks[1].out == ""
    assert "ms before the ranks meet, the slowest" in ranks[0].out
    measured = json.loads((tmp_path / "run" / "profile" / "stages.json").read_text())["measured"]
    first, second = measured["ranks"]
    assert (first["rank"], second["rank"]) == (0, 1)
    # They step together: each has half of the images, in the same time but for the ends.
    assert first["images_per_second"] == pytest.approx(second["images_per_second"], rel=0.5)
    assert first["alone"] > 0
    assert second["alone"] > 0
    assert '<section id="ranks">' in (tmp_path / "run" / "profile" / "report.html").read_text()


@pytest.mark.parametrize("words", [["--profile", "0"], ["--profile", "-3"], ["--profile=two"], ["--profile=1.5"]])
def test_a_number_of_steps_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no number of steps to measure \(--profile\)"):
        main([*words, "--data.loader", "synthetic"])


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr("mvp_fast.train.profile.session.build_run", lambda *given: pytest.fail("it went to work"))
    with pytest.raises(EnvironmentProblem, match=r"The profile can't be written: .*run/profile") as problem:
        profile(dataclasses.replace(Config(), run=dataclasses.replace(Config().run, dir=str(tmp_path / "run"))), CPU, 2)
    assert problem.value.exit_code == 4


def test_data_that_fails_ends_the_profile(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = SyntheticLoader.batches

    def failing(self: SyntheticLoader, *given: Any) -> Any:
        for number, batch in enumerate(batches(self, *given)):
            if number == 4:
                raise DataError("The file is gone")
            yield batch

    monkeypatch.setattr(SyntheticLoader, "batches", failing)
    with pytest.raises(DataError, match="The file is gone"):
        taken_of(config_of(scenes, tmp_path, data__loader="synthetic"))


def test_a_usual_run_records_nothing(scenes: Path, tmp_path: Path) -> None:
    """The step keeps the recorder that does nothing, and no part of the profiler is even imported."""
    words = arguments({**TINY, "run.dir": tmp_path / "run", "data.loader": "synthetic", "train.steps": 1})
    code = (
        "import sys\nfrom mvp_fast.cli.main import main\n"
        f"assert main({['train', *map(str, words)]!r}) == 0\n"
        "print('PROFILER', [name for name in sys.modules if name.startswith('mvp_fast.train.profile')])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "PROFILER []"
    assert build_run(config_of(scenes, tmp_path), CPU, None).step.stage is unrecorded


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--profile [STEPS]" in capsys.readouterr().out
