"""Shared by all tests: small real image sets, the command line in a process of its own, and a tiny run's settings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # no dearer than in pytest_collection_modifyitems below, which every run comes to

# Triton takes this in when it is imported. Where there is no GPU its interpreter runs the kernels, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A pytest that a test starts is no worker of this one; pytest-benchmark takes it for one and measures nothing.
os.environ.pop("PYTEST_XDIST_WORKER", None)

REPO = Path(__file__).resolve().parents[1]

# A run that takes a fraction of a second a step on a CPU: real parts, small sizes.
TINY = {
    "data.image-size": 64,
    "mask.patches": 6,
    "mask.min-block": 2,
    "student.width": 64,
    "student.depth": 2,
    "student.heads": 2,
    "teacher.name": "ViT-S-16",
    "teacher.pretrained": "random",
    "train.batch-size": 8,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.log-every": 1,
    "optim.reference-batch-size": 8,
    "run.tensorboard": False,
    "data.threads": 2,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are left out, not skipped, where there is no GPU: a run's count tells what was run."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 small scenes with an index; read only."""
    folder = tmp_path_factory.mktemp("scenes")
    run_verb("data", "scenes", "--out", folder, "--images", 96, "--profile", "small", "--workers", 1)
    run_verb("data", "index", folder)
    return folder


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line overrides."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def run_verb(*words: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `mvp-fast` in a process of its own; with `check`, a failure shows what it printed."""
    command = [sys.executable, "-m", "mvp_fast", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **options.pop("env", {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The settings of a tiny run, as the command line names them."""
    return dict(TINY)


@pytest.fixture
def train(scenes: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call `mvp-fast train` with the tiny settings; keywords with `__` for the dot override them."""

    def call(run: Path | None = None, check: bool = True, **overrides: Any) -> subprocess.CompletedProcess[str]:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        settings = {"data.index": scenes, "run.dir": run or tmp_path / "run", **TINY, **named}
        return run_verb("train", *arguments(settings), check=check)

    return call


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """The loss at each step."""
    return {line["step"]: line["loss"] for line in read_metrics(run)}


class Process:
    """A process that `Launcher` started."""

    def __init__(self, launcher: Launcher, pid: int, out: Path, err: Path) -> None:
        self._launcher, self.pid, self._out, self._err = launcher, pid, out, err
        self.code: int | None = None

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        """What it has printed on standard error so far."""
        return self._err.read_text() if self._err.exists() else ""

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        if self.code is None:
            self.code = self._launcher.ask({"poll": self.pid})["code"]
        return self.code

    def wait(self) -> int:
        """The exit code, as soon as there is one."""
        self.wait_until(lambda: self.poll() is not None)
        assert self.code is not None
        return self.code

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something; an error where the process ends before that, or nothing happens for minutes."""
        give_up = time.monotonic() + 200
        while not happened():
            assert time.monotonic() < give_up, f"it hangs\n{self.out}\n{self.err}"
            assert self.poll() is None or happened(), f"it ended early: {self.code}\n{self.out}\n{self.err}"
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.poll() is None, f"it has ended already: {self.code}\n{self.err}"
        os.kill(self.pid, number)


class Launcher:
    """Starts `mvp-fast` in processes of their own, without the seconds that the imports take; see fork_server.py."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, str(REPO / "tests" / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to the server and its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(self, *words: Any, env: dict[str, str] | None = None) -> Process:
        """Start one process and go on."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        request = {"argv": list(map(str, words)), "environment": env or {}, "out": str(out), "err": str(err)}
        return Process(self, self.ask(request)["pid"], out, err)

    def start_ranks(self, ranks: list[list[Any]]) -> list[Process]:
        """Start one process a list of words, with the environment that torchrun would give them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = len(ranks)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [
            self.start(*words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            for rank, words in enumerate(ranks)
        ]

    def run(self, *words: Any, code: int = 0) -> Process:
        """Start one process and wait for its end, which must come with this exit code."""
        process = self.start(*words)
        assert process.wait() == code, f"exit {process.code}\n{process.out}\n{process.err}"
        return process

    def close(self) -> None:
        """End the server and what it started."""
        self._server.communicate()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Processes of their own that start fast."""
    launcher = Launcher(tmp_path_factory.mktemp("processes"))
    yield launcher
    launcher.close()
