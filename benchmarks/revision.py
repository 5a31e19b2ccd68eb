"""The revision that is compared against: its commit, a worktree of it, and a Python with what it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mvp_fast.errors import ConfigError, EnvironmentProblem

PACKAGES = {"mvp_fast": "mvp_fast", "mvp_kernels": "kernels/mvp_kernels"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_LINES = 12


def git(repo: Path, *words: str) -> str:
    """What a git command prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    # In a hook git points to the repository, its index and its work tree, which are not those of the worktree.
    environment = {name: value for name, value in os.environ.items() if name not in _LOCAL}
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "-C", str(repo), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=True)
    return done.stdout.rstrip("\n")


_LOCAL = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")


def check_repository(repo: Path) -> None:
    """Make sure that `repo` is the top of a git work tree."""
    try:
        top = git(repo, "rev-parse", "--show-toplevel")
    except FileNotFoundError as error:
        raise EnvironmentProblem("git is not installed", fix="Install it; --against needs it") from error
    except subprocess.CalledProcessError as error:
        top = error.stderr.strip().splitlines()[-1] if error.stderr.strip() else ""
    if not os.path.isdir(top) or not os.path.samefile(top, repo):
        said = f", and git says: {top}" if top and not os.path.isdir(top) else ""
        raise EnvironmentProblem(
            f"The sources are no git work tree, so that there is no other revision of them{said}",
            where=str(repo),
            fix="Clone the repository with git, and run the benchmarks from there",
        )


def commit_of(repo: Path, revision: str) -> str:
    """The commit that `revision` names."""
    with suppress(subprocess.CalledProcessError):
        return git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    raise ConfigError(
        f"There is no revision `{revision}` here",
        where=f"--against, {repo}",
        fix="`git log --oneline --all` lists those there are; what is missing of a shallow clone comes with"
        " `git fetch --unshallow`, what only the server has with `git fetch`",
    )


def differences(repo: Path, leave_out: Sequence[Path]) -> list[str]:
    """Files that are not as committed, results and `leave_out` aside; new files count, ignored ones do not."""
    inside = [path.resolve() for path in leave_out]
    inside = [path.relative_to(repo) for path in inside if path.is_relative_to(repo)]
    but = [f":(exclude,literal){path}" for path in ("benchmarks/results", *inside)]
    return git(repo, "status", "--porcelain", "--untracked-files=all", "--", ".", *but).splitlines()


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off Ctrl-C and kill -TERM, also for processes started meanwhile: what is half made can't be cleaned up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, removed afterwards whatever happens."""
    folder = None
    try:
        with signals_held():
            folder = Path(tempfile.mkdtemp(prefix="mvp-bench-")).resolve()
        yield folder
    finally:
        with signals_held():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def worktree(repo: Path, commit: str, tree: Path) -> Iterator[Path]:
    """A checkout of `commit` in the folder `tree`, removed afterwards whatever happens."""
    try:
        with signals_held():
            _check_out(repo, commit, tree)
        yield tree
    finally:
        with signals_held():
            # By hand where git can't: nothing may be left that another command trips over.
            with suppress(subprocess.CalledProcessError):
                git(repo, "worktree", "remove", "--force", str(tree))
            shutil.rmtree(tree, ignore_errors=True)
            with suppress(subprocess.CalledProcessError):
                git(repo, "worktree", "prune")


def _check_out(repo: Path, commit: str, tree: Path) -> None:
    try:
        git(repo, "worktree", "add", "--detach", str(tree), commit)
    except subprocess.CalledProcessError as error:
        raise EnvironmentProblem(
            f"git can't check out {commit[:10]}: {last_lines(error.stderr)}",
            where=str(tree),
            fix="Make room, or set TMPDIR to a folder with room and the rights to write",
        ) from error


def link_packages(tree: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH that holds the tree's packages and nothing else: not its folder `kernels`, for one."""
    folder.mkdir()
    for name, place in PACKAGES.items():
        (folder / name).symlink_to(tree / place)
    return folder


def wrong_packages(hello: dict[str, str | None], tree: Path) -> list[str]:
    """Packages that a side has found elsewhere than in its tree, with the places."""
    expected = {name: (tree / place / "__init__.py").resolve() for name, place in PACKAGES.items()}
    return [
        f"{name} in {hello.get(name) or 'no place'}"
        for name, file in expected.items()
        if not hello.get(name) or Path(str(hello[name])).resolve() != file
    ]


@dataclass(frozen=True)
class Environment:
    """A Python to run a revision with.

    Attributes:
        python: the interpreter.
        words: where it comes from, for the reader.
    """

    python: str
    words: str


def environment(tree: Path, repo: Path, always_shared: bool = False) -> Environment:
    """The Python for `tree`: the one that runs this where both depend on the same, otherwise one of its own.

    Args:
        tree: the revision's checkout.
        repo: the checkout whose dependencies the running Python has.
        always_shared: take the running Python even where the dependencies differ.
    """
    theirs, ours = requirements(tree), requirements(repo)
    if theirs == ours:
        return Environment(sys.executable, "shared: both depend on the same")
    if always_shared:
        return Environment(sys.executable, "shared as told, although the two depend on different packages")
    return _build(tree, theirs)


def requirements(tree: Path) -> str:
    """What a checkout depends on, as text: two that give the same can share an environment."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    optional = project.get("optional-dependencies", {})
    parts = [project.get("requires-python"), sorted(project.get("dependencies", [])), sorted(optional.get("dev", []))]
    pins = tree / "constraints.txt"
    return json.dumps([*parts, sorted(pins.read_text().split("\n")) if pins.exists() else None])


def _build(tree: Path, asked: str) -> Environment:
    """An environment with what the tree depends on, as the Makefile makes it; kept, and made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvp_fast" / "environments"
    about = [asked, platform.python_version(), platform.machine()]
    folder = cache / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    python, done = folder / "bin" / "python", folder / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            print(f"The revision depends on other packages: an environment of its own is made in {folder}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            uv = _uv()
            _run(uv, "venv", "--python", sys.executable, str(folder), cwd=tree)
            pins = ["--constraint", "constraints.txt"] if (tree / "constraints.txt").exists() else []
            chosen = ["--requirements", "pyproject.toml", "--extra", "dev"]
            _run(uv, "pip", "install", "--python", str(python), *pins, *chosen, cwd=tree)
            done.touch()
    return Environment(str(python), f"its own, in {folder}")


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise EnvironmentProblem(
            "The revision depends on other packages, and uv, which would install them, is missing",
            fix="Run `make install`, or `pip install uv`; or take this environment for both with --environment shared",
        )
    return uv


def _run(uv: str, *words: str, cwd: Path) -> None:
    done = subprocess.run([uv, *words, "--quiet"], cwd=cwd, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise EnvironmentProblem(
            f"The revision's environment can't be made; `uv {words[0]}` says: {last_lines(done.stderr)}",
            where="pyproject.toml and constraints.txt of the revision",
            fix="Mend that, or take this environment for both revisions with --environment shared",
        )


def last_lines(text: str) -> str:
    """The end of what a process has printed, as one line."""
    return " / ".join(line.strip() for line in text.splitlines()[-LAST_LINES:] if line.strip()) or "nothing"
