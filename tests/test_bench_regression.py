"""`mvp-fast bench`, as it is run: in temporary repositories made of these sources, against revisions made for the test.

The thresholds are wide and what is planted is large, so that a busy machine does not decide; benchmarks/self_check.py
tries the usual threshold on slowdowns of 15 %.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from mvp_fast.cli.main import find_verb

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BRIEF = ("--threshold", "1", "--seconds", "1e-6")  # no time: the fewest pairs; and void needs arms that differ by half
WIDE = ("--threshold", "1", "--seconds", "1", "--counts", "tell")
MARK = "MVP_BENCH_TEST"

TINY = Path(__file__).with_name("tiny_benchmarks.py")
NEWER = "from test_tiny import measure\n\nfrom mvp_fast.newer import thing\n\n"
NEWER += "def test_newer(benchmark, session):\n    measure(benchmark, session, thing)\n"


def tool(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


self_check = tool("self_check")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: these sources with the tiny benchmarks, and one that adds to the package. Read only."""
    repo = self_check.make_repository(tmp_path_factory.mktemp("sources") / "repository")
    shutil.copy(TINY, repo / "benchmarks" / "test_tiny.py")
    (repo / "benchmarks" / "test_newer.py").write_text(NEWER)
    self_check.commit(repo, "benchmarks")
    with (repo / "mvp_fast" / "__init__.py").open("a") as file:
        file.write("\n\ndef added(number: int) -> int:\n    return number\n")
    (repo / "mvp_fast" / "newer.py").write_text("def thing() -> None:\n    pass\n")
    self_check.commit(repo, "something new")
    return repo


@pytest.fixture
def repo(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources, tmp_path / "repository"))


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`mvp-fast bench` in a repository; afterwards nothing of it may be left."""

    def call(repo: Path, *words: str, code: int, env: Mapping[str, str] | None = None) -> str:
        done = self_check.bench(repo, *words, env={**environment(tmp_path), **(env or {})})
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == code, said
        assert "\nTraceback" not in said
        nothing_is_left(repo, tmp_path)
        return str(done.stderr if code in (2, 4) else done.stdout)

    return call


def environment(folder: Path) -> dict[str, str]:
    """Temporary folders of its own, and a mark by which its processes are known."""
    (folder / "tmp").mkdir(exist_ok=True)
    return {"TMPDIR": str(folder / "tmp"), MARK: str(folder), "OMP_NUM_THREADS": "1"}


def nothing_is_left(repo: Path, folder: Path) -> None:
    assert not list((folder / "tmp").glob("mvp-bench-*"))
    if (repo / ".git").exists():
        assert len(self_check.git(repo, "worktree", "list").splitlines()) == 1
        assert not [*(repo / ".git").glob("worktrees/*")]
    assert not marked(folder)


def marked(folder: Path) -> list[list[str]]:
    """The command lines of this test's living processes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
    return found


