"""Tries `mvp-fast bench --against` on what is known: a revision against itself, and against planted slowdowns of 15 %.

    python benchmarks/self_check.py [--comparisons 20] [--seconds 5] [--planted-seconds 20] [--out FILE]

In a temporary repository made of the working tree's sources, with the three benchmarks of self_check_cases.py. A
revision against itself must give no alarm in any comparison. Each slowdown is one commit: the function does 15 % more
work, measured by the clock, and must be found, in its benchmark. Prints a table, and writes all that the comparisons
have written to benchmarks/results/self-check/<device>/. Exit code 1 where one did not give what it must.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "self-check"
CASES = "benchmarks/self_check_cases.py"
SCHEMA, SHARE = 1, 0.15
PARTS = ("mvp_fast", "kernels", "benchmarks", "configs", "pyproject.toml", "constraints.txt", ".gitignore")

# What is appended to a file: whatever the function takes, it goes on computing for that share longer.
SLOWER = """

def _slower(work, share):
    import time

    import numpy as np

    ground = np.ones(64)

    def slow(*args, **kwargs):
        start = time.perf_counter()
        result = work(*args, **kwargs)
        end = time.perf_counter()
        end += share * (end - start)
        while time.perf_counter() < end:
            np.sqrt(ground).sum()
        return result

    return slow


{name} = _slower({name}, {share})
"""


@dataclass(frozen=True)
class Plant:
    """A slowdown: the function `name` of `file`, and the benchmark that has to tell."""

    file: str
    name: str
    benchmark: str


PLANTS = {
    "loader": Plant("mvp_fast/loaders/pooled.py", "settle", "self_check_cases.py::test_loader"),
    "kernel": Plant("kernels/mvp_kernels/reference.py", "token_norm", "self_check_cases.py::test_kernel"),
    "step": Plant("mvp_fast/train/step.py", "TrainStep.__call__", "self_check_cases.py::test_step"),
}


def git(repo: Path, *words: str) -> str:
    """Run a git command in a repository of our own; returns what it prints."""
    who = ["-c", "user.name=self-check", "-c", "user.email=self-check@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, "-C", str(repo), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """A repository with one commit: the working tree's sources as they are, the recorded results left out."""
    folder.mkdir(parents=True)
    for part in PARTS:
        if (REPO / part).is_dir():
            shutil.copytree(REPO / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(REPO / part, folder / part)
    git(folder, "init", "--quiet")
    commit(folder, "the working tree")
    return folder


def commit(repo: Path, message: str) -> None:
    """Commit all there is."""
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--message", message)


def plant(repo: Path, planted: Plant, share: float = SHARE) -> None:
    """Make a function take so much longer."""
    with (repo / planted.file).open("a") as file:
        file.write(SLOWER.format(name=planted.name, share=share))


def bench(repo: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`mvp-fast bench` of a repository."""
    command = [sys.executable, "-m", "mvp_fast", "bench", *words]
    return subprocess.run(command, cwd=repo, capture_output=True, text=True, env={**os.environ, **(env or {})})


def compare(repo: Path, base: str, seconds: float, out: Path) -> dict[str, Any]:
    """One comparison: exit code, what it printed, and its document."""
    done = bench(repo, CASES, "--against", base, "--seconds", str(seconds), "--json", str(out))
    document = json.loads(out.read_text()) if out.exists() else None
    out.unlink(missing_ok=True)
    return {"exit_code": done.returncode, "output": done.stdout + done.stderr, "document": document}


def verdicts(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Benchmark -> verdict."""
    return {each["name"]: each["verdict"] for each in (comparison["document"] or {}).get("benchmarks", [])}


def found(comparison: Mapping[str, Any], planted: Plant) -> bool:
    """Whether exactly the planted slowdown was told."""
    slower = [name for name, verdict in verdicts(comparison).items() if verdict == "slower"]
    return comparison["exit_code"] == 1 and slower == [planted.benchmark]


def row(what: str, good: bool, comparison: Mapping[str, Any]) -> str:
    """For the table."""
    parts = []
    for each in (comparison["document"] or {}).get("benchmarks", []):
        times, verdict = each["times_as_fast"], each["verdict"]
        figures = f"{times['ratio']:.3f} ({times['low']:.3f} to {times['high']:.3f}, {times['pairs']})" if times else ""
        short = "" if verdict.startswith("no difference") else f" {verdict}"
        parts.append(f"{each['name'].rpartition('_')[2]} {figures}{short}")
    return f"{what:<12} {'as it must' if good else 'WRONG':<10}  " + "; ".join(parts or [comparison["output"].strip()])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=20, help="of a revision with itself")
    parser.add_argument("--seconds", type=float, default=5.0, help="of rounds a benchmark, of a revision with itself")
    parser.add_argument("--planted-seconds", type=float, default=20.0, help="the same where a slowdown is to be found")
    parser.add_argument("--out", type=Path, help="the JSON file; its name says device, date and commit where missing")
    options = parser.parse_args(argv)
    selves: list[dict[str, Any]] = []
    planted: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mvp-self-check-") as folder:
        repo, out = make_repository(Path(folder) / "repository"), Path(folder) / "out.json"
        for number in range(options.comparisons):
            selves.append(compare(repo, "HEAD", options.seconds, out))
            print(row(f"self {number + 1}", selves[-1]["exit_code"] == 0, selves[-1]), flush=True)
        for name, each in PLANTS.items():
            plant(repo, each)
            commit(repo, name)
            planted[name] = compare(repo, "HEAD~1", options.planted_seconds, out)
            print(row(f"{name} +{SHARE:.0%}", found(planted[name], each), planted[name]), flush=True)
            git(repo, "reset", "--quiet", "--hard", "HEAD~1")
    quiet = sum(each["exit_code"] == 0 for each in selves)
    told = sum(found(planted[name], each) for name, each in PLANTS.items())
    void = sum(list(verdicts(each).values()).count("void") for each in [*selves, *planted.values()])
    print(
        f"{quiet} of {len(selves)} comparisons of a revision with itself without an alarm; {told} of {len(PLANTS)}"
        f" slowdowns of {SHARE:.0%} found; {void} benchmarks void"
    )
    documents = [each["document"] for each in [*selves, *planted.values()] if each["document"]]
    _write(options, documents, {"quiet": quiet, "found": told, "void": void, "selves": selves, "planted": planted})
    return 0 if quiet == len(selves) and told == len(PLANTS) else 1


def _write(options: argparse.Namespace, documents: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    """Write the JSON file, beside and then renamed."""
    machine = next((each["current"]["machine"] for each in documents if each["current"]["machine"]), None)
    head = git(REPO, "rev-parse", "HEAD")
    now = datetime.datetime.now(datetime.UTC)
    where = RESULTS / (machine["device"] if machine else "unknown") / f"{now:%Y%m%dT%H%M%SZ}-{head[:10]}.json"
    path = options.out or where
    about = {"schema": SCHEMA, "kind": "self-check", "date": now.isoformat(timespec="seconds"), "commit": head}
    about["dirty"] = bool(git(REPO, "status", "--porcelain", "--", ".", ":!benchmarks/results"))
    settings = {name: vars(options)[name] for name in ("comparisons", "seconds", "planted_seconds")}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    text = json.dumps({**about, "settings": {**settings, "share": SHARE}, **content}, separators=(",", ":"))
    beside.write_text(text.replace(sys.executable, "python") + "\n")  # where it lies is of no use to others
    beside.replace(path)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
