"""`mvp-fast data bench`: how many images a second each backend loads, of this data set, on this machine."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvp_fast import __version__
from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mvp_fast.config.schema import Config
    from mvp_fast.loaders.measure import Candidate, Measured, Passage
    from mvp_fast.samples.index import Index
    from mvp_fast.samples.plan import SamplePlan

GPU_RATE = 3402.0
ON_CPU = "dali, CPU decode"


@dataclass(frozen=True)
class Options:
    """Measure how many images a second each backend loads, of your data, on your machine.

    All backends are under way and take turns, in rounds; the table shows medians. Read and copy are images a second of
    waiting; decode and transform are images a second of one core's time (`dali` does not tell them apart). A batch's
    time is from one batch to the next. What can't be measured here is listed with the reason.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    backend: tuple[str, ...] = ("all",)
    """Backends by name; all for every one that reads files."""
    peers: bool = False
    """Also what one would run instead: PyTorch's DataLoader in two ways, DALI's own random crop, SPDL (from a checkout
    of the repository)."""
    json: str = ""
    """Write all that was measured to this file."""
    seconds: float = 10.0
    """Seconds of timed batches for each backend."""
    batch_size: int = 64
    """Images a batch."""
    threads: int = 0
    """Threads (of a peer: processes); 0 takes all cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the batches go; auto takes the GPU where there is one."""
    gpu_rate: float = GPU_RATE
    """Images a second that one GPU takes: put in what your training reaches. The default is computed, not measured: a
    ViT-B/16 student and teacher at 60 % of an H100's matrix product of 798 TFLOP/s, 140.7 GFLOP an image."""
    config: str = ""
    """A YAML configuration, for its crops and filter; the defaults where this is empty."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data bench")
    names = _check(options)
    sys.path[:0] = [str(_benchmarks())] if options.peers else []

    import torch

    from mvp_fast.config.load import load_config
    from mvp_fast.config.schema import Config
    from mvp_fast.loaders.measure import measure
    from mvp_fast.samples.files import replacing
    from mvp_fast.samples.index import Index

    if options.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("There is no CUDA device", where="--device cuda", fix="Leave --device at auto or cpu")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    config = load_config(options.config) if options.config else Config()
    index = Index.open(options.index)
    index.check_files()
    threads = options.threads or len(os.sched_getaffinity(0))
    candidates = _candidates(options, names, config, index, threads, device)
    with replacing(Path(options.json), "--json") if options.json else nullcontext() as file:
        with _progress() as tell:
            measured, failed = measure(candidates, options.batch_size, options.seconds, tell)
        left_out = {name: error.paragraph() for name, error in failed.items()}
        if all(found.peer for found in measured):
            raise next(failed[name] for name in names if name in failed)
        if "all" in options.backend:
            if device == "cpu":
                left_out["dali on the GPU"] = "It needs a CUDA device, and this is measured on the CPU."
            left_out["synthetic"] = "It reads no files; `--backend synthetic` measures what the plan alone takes."
        if file is not None:
            result = _result(measured, left_out, options, len(index), threads, device)
            file.write((json.dumps(result, indent=2) + "\n").encode())
    _show(measured, left_out, options, threads)
    return 0


def _check(options: Options) -> list[str]:
    """The names of the backends that were asked for."""
    from mvp_fast.loaders.registry import LOADERS

    for value, flag in (
        (options.seconds, "--seconds"),
        (options.batch_size, "--batch-size"),
        (options.gpu_rate, "--gpu-rate"),
    ):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{value:g} is no amount to measure with", where=flag, fix="Give a number above 0")
    if options.threads < 0:
        raise ConfigError(f"{options.threads} threads can't work", where="--threads", fix="Take 0 for all cores")
    names = list(dict.fromkeys(options.backend))
    if "all" in names:
        return [name for name in LOADERS if name != "synthetic"]
    for name in names:
        if name not in LOADERS:
            near = difflib.get_close_matches(name, LOADERS, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else "Choose from all, " + ", ".join(LOADERS)
            raise ConfigError(f"There is no backend `{name}`", where="--backend", fix=hint)
    return names


def _benchmarks() -> Path:
    """The checkout's folder of benchmarks, which holds the peers."""
    benchmarks = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (benchmarks / "peers" / "endless.py").is_file():
        raise EnvironmentProblem(
            "The peers are not installed with the package; they are run from a checkout",
            where=str(benchmarks),
            fix="Clone the repository, run `make install` there, and call its .venv/bin/mvp-fast data bench --peers",
        )
    return benchmarks


