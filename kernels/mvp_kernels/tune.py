"""Finds the launch parameters of the kernels that are fastest on this machine's GPU, and keeps them for later launches.

    python -m mvp_kernels.tune [--widths 384 512 768 1024] [--dtypes bfloat16 float16 float32] [--ops guided_loss ...]
                               [--budget SECONDS] [--list]

Every kernel is run with its default parameters and with rows and warps around them, on inputs of several times the L2
cache that are taken in turn, all candidates one after the other in every round. A candidate goes before the default
only where that is more than noise: after a first look has picked the three fastest, these and the default are timed
again; the fastest by its median must then be 2 % faster, and its third quartile below the default's first. A candidate
that does not compile, can't be launched or gives another result is passed over, and said.

Each result is added to the file of `mvp_kernels.launch` as soon as it is there, so that an interruption loses nothing.
Exit codes: 0 done, 2 usage, 4 there is no GPU to time or nowhere to write, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvp_kernels import launch
from mvp_kernels.availability import INTERPRET, interpreting, triton_obstacle
from mvp_kernels.launch import Launch
from mvp_kernels.tune_cases import (
    DTYPES,
    OPS,
    PATCHES,
    WIDTHS,
    Call,
    Case,
    Sizes,
    candidates_of,
    cases_of,
    name_of,
    prepare,
)

MOST_WIDTH = 1 << 16
L2_CACHES, FOOTPRINT = 4, 1 << 29  # what a call moves, at least; bytes that take longer than launching a kernel
SCREENING, FINAL = 6, 25  # rounds
FINALISTS = 3
GAIN = 0.02
AGREEMENT = 2.0**-6  # of the largest value: a few roundings of bfloat16; a wrong kernel is off by all of it

Measure = Callable[[Call, Call], float]  # seconds that the second call takes right after the first
Say = Callable[[str], None]


class Tuned(NamedTuple):
    """What came out for a case; `best` is None where the default is. Seconds are medians, `moved` bytes of a call."""

    default: Launch
    best: Launch | None
    default_s: float
    best_s: float
    moved: int


def working(case: Case, candidates: Sequence[Launch], call: Call, say: Say) -> list[Launch]:
    """The default, which comes first, and those that compile, can be launched and agree with it."""
    default, *others = candidates
    with launch.trying(case.op, default):
        expected = _tensors(call())
    found = [default]
    for candidate in others:
        try:
            with launch.trying(case.op, candidate):
                trouble = "" if all(map(_agree, _tensors(call()), expected)) else "another result than the default's"
        except Exception as error:  # whatever a compiler or a driver raises is a reason against this candidate alone
            trouble = _reason(error)
        if trouble:
            say(f"  passed over {_words(candidate)}: {trouble}")
        else:
            found.append(candidate)
    return found


def race(
    op: str, launches: Sequence[Launch], calls: Sequence[Call], measure: Measure, rounds: int
) -> list[list[float]]:
    """Seconds of each launch, a number a round; in a round all have their turn, in another order each time."""
    times: list[list[float]] = [[] for _ in launches]
    inputs = itertools.cycle(itertools.pairwise([*calls, calls[0]]))
    for turn in range(rounds):
        for which in random.Random(turn).sample(range(len(launches)), len(launches)):
            with launch.trying(op, launches[which]):
                times[which].append(measure(*next(inputs)))
    return times


def beats(candidate: Sequence[float], default: Sequence[float]) -> bool:
    """Whether a candidate is faster by more than the noise: by GAIN, and with quartiles that don't overlap."""
    slow_quarter = statistics.quantiles(candidate, n=4, method="inclusive")[2]
    fast_quarter = statistics.quantiles(default, n=4, method="inclusive")[0]
    return slow_quarter < fast_quarter and statistics.median(candidate) < (1 - GAIN) * statistics.median(default)


def tune_case(case: Case, device: torch.device, sizes: Sizes, measure: Measure, say: Say) -> Tuned:
    """Look at all candidates, then closely at the fastest; see the module."""
    calls, moved = prepare(case, device, sizes)
    default, *others = working(case, candidates_of(case), calls[0], say)
    looks = race(case.op, [default, *others], calls, measure, SCREENING)[1:]
    by_speed = sorted(range(len(others)), key=lambda k: statistics.median(looks[k][1:]))  # the first wakes the GPU up
    finalists = [others[k] for k in by_speed[:FINALISTS]]
    default_times, *finals = race(case.op, [default, *finalists], calls, measure, FINAL)
    better = [
        (statistics.median(times), finalist)
        for finalist, times in zip(finalists, finals, strict=True)
        if beats(times, default_times)
    ]
    default_s = statistics.median(default_times)
    best_s, best = min(better) if better else (default_s, None)
    return Tuned(default, best, default_s, best_s, moved)


