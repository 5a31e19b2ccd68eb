"""`mvp-fast bench`: run the benchmarks of this checkout, alone or against another revision."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mvp_fast.cli.checkout import find_benchmarks
from mvp_fast.cli.parse import parse


@dataclass(frozen=True)
class Options:
    """Run the benchmarks of this checkout, or compare its speed with another revision's.

    With --against REV both revisions run beside each other, round by round, and a table tells of each benchmark how
    many times as fast the working tree is, with a 95 % interval: faster, slower, no difference that can be told, or
    void where the machine changed. Exit code 1 says that one is slower by more than the threshold, counts more, or
    fails. `mvp-fast bench history` draws recorded results.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")] = ()
    """Files of benchmarks/, or single ones as FILE::NAME; all where there are none."""
    against: str = ""
    """The revision to compare with, as git names it: main, HEAD~1, v0.1.0."""
    json: str = ""
    """Write all that was measured to this file."""
    markdown: str = ""
    """With --against: write the table to this file too, as GitHub shows it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda: only benchmarks that need a GPU. cpu: only those that need none. auto: all that this machine can run."""
    short: bool = False
    """With --against: 6 seconds of rounds a benchmark, in place of 20, and none whose rounds take many seconds. Alone:
    one short round each."""
    seconds: float = 0.0
    """With --against: seconds of rounds a benchmark. 11 to 101 pairs are taken, or 5 where rounds take long; three
    times as many seconds where the result is close to the threshold. 0 leaves it at 20."""
    threshold: float = 0.0
    """With --against: a difference below this share counts for nothing. 0 takes 0.05 on a GPU, 0.1 on a CPU."""
    counts: Literal["fail", "tell"] = "fail"
    """With --against: whether more operations, launches or memory than before fails, or is only told."""
    dirty: bool = False
    """With --against: take the working tree as it is, with what is in no commit."""
    environment: Literal["own", "shared"] = "own"
    """With --against, where the two depend on different packages: own makes one for the revision, which is kept;
    shared runs both with this one."""
    record: bool = False
    """Without --against: write the results to benchmarks/results/<device>/."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "bench")
    find_benchmarks("bench")
    return int(importlib.import_module("regression").main(options, argv))
