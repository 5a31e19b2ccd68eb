"""`mvp-fast train --profile`: takes the steps, and writes what they say to RUN/profile/, and nowhere else.

RUN/profile/
    report.html           a page that needs nothing but itself
    stages.json           all numbers
    trace.json.gz         for ui.perfetto.dev
    memory.pickle         every allocation of a step, for torch's viewer   (only on a GPU)

A run that lies in the folder is not touched, and not gone on from: the steps begin at the first one, with new weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.loaders.registry import decodes_on_gpu, resolve
from mvp_fast.samples.files import replacing
from mvp_fast.train.build import PretrainRun, build_run
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.profile.measure import Taken, Tell, take
from mvp_fast.train.profile.numbers import Numbers, RankNumbers, Settings
from mvp_fast.train.profile.operations import operations
from mvp_fast.train.profile.page import page
from mvp_fast.train.profile.rates import measure_rates
from mvp_fast.train.profile.table import show
from mvp_fast.train.profile.trace import build_trace, write_trace
from mvp_fast.train.profile.verdict import judge
from mvp_kernels import dispatch

GRAPH_LEFT_OUT = "; without train.step-graph, in which no stage can be told from another"
# What a rank does before it waits for the others, in the backward pass.
BEFORE_THEY_MEET = ("data wait", "copy", "patchify", "teacher", "student forward", "loss")


def profile(config: Config, ranks: Ranks, steps: int) -> Path:
    """Profile `steps` steps of the run that `config` describes.

    Returns:
        The report's path.

    Raises:
        ConfigError: there are no steps to measure.
        EnvironmentProblem: the folder can't be written.
        UserError: anything else that training would raise; see `build_run`.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps are none to measure", where="--profile", fix="Give 1 or more, or no number")
    folder = Path(config.run.dir) / "profile"
    _check_writable(folder, ranks)
    # Inside a graph no stage can be told from another.
    run = build_run(replace(config, train=replace(config.train, step_graph=False)), ranks, None)
    kernels = dispatch.resolve(config.kernels.impl, ranks.device.type)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if ranks.is_main:
        told = run.header(kernels)
        told.append(f"profile   {steps} steps, in {folder}{GRAPH_LEFT_OUT if config.train.step_graph else ''}")
        console.print("\n".join(told), markup=False, highlight=False, soft_wrap=True)
    with _progress(ranks.is_main) as tell:
        snapshot = folder / "memory.pickle" if ranks.is_main and ranks.device.type == "cuda" else None
        taken = take(run, steps, snapshot, tell)
        tell("rates of this device")
        # One rank after another where they share cores would each have all: together, as in the steps.
        rates = measure_rates(ranks.device)
    numbers = Numbers(
        settings=_settings(run, taken, kernels),
        real=taken.stretches["real"],
        synthetic=taken.stretches.get("synthetic"),
        rates=rates,
        work=operations(run),
        memory=taken.memory,
        warm_up=taken.warm_up,
        ranks=_all_ranks(run, taken),
    )
    if ranks.is_main:
        verdict = judge(numbers)
        _write(folder, taken, numbers, page(numbers, verdict, taken.real, taken.synthetic), verdict.text)
        show(numbers, verdict, console)
    ranks.barrier()
    return folder / "report.html"


def _check_writable(folder: Path, ranks: Ranks) -> None:
    """Before any work, and on all ranks, so that none waits for one that has given up."""
    problem: OSError | None = None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = error
    if ranks.agree(int(problem is not None)):
        reason = "see rank 0's message" if problem is None else problem.strerror or str(problem)
        raise EnvironmentProblem(
            f"The profile can't be written: {reason}",
            where=str(folder),
            fix="Choose another --run.dir, or mend its rights or the disk's space",
        ) from problem


def _settings(run: PretrainRun, taken: Taken, kernels: str) -> Settings:
    config, ranks = run.config, run.ranks
    gpu = ranks.device.type == "cuda"
    loader = resolve(config.data.loader, config.data, ranks.device)
    memory = taken.memory
    return Settings(
        device=ranks.device.type,
        device_name=torch.cuda.get_device_name(ranks.device) if gpu else f"CPU, {len(os.sched_getaffinity(0))} cores",
        precision=config.train.precision,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        loader=loader,
        decodes_on_gpu=loader == "dali" and decodes_on_gpu(config.data, ranks.device),
        threads=config.data.threads,
        cores=max(1, len(os.sched_getaffinity(0)) // ranks.local_world),
        prefetch=config.data.prefetch,
        repeat=config.data.repeat,
        optimizer=config.optim.name,
        kernels=kernels,
        world=ranks.world,
        peak_memory=memory["peak"] / memory["GPU"] if memory.get("GPU") else None,
    )


def _all_ranks(run: PretrainRun, taken: Taken) -> list[RankNumbers]:
    """Every rank's own figures, on every rank."""
    real, ranks = taken.stretches["real"], run.ranks
    mine = torch.zeros(ranks.world, 3, dtype=torch.float64)
    alone = sum(real.critical.get(stage, 0.0) for stage in BEFORE_THEY_MEET)
    mine[ranks.rank] = torch.tensor([run.plan.local_batch_size / real.step, alone, real.critical.get("data wait", 0.0)])
    return [RankNumbers(rank, *row) for rank, row in enumerate(ranks.sum(mine).tolist())]


def _write(folder: Path, taken: Taken, numbers: Numbers, report: str, verdict: str) -> None:
    option = "--run.dir"
    stretches = {"own loader": taken.real}
    if taken.synthetic is not None:
        stretches["resident batches"] = taken.synthetic
    trace = build_trace(stretches, taken.traced, numbers.settings.batch_size)
    with replacing(folder / "trace.json.gz", option) as file:
        write_trace(trace, file)
    with replacing(folder / "stages.json", option) as file:
        values = {**numbers.as_dict(), "verdict": verdict.splitlines()}
        file.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    with replacing(folder / "report.html", option) as file:
        file.write(report.encode())


@contextmanager
def _progress(active: bool) -> Iterator[Tell]:
    """What is being done, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not active or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update
