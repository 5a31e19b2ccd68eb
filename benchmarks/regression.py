"""`mvp-fast bench`: run the benchmarks, or compare the working tree's speed with another revision's.

The benchmarks themselves are the working tree's for both; the packages (mvp_fast, mvp_kernels) of the other revision
come from a worktree of it, which is removed afterwards. What is found to be worse is measured once more, in fresh
processes, and only what these say too is a regression.

Exit codes: 0 no regression was found; 1 a benchmark is slower by more than the threshold, counts more, or fails on the
working tree; 2 usage; 4 environment.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import comparison
import revision
from giver import LEAST_PAIRS, MOST_PAIRS, Measured, take_turns
from side_process import Died, Side, Source

from mvp_fast.cli.bench.run import Options
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.samples.files import replacing

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
SECONDS, SHORT_SECONDS, SHORT_TIMES, WIDTH = 20.0, 6.0, 10, 140
MARKS = {"auto": [], "cpu": ["-m", "not gpu"], "cuda": ["-m", "gpu"]}


class Stopped(BaseException):
    """Ctrl-C, kill -TERM or the end of the terminal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def main(options: Options, argv: Sequence[str]) -> int:
    """Run the verb; returns its exit code.

    Args:
        options: what was asked for.
        argv: how it was typed.
    """
    files = [_file(name) for name in options.files] or [str(HERE)]
    _check(options)
    if not options.against:
        return alone(options, files)
    for number in revision.STOPS:
        signal.signal(number, _stop)
    try:
        return against(options, files, argv)
    except Stopped as stopped:
        print(f"mvp-fast bench: {stopped}", file=sys.stderr)
        return 128 + stopped.number


def alone(options: Options, files: Sequence[str]) -> int:
    """Run pytest over the benchmarks; returns its exit code."""
    import pytest
    from side import WHERE

    found = subprocess.run([sys.executable, "-P", "-c", WHERE], stdout=subprocess.PIPE, check=True).stdout
    if wrong := revision.wrong_packages(json.loads(found), REPO):
        raise EnvironmentProblem(
            f"This Python would measure the packages of another checkout: {', '.join(wrong)}",
            where=str(REPO),
            fix="Run `make install` in this checkout, and its .venv/bin/mvp-fast bench",
        )
    words = [*files, *MARKS[options.device], *["--quick"] * options.short, *["--record"] * options.record]
    with contextlib.suppress(_NothingWritten), contextlib.ExitStack() as stack:
        out = stack.enter_context(replacing(Path(options.json), "--json")) if options.json else None
        code = int(pytest.main([*words, *([f"--benchmark-json={out.name}"] if out else [])]))
        if out and not os.path.getsize(out.name):
            raise _NothingWritten
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise _nothing_to_run(options)
    return code


class _NothingWritten(Exception):
    """There was nothing to measure; what an earlier run has written stays."""


@dataclass
class Outcome:
    """What has been found so far."""

    findings: list[comparison.Finding] = field(default_factory=list)
    ended: str | None = None
    code: int = 0
    machines: dict[str, Any] = field(default_factory=dict)


def against(options: Options, files: Sequence[str], argv: Sequence[str]) -> int:
    """Compare the working tree with another revision; returns the exit code."""
    revision.check_repository(REPO)
    commit, head = (revision.commit_of(REPO, name) for name in (options.against, "HEAD"))
    outputs = [Path(path) for path in (options.json, options.markdown) if path]
    differences = revision.differences(REPO, outputs)
    if differences and not options.dirty:
        raise ConfigError(
            f"The working tree differs from its commit in {len(differences)} files ({_some(differences)})",
            where=str(REPO),
            fix="Commit them, or compare the tree as it is with --dirty",
        )
    with contextlib.ExitStack() as stack:
        document_file, markdown_file = (
            stack.enter_context(replacing(Path(path), option)) if path else None
            for path, option in ((options.json, "--json"), (options.markdown, "--markdown"))
        )
        folder = stack.enter_context(revision.workplace())
        tree = stack.enter_context(revision.worktree(REPO, commit, folder / "tree"))
        _check_packages(tree, options.against)
        python = revision.environment(tree, REPO, options.environment == "shared")
        sources = (
            # Paths of the same length: they shift a process's memory, which can be seen in its speed.
            Source("base", python.python, tree, revision.link_packages(tree, folder / "packages-0")),
            Source("current", sys.executable, REPO, revision.link_packages(REPO, folder / "packages-1")),
        )
        about = f"with {len(differences)} files that are not as committed" if differences else "as committed"
        lines = [
            f"base     {commit[:10]} ({options.against}), environment {python.words}",
            f"current  {head[:10]}, {about}",
        ]
        print("\n".join(lines), flush=True)
        outcome = Outcome()
        _compare(options, files, sources, folder, outcome)
        last = comparison.summary(outcome.findings, outcome.ended)
        _show(outcome, last)
        document = {
            "schema": comparison.SCHEMA,
            "kind": "comparison",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": list(argv),
            "base": _side(sources[0], outcome, revision=options.against, commit=commit, environment=python.words),
            "current": _side(sources[1], outcome, commit=head, dirty=bool(differences), differences=differences),
            "settings": {
                "seconds": _seconds(options),
                "counts": options.counts,
                "least_pairs": LEAST_PAIRS,
                "most_pairs": MOST_PAIRS,
            },
            "benchmarks": [comparison.as_dict(finding) for finding in outcome.findings],
            "ended": outcome.ended,
            "exit_code": outcome.code,
        }
        _write(document_file, json.dumps(document, indent=1) + "\n")
        _write(markdown_file, comparison.markdown(outcome.findings, lines, last))
    return outcome.code