def verdicts(document: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"].partition("::")[2]: each["verdict"] for each in document["benchmarks"]}


def one_paragraph(text: str, *parts: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("mvp-fast bench: ")]
    assert len(lines) == 1, text
    for part in parts:
        assert part in lines[0]


@pytest.mark.slow
def test_planted_slowdowns_are_found(repo: Path, tmp_path: Path, bench: Any) -> None:
    """Of a loader, a reference kernel and the training step; each so great that no other's could be taken for it."""
    for planted in self_check.PLANTS.values():
        self_check.plant(repo, planted, share=4.0)
    self_check.commit(repo, "slower")
    out, names = tmp_path / "out.json", [planted.benchmark for planted in self_check.PLANTS.values()]
    said = bench(repo, self_check.CASES, "--against", "HEAD~1", *WIDE, "--json", str(out), code=1)
    document = json.loads(out.read_text())
    assert ([each["name"] for each in document["benchmarks"]], document["exit_code"]) == (names, 1)
    for found in document["benchmarks"]:
        assert (found["verdict"], found["alarms"]) == ("slower", ["slower"])
        assert 0 < found["times_as_fast"]["high"] < 0.5
        assert found["again"], "an alarm is confirmed by fresh processes"
    assert f"Regression: {'; '.join(f'{name} (slower)' for name in names)}." in said


def test_a_revision_against_itself(repo: Path, tmp_path: Path, bench: Any) -> None:
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    words = ("--threshold", "1", "--seconds", "1000", "--json", str(out), "--markdown", str(table))
    said = bench(repo, "test_tiny.py::test_fine", "--against", "HEAD", *words, code=0)
    document = json.loads(out.read_text())
    (found,) = document["benchmarks"]
    head = self_check.git(repo, "rev-parse", "HEAD")
    assert (document["schema"], document["kind"], document["ended"]) == (1, "comparison", None)
    assert document["base"]["commit"] == document["current"]["commit"] == head
    assert (document["current"]["dirty"], document["current"]["differences"]) == (False, [])
    assert document["base"]["machine"]["environment"]["versions"]["torch"]
    assert found["verdict"] == "no difference that can be told"
    assert found["times_as_fast"]["pairs"] == len(found["rounds"]) == 101, "the most, however long it may take"
    assert [each["first"] for each in found["rounds"]][:4] == ["base", "current"] * 2
    assert all(each[side]["seconds"] > 0 for each in found["rounds"] for side in ("base", "current"))
    assert found["counts"]["base"] == found["counts"]["current"] == {"operations": 1, "written_bytes": 4}
    assert "1 of 1 benchmarks compared. No regression found." in said
    assert "| test_tiny.py::test_fine | " in table.read_text()


def test_what_an_old_revision_cannot_run_is_told_and_fails_nothing(repo: Path, tmp_path: Path, bench: Any) -> None:
    """A module it lacks, which ends a whole file, and a function it lacks; what comes after them is compared."""
    (repo / "README.md").write_text("in no commit")
    out = tmp_path / "out.json"
    files = ("benchmarks/test_newer.py", "test_tiny.py::test_api", "test_tiny.py::test_fine")
    said = bench(repo, *files, "--against", "HEAD~1", "--dirty", *BRIEF, "--json", str(out), code=0)
    document = json.loads(out.read_text())
    assert 5 <= len(document["benchmarks"][-1]["rounds"]) <= 7, "each look at an open result takes one more"
    assert (document["current"]["dirty"], document["current"]["differences"]) == (True, ["?? README.md"])
    assert verdicts(document) == {
        "test_newer": "not compared",
        "test_api": "not compared",
        "test_fine": "no difference that can be told",
    }
    assert "test_newer: does not run at HEAD~1: ModuleNotFoundError: No module named 'mvp_fast.newer'" in said
    assert "test_api: does not run at HEAD~1: AttributeError: module 'mvp_fast' has no attribute 'added'" in said


def test_more_operations_and_a_disagreement_are_regressions(repo: Path, tmp_path: Path, bench: Any) -> None:
    out, words = tmp_path / "out.json", (*BRIEF, "--json")
    files = ("test_tiny.py::test_disagrees", "test_tiny.py::test_more")
    said = bench(repo, *files, "--against", "HEAD~1", *words, str(out), code=1)
    broken, found = json.loads(out.read_text())["benchmarks"]
    assert (broken["verdict"], broken["again"]) == ("fails", [])
    assert "test_disagrees: fails: harness.Disagreement: test_tiny.py::test_disagrees: the variants do not" in said
    assert "one is not two" in said
    assert found["alarms"] == ["more operations", "more written bytes"]
    assert (found["counts"]["base"]["operations"], found["counts"]["current"]["operations"]) == (2, 3)
    assert len(found["again"]) == 1
    assert "test_disagrees (fails); test_tiny.py::test_more (more operations, more written bytes)." in said


@pytest.mark.parametrize(("side", "code"), [("current", 1), ("base", 4)])
def test_a_side_that_dies_ends_the_comparison_and_nothing_is_lost(
    repo: Path, tmp_path: Path, bench: Any, side: str, code: int
) -> None:
    """The working tree that dies is a regression, the other one is not."""
    out = tmp_path / "out.json"
    files = ("test_tiny.py::test_fine", "test_tiny.py::test_dies")
    bench(repo, *files, "--against", "HEAD~1", *BRIEF, "--json", str(out), code=code, env={"DIES": side})
    document = json.loads(out.read_text())
    assert verdicts(document) == {"test_fine": "no difference that can be told"}
    whose = "the working tree's" if side == "current" else "HEAD~1's"
    assert document["ended"].startswith(f"{whose} process has ended: it was ended by SIGKILL. Its last lines: ")
    assert document["ended"].endswith("the last words")
    assert document["exit_code"] == code


def test_packages_of_the_wrong_tree_are_refused(repo: Path, tmp_path: Path, bench: Any) -> None:
    """Something puts the working tree before the worktree: both sides would measure the same."""
    (tmp_path / "site").mkdir()
    code = f"import sys\nsys.path[:0] = [{str(repo)!r}, {str(repo / 'kernels')!r}]\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    words = ("test_tiny.py::test_fine", "--against", "HEAD~1", *BRIEF)
    said = bench(repo, *words, code=4, env={"PYTHONPATH": str(tmp_path / "site")})
    one_paragraph(said, "The base side would measure packages of another revision", f"mvp_fast in {repo}/mvp_fast/")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(repo: Path, tmp_path: Path, number: int) -> None:
    """In the middle of a round whose work is a process of its own that never ends."""
    out, log = tmp_path / "out.json", tmp_path / "log"
    files = ["test_tiny.py::test_fine", "test_tiny.py::test_hangs"]
    command = [sys.executable, "-m", "mvp_fast", "bench", *files, "--against", "HEAD~1", *BRIEF, "--json", str(out)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=repo, env={**os.environ, **environment(tmp_path)}, stdout=file, stderr=file
        )
    while not any("input()" in words for words in marked(tmp_path)):
        assert process.poll() is None, log.read_text()
    assert len(self_check.git(repo, "worktree", "list").splitlines()) == 2
    process.send_signal(number)
    assert process.wait(100) == 128 + number, log.read_text()
    nothing_is_left(repo, tmp_path)
    assert "Traceback" not in log.read_text()
    document = json.loads(out.read_text())
    assert verdicts(document) == {"test_fine": "no difference that can be told"}
    assert document["ended"] == f"stopped by {number.name}"


def test_other_dependencies_get_an_environment_of_their_own_once(repo: Path, tmp_path: Path, bench: Any) -> None:
    """The base depends on nothing. Its environment then borrows this one's packages, and must be found again."""
    settings = repo / "pyproject.toml"
    original = settings.read_text()
    settings.write_text('[project]\nname = "mvp-fast"\nversion = "0"\n[project.optional-dependencies]\ndev = []\n')
    self_check.commit(repo, "without dependencies")
    settings.write_text(original)
    self_check.commit(repo, "with them again")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "UV_OFFLINE": "1"}
    out = tmp_path / "out.json"
    words = ("test_tiny.py::test_fine", "--against", "HEAD~1", *BRIEF, "--json", str(out))
    bench(repo, *words, code=4, env=cache)
    assert "No module named 'pytest'" in json.loads(out.read_text())["ended"]
    (made,) = (path for path in (tmp_path / "cache" / "mvp_fast" / "environments").iterdir() if path.is_dir())
    (theirs,) = made.glob("lib/python*/site-packages")
    (theirs / "borrowed.pth").write_text(str(Path(pytest.__file__).parents[1]))
    said = bench(repo, *words, "--short", code=0, env=cache)
    assert "test_fine: is left out: its rounds are too long for the short form: " in said
    document = json.loads(out.read_text())
    assert document["base"]["python"] == str(made / "bin" / "python")
    assert document["current"]["python"] == sys.executable
    assert f"environment its own, in {made}" in said
    assert (theirs / "borrowed.pth").exists()
    revision = tool("revision")
    settings.write_text("[project]\n")
    assert revision.environment(repo, BENCHMARKS.parent, always_shared=True).python == sys.executable
    assert revision.environment(repo, repo).words == "shared: both depend on the same"


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("--against", "nowhere"), 2, ("There is no revision `nowhere` here", "git log")),
        (("--against", "HEAD~1", "--threshold", "5"), 2, ("5.0 is out of range (--threshold)", "0.05 for 5 %")),
        (("--against", "HEAD~1", "--record"), 2, ("--record", "--json FILE")),
        (("--dirty",), 2, ("--against REV",)),
        (("test_none.py",), 2, ("There is no benchmark `test_none.py` (FILES)", "test_*.py")),
        (("../pyproject.toml",), 2, ("There is no benchmark",)),
        (("test_tiny.py", "--against", "HEAD~1", "--device", "cuda"), 4, ("torch finds none", "--device cpu")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_is_told_in_one_paragraph(
    sources: Path, bench: Any, words: tuple[str, ...], code: int, parts: tuple[str, ...]
) -> None:
    one_paragraph(bench(sources, *words, code=code, env={"CUDA_VISIBLE_DEVICES": ""}), *parts)


def test_a_dirty_tree_is_told(repo: Path, bench: Any) -> None:
    """Changed and new files both; what the verb itself writes, and ignored files, are no difference."""
    (repo / ".gitignore").write_text("*.log\n")
    (repo / "some.log").touch()
    (repo / "mvp_fast" / "new.py").touch()
    (repo / "out.json").touch()
    said = bench(repo, "--against", "HEAD~1", "--json", "out.json", code=2)
    one_paragraph(said, "differs from its commit in 2 files (.gitignore, mvp_fast/new.py)", "--dirty")


def test_sources_without_a_repository_are_told(repo: Path, bench: Any) -> None:
    shutil.rmtree(repo / ".git")
    one_paragraph(bench(repo, "--against", "HEAD", code=4), "no git work tree", "Clone the repository")


def test_a_package_without_its_checkout_has_no_benchmarks(repo: Path, tmp_path: Path, bench: Any) -> None:
    shutil.copytree(repo / "mvp_fast", tmp_path / "installed" / "mvp_fast")
    one_paragraph(bench(tmp_path / "installed", code=4), "run from a checkout", "make install")


def test_alone_it_is_pytest(repo: Path, tmp_path: Path, bench: Any) -> None:
    out, paths = tmp_path / "out.json", {"PYTHONPATH": f"{repo}{os.pathsep}{repo / 'kernels'}"}
    bench(repo, "test_tiny.py::test_fine", "--short", "--json", str(out), code=0, env=paths)
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["name"] == "test_fine"
    bench(repo, "test_tiny.py::test_disagrees", "--json", str(out), code=1, env=paths)
    assert json.loads(out.read_text())["benchmarks"], "what an earlier run has written stays"
    one_paragraph(bench(repo, "test_tiny.py::test_fine", code=4), "packages of another checkout: mvp_fast in ")


def test_a_side_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    process, python = tool("side_process"), tmp_path / "python"
    python.write_text("#!/bin/sh\necho not a word\nexec sleep 1000\n")
    python.chmod(0o755)
    side = process.Side(process.Source("base", str(python), tmp_path, tmp_path), tmp_path, [], tmp_path / "side", 0.2)
    try:
        with pytest.raises(process.Died, match="nothing for 0 seconds"):
            side.start()
        assert side.process.poll() is None
    finally:
        side.close()
    assert side.process.poll() == -signal.SIGTERM


def test_bench_and_bench_history_are_told_apart() -> None:
    assert find_verb(["bench", "history", "--docs"]) == ("bench history", ["--docs"])
    assert find_verb(["bench", "test_samples.py", "--short"]) == ("bench", ["test_samples.py", "--short"])
    assert find_verb(["bench"]) == ("bench", [])