def tune(
    cases: Sequence[Case],
    device: torch.device,
    device_name: str,
    sizes: Sizes,
    measure: Measure,
    budget: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Tune, save and print case after case; returns the exit code.

    Args:
        device_name: kind of GPU that the results are kept for.
        measure: how a call is timed.
        budget: seconds by `clock` after which no case is begun.
    """
    say: Say = partial(print, flush=True)
    until, done, path = clock() + budget, 0, launch.cache_file(device_name)
    try:
        copied = _copy_speed(device, sizes, measure)
        say(f"{device_name}: a copy moves {copied / 1e9:.1f} GB/s, share is of that")
        say(f"{'op':<23}{'width':>6}  {'type':<9}{'default us':>11}{'best us':>10}{'share':>7}  parameters")
        for place, case in enumerate(cases):
            if clock() >= until:
                say(f"the budget is used up: {len(cases) - place} of {len(cases)} are left as they were")
                break
            try:
                tuned = tune_case(case, device, sizes, measure, say)
            except Exception as error:  # too little memory, say: the others may fit
                say(f"{_title(case)}  left as it was: {_reason(error)}")
                continue
            launch.save_tuned(device_name, {case.key: tuned.best})
            done += 1
            say(_line(case, tuned, copied))
    except KeyboardInterrupt:
        say(f"interrupted: {done} of {len(cases)} are in {path}")
        return 130
    say(f"{done} of {len(cases)} are in {path}")
    return 0 if done or not cases else 4


def on_gpu(before: Call, timed: Call) -> float:
    """Seconds by the GPU's own clock; the call before keeps it busy until the timed one is on its way."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for times in (1, 2, 4, 8):
        for _ in range(times):
            before()
        start.record()
        timed()
        end.record()
        late = start.query()  # the GPU was there first, and the time is the host's
        end.synchronize()
        if not late:
            break
    return float(start.elapsed_time(end)) / 1e3


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _parser().parse_args(words)
    cases = cases_of(args.ops, args.widths, args.dtypes)
    obstacle = triton_obstacle("cuda")
    if interpreting() and not obstacle:
        obstacle = f"with {INTERPRET} set, Triton's interpreter would be timed"
    if args.list:
        tuned = {} if obstacle else launch.tuned_for(torch.cuda.get_device_name())
        for case in cases:
            default = _words(launch.default_launch(*case.key))
            print(f"{_title(case)}  {f'{_words(tuned[case.key])} (tuned)' if case.key in tuned else default}")
        return 0
    try:
        if obstacle:
            raise RuntimeError(f"{obstacle}. It times kernels on a GPU; untuned, they take the defaults of --list.")
        device = torch.device("cuda", torch.cuda.current_device())
        footprint = max(FOOTPRINT, L2_CACHES * torch.cuda.get_device_properties(device).L2_cache_size)
        return tune(cases, device, torch.cuda.get_device_name(device), Sizes(footprint), on_gpu, args.budget)
    except (OSError, RuntimeError) as error:
        print(f"mvp_kernels.tune can't run here: {error}", file=sys.stderr)
        return 4


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m mvp_kernels.tune",
        description="Finds the fastest launch parameters of the kernels on this GPU and keeps them for later launches.",
        epilog="Parameters go by the bytes of a value: what is found for bfloat16 holds for float16. The rows of"
        f" patchify are patches, of {', '.join(map(str, PATCHES))} pixels whatever --widths says. Results are kept in"
        f" the folder ${launch.CACHE}, or ~/.cache/mvp_kernels.",
    )
    option = parser.add_argument
    option("--widths", type=_width, nargs="+", default=WIDTHS, metavar="D", help=f"of {' '.join(map(str, WIDTHS))}")
    option("--dtypes", choices=DTYPES, nargs="+", default=DTYPES, metavar="TYPE", help=f"of {' '.join(DTYPES)}")
    option("--ops", choices=OPS, nargs="+", default=OPS, metavar="OP", help=f"of {' '.join(OPS)}")
    option("--budget", type=_seconds, default=math.inf, metavar="SECONDS", help="after which no kernel is begun")
    option("--list", action="store_true", help="show what would be tuned, and the parameters that are used now")
    return parser


def _width(word: str) -> int:
    if not 0 < int(word) <= MOST_WIDTH:
        raise argparse.ArgumentTypeError(f"a width is 1 to {MOST_WIDTH}, not {word}")
    return int(word)


def _seconds(word: str) -> float:
    if not float(word) > 0:
        raise argparse.ArgumentTypeError(f"a budget is more than 0 seconds, not {word}")
    return float(word)


def _copy_speed(device: torch.device, sizes: Sizes, measure: Measure) -> float:
    """Bytes read and written a second by torch's copy."""
    half = math.ceil(sizes.footprint / 2)
    sources = [torch.randint(0, 256, (half,), dtype=torch.uint8, device=device) for _ in range(sizes.sets)]
    calls = [partial(torch.empty_like(source).copy_, source) for source in sources]
    turns = [measure(calls[k % len(calls)], calls[(k + 1) % len(calls)]) for k in range(FINAL)]
    return 2 * half / statistics.median(turns)


def _title(case: Case) -> str:
    return f"{case.op:<23}{case.width:>6}  {name_of(case.dtype):<9}"


def _line(case: Case, tuned: Tuned, copied: float) -> str:
    numbers = f"{tuned.default_s * 1e6:>11.1f}{tuned.best_s * 1e6:>10.1f}{tuned.moved / tuned.best_s / copied:>7.0%}"
    return f"{_title(case)}{numbers}  {_words(tuned.best) if tuned.best else f'{_words(tuned.default)} (default)'}"


def _words(parameters: Launch) -> str:
    return f"rows {parameters.rows} warps {parameters.warps}"


def _reason(error: Exception) -> str:
    """The error in a line: its last, for Triton's begin with the code where it is."""
    lines = [line for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {''.join(lines[-1:])}"[:160]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result or () for tensor in _tensors(part)]


def _agree(got: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return True
    expected = expected.float()
    return torch.allclose(got.float(), expected, rtol=0.0, atol=AGREEMENT * float(expected.abs().max()))


if __name__ == "__main__":
    sys.exit(main())