def _compare(options: Options, files: Sequence[str], sources: Sequence[Source], folder: Path, outcome: Outcome) -> None:
    """Measure, and measure again what is left open. What was found before an early end stays in `outcome`."""

    def measure(which: Sequence[str], place: str, use: Callable[[comparison.Finding], None]) -> None:
        words = ["-q", "--capture=no", "--tb=short", "-p", "no:cacheprovider", *MARKS[options.device], *which]
        with contextlib.ExitStack() as sides:
            (folder / place).mkdir()
            made = []
            for number, source in enumerate(sources):
                made.append(Side(source, REPO, words, folder / place / str(number)))
                sides.callback(made[-1].close)
            for measured in take_turns(*made, _seconds(options), unsure, longest):
                use(comparison.find(measured, options.threshold, options.against, options.counts == "fail"))
            outcome.machines = {side.label: side.machine for side in made}

    longest = SHORT_TIMES * _seconds(options) if options.short else math.inf

    def unsure(measured: Measured) -> bool:
        return comparison.is_unsure(measured, options.threshold)

    def first(finding: comparison.Finding) -> None:
        outcome.findings.append(finding)
        print(f"  {finding.measured.name}: {finding.verdict}", flush=True)

    def again(finding: comparison.Finding) -> None:
        for number, before in enumerate(outcome.findings):
            if before.measured.name == finding.measured.name:
                outcome.findings[number] = comparison.settle(before, finding)
                print(f"  {finding.measured.name}: {finding.verdict}", flush=True)

    try:
        measure(files, "pass-1", first)
        for number in range(2, comparison.MOST_PASSES + 1):
            left_open = [str(REPO / each.measured.nodeid) for each in outcome.findings if comparison.is_open(each)]
            if left_open:
                print("Once more, in fresh processes:", flush=True)
                measure(left_open, f"pass-{number}", again)
        outcome.code = int(any(finding.alarms for finding in outcome.findings))
    except Died as died:
        whose = "the working tree's" if died.label == "current" else f"{options.against}'s"
        outcome.ended = f"{whose} process has ended: {died.words}"
        outcome.code = 1 if died.label == "current" else 4
    except Stopped as stopped:
        outcome.ended, outcome.code = str(stopped), 128 + stopped.number
    if not outcome.findings and not outcome.ended:
        raise _nothing_to_run(options)


def _show(outcome: Outcome, last: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # in a file or a CI log nobody can widen the window
        console = Console(highlight=False, width=WIDTH)
    console.print(comparison.table(outcome.findings))
    for line in [*comparison.notes(outcome.findings), last]:
        print(line)
    sys.stdout.flush()
    if outcome.ended:
        print(f"mvp-fast bench: {outcome.ended}", file=sys.stderr)


def _side(source: Source, outcome: Outcome, **about: Any) -> dict[str, Any]:
    return {**about, "python": source.python, "machine": outcome.machines.get(source.label)}


def _write(file: IO[bytes] | None, text: str) -> None:
    if file:
        file.write(text.encode())


def _seconds(options: Options) -> float:
    return options.seconds or (SHORT_SECONDS if options.short else SECONDS)


def _file(name: str) -> str:
    """A benchmark file's absolute path, with what follows its colons; found here or in benchmarks/."""
    path, colons, rest = name.partition("::")
    for place in (Path(path), HERE / path):
        if place.exists() and place.resolve().is_relative_to(HERE):
            return f"{place.resolve()}{colons}{rest}"
    raise ConfigError(
        f"There is no benchmark `{path}`",
        where="FILES",
        fix=f"They are the files test_*.py in {HERE}; all without FILES",
    )


def _check(options: Options) -> None:
    if not options.against and (options.markdown or options.dirty or options.seconds or options.threshold):
        raise ConfigError(
            "--markdown, --dirty, --seconds and --threshold are for a comparison",
            fix="Say what to compare with: --against REV",
        )
    if options.against and options.record:
        raise ConfigError(
            "A comparison is not recorded in benchmarks/results/", where="--record", fix="Keep it with --json FILE"
        )
    for name, value, most in (("seconds", options.seconds, 3600), ("threshold", options.threshold, 1)):
        if not 0 <= value <= most:
            fix = f"Take a number above 0 and up to {most}" + (", such as 0.05 for 5 %" if most == 1 else "")
            raise ConfigError(f"{value} is out of range", where=f"--{name}", fix=fix)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise EnvironmentProblem(
                "Benchmarks on a GPU are asked for, and torch finds none",
                where="--device cuda",
                fix="Run them where there is one (`nvidia-smi` shows it), or take --device cpu",
            )


def _check_packages(tree: Path, name: str) -> None:
    for package, place in revision.PACKAGES.items():
        if not (tree / place / "__init__.py").is_file():
            raise ConfigError(
                f"The revision `{name}` has no package {package}, so that it can't be compared",
                where=f"--against, {place}",
                fix="Take a later revision",
            )


def _nothing_to_run(options: Options) -> ConfigError:
    return ConfigError(
        "No benchmark is selected", where=f"FILES, --device {options.device}", fix="Name others, or leave both out"
    )


def _some(differences: Sequence[str]) -> str:
    names = [line[3:] for line in differences[:3]]
    return ", ".join(names) + (", ..." if len(differences) > 3 else "")


def _stop(number: int, frame: object) -> None:
    for each in revision.STOPS:
        signal.signal(each, signal.SIG_IGN)  # cleaning up is on its way, and short
    raise Stopped(number)
