"""Tiny benchmarks, which test_bench_regression.py puts into its repositories as benchmarks/test_tiny.py."""

import os
import signal
import subprocess
import sys

import torch
from harness import Variant, compare

import mvp_fast


def measure(benchmark, session, work, check=lambda: None):
    ours = Variant(work, countable=True)
    compare(benchmark, session, ours=ours, check=check, items=1, unit="rounds", warm_up_seconds=0.0)


def is_new():
    return hasattr(mvp_fast, "added")


def test_fine(benchmark, session):
    x = torch.ones(1000)
    measure(benchmark, session, lambda: x.sum())


def test_api(benchmark, session):
    measure(benchmark, session, lambda: mvp_fast.added(1))


def test_disagrees(benchmark, session):
    def check():
        assert 1 == 2, "one is not two"

    measure(benchmark, session, lambda: None, check)


def test_dies(benchmark, session):
    def work():
        if is_new() == (os.environ.get("DIES") == "current"):
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    measure(benchmark, session, work)


def test_more(benchmark, session):
    x = torch.ones(10)
    measure(benchmark, session, lambda: [x + 1 for _ in range(3 if is_new() else 2)])


def test_hangs(benchmark, session):
    measure(benchmark, session, lambda: subprocess.run([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