def _candidates(
    options: Options, names: list[str], config: Config, index: Index, threads: int, device: str
) -> list[Candidate]:
    """Peers first: their processes are forked before any thread of ours runs."""
    from dataclasses import replace

    from mvp_fast.loaders.measure import Candidate
    from mvp_fast.samples.plan import SamplePlan

    data = replace(config.data, threads=threads)
    found = []
    if options.peers:
        endless: Any = importlib.import_module("peers.endless")
        starts = endless.all_passages(index, data, options.batch_size, threads, device)
        found = [Candidate(name, partial(_peer, start, device), peer=True) for name, start in starts.items()]
    plan = SamplePlan(index, seed=config.seed, batch_size=options.batch_size, data=data, mask=config.mask)
    # On a GPU `dali` may decode there or here; where the configuration does not say, both are measured.
    variants: list[tuple[str, str, Literal["auto", "gpu", "cpu"]]] = [(name, name, data.decode) for name in names]
    if device == "cuda" and "dali" in names and data.decode == "auto":
        variants.append((ON_CPU, "dali", "cpu"))
    apart = max(1, len(index) // options.batch_size // len(variants))  # steps between two backends' beginnings
    for i, (title, name, decode) in enumerate(variants):
        found.append(Candidate(title, partial(_ours, name, decode, plan, i * apart, device)))
    return found


def _ours(name: str, decode: Literal["auto", "gpu", "cpu"], plan: SamplePlan, step: int, device: str) -> Passage:
    from dataclasses import replace

    from mvp_fast.loaders.measure import Passage
    from mvp_fast.loaders.prefetch import Prefetcher
    from mvp_fast.loaders.registry import make_loader

    loader = make_loader(name, replace(plan.data, decode=decode), device=device)
    if device == "cpu":
        return Passage(loader.batches(plan, step), 4, loader.close, loader.stats())
    import torch

    prefetcher = Prefetcher(loader, plan, step, device)

    def close() -> None:
        prefetcher.close()
        loader.close()

    return Passage(prefetcher, 8, close, loader.stats(), torch.cuda.synchronize)


def _peer(start: Callable[[], Any], device: str) -> Passage:
    from mvp_fast.loaders.measure import Passage

    peer = start()
    if device == "cpu":
        return Passage(peer.batches, peer.ahead, peer.close)
    import torch

    batches = (images.to(device, non_blocking=True) for images in peer.batches)
    return Passage(batches, peer.ahead, peer.close, synchronize=torch.cuda.synchronize)


def _show(measured: list[Measured], left_out: dict[str, str], options: Options, threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Images a second, {options.batch_size} a batch, {_count(threads, 'thread')}")
    for column in ("", "in all", "a core", "read", "decode", "transform", "copy", "p50", "p99", "first batch"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for found in measured:
        stages = (_number(found.stages.get(stage)) for stage in ("read", "decode", "transform", "copy"))
        times = (f"{1e3 * found.percentile(q):,.0f} ms" for q in (50, 99))
        name = f"{found.name} (peer)" if found.peer else found.name
        rates = (_number(found.rate), _number(found.rate / threads))
        table.add_row(name, *rates, *stages, *times, f"{found.first_batch:.2f} s")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name, why in left_out.items():
        print(f"left out  {name}: {why}")
    best = max((found for found in measured if not found.peer), key=lambda found: found.rate)
    feeds = f"{best.rate / options.gpu_rate:.2g} GPUs at {options.gpu_rate:,.0f} images/s"
    source = " (computed for an H100, not measured: --gpu-rate)" if options.gpu_rate == GPU_RATE else ""
    print(f"feeds     {best.name} feeds {feeds}{source}")


def _result(
    measured: list[Measured], left_out: dict[str, str], options: Options, images: int, threads: int, device: str
) -> dict[str, Any]:
    """All that was measured, for --json."""
    backends = [
        {
            "name": found.name,
            "peer": found.peer,
            "images_per_second": found.rate,
            "images_per_second_a_core": found.rate / threads,
            "stage_images_per_second": found.stages,
            "batch_seconds": {"p50": found.percentile(50), "p99": found.percentile(99)},
            "first_batch_seconds": found.first_batch,
            "rounds": found.rates,
            "feeds_gpus": found.rate / options.gpu_rate,
        }
        for found in measured
    ]
    return {
        "version": __version__,
        "options": asdict(options),
        "images": images,
        "threads": threads,
        "device": device,
        "backends": backends,
        "left_out": left_out,
    }


def _number(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on a terminal; nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update
