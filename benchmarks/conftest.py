"""What all benchmarks share: `--quick` for one short round each, `--record` to keep the results.

Benchmarks marked gpu are left out where there is no GPU. `--turns SOCKET` is for `mvp-fast bench --against`: rounds run
when the process behind the socket says so.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # benchmarks/ is no package: its helpers are found here

from harness import Session, clock
from recorder import Recorder
from turns import Turns

RECORDER = pytest.StashKey[Recorder]()
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mvp_fast")
    group.addoption("--quick", action="store_true", help="one short round of each benchmark: does it still run?")
    group.addoption("--record", action="store_true", help="write the results to benchmarks/results/")
    group.addoption("--turns", metavar="SOCKET", help="run rounds when told, beside another revision")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder()
    # The harness measures; for set-up, peers and calibration this clock stands still.
    config.option.benchmark_timer = f"{clock.__module__}.{clock.__name__}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    gpu = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    config.stash[LEFT_OUT] = len(gpu)
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    count = config.stash.get(LEFT_OUT, 0)
    return [f"{count} benchmarks left out: they need a CUDA device, and there is none"] if count else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if call.when == "call" and report.passed and benchmark is not None and benchmark.stats is not None:
        item.config.stash[RECORDER].add(item.nodeid, benchmark.stats.stats.data, benchmark.extra_info)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    for result in recorder.results:
        if "summary" in result["extra"]:
            terminalreporter.write_line(f"{result['name']}: {result['extra']['summary']}")
    if config.getoption("--record") and recorder.results:
        terminalreporter.write_line(f"recorded: {recorder.write()}")


@pytest.fixture(scope="session")
def _session(request: pytest.FixtureRequest) -> Session:
    socket = request.config.getoption("--turns")
    turns = Turns(socket, hello()) if socket else None
    return Session(bool(request.config.getoption("--quick")), turns)


@pytest.fixture
def session(_session: Session, request: pytest.FixtureRequest) -> Session:
    """For `harness.compare`: how all benchmarks run, under this one's name."""
    _session.name = request.node.nodeid.rpartition("/")[2]
    words = inspect.cleandoc(request.function.__doc__ or request.function.__name__).splitlines()[0]
    case = getattr(request.node, "callspec", None)
    _session.title = f"{words} [{case.id}]" if case else words
    return _session


def hello() -> dict[str, Any]:
    """What this process measures: where the packages were found, for the other side to check."""
    import mvp_fast
    import mvp_kernels

    return {"mvp_fast": str(mvp_fast.__file__), "mvp_kernels": str(mvp_kernels.__file__)}


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether one short round is enough."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def imagenet_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 ImageNet-shaped JPEG files with an index."""
    folder = tmp_path_factory.mktemp("scenes")
    verbs = (["scenes", "--out", str(folder), "--images", "64", "--profile", "imagenet"], ["index", str(folder)])
    for words in verbs:
        subprocess.run([sys.executable, "-m", "mvp_fast", "data", *words], check=True, stdout=subprocess.DEVNULL)
    return folder
