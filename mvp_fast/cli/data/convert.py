"""`mvp-fast data convert`: write a data set anew in a form that loads faster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError

SHOWN = 10  # bad samples that are printed; the list beside the index has all
_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Options:
    """Write a data set anew in a form that loads faster. An interrupted call is taken up where it stopped.

    shards: WebDataset tar files of bounded size in a shuffled order, each with an index for DALI's webdataset reader,
    and OUT/index.parquet, with which every loader reads them. Images are copied byte for byte; those that can't be
    used are left out and listed in OUT/index.bad.jsonl.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    to: Literal["shards"]
    """The form."""
    out: str = ""
    """Folder to write; where this is empty, the index's folder with `-shards` after its name."""
    shard_size: str = "512MiB"
    """Greatest size of a tar file, such as 512MiB or 1GB."""
    seed: int = 0
    """Decides the order of the samples in the shards."""
    verify: bool = False
    """Decode every image, to leave out those that are corrupt, instead of looking at its length, header and end."""
    workers: int = 0
    """Processes that read and write; 0 takes one a core."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data convert")
    size = byte_size(options.shard_size, "--shard-size")

    from mvp_fast.loaders.convert.layout import lay_out
    from mvp_fast.loaders.convert.shards import write_shards
    from mvp_fast.samples.index import Index

    index = Index.open(options.index)
    out = Path(options.out or f"{os.path.abspath(index.path.parent)}-shards")
    layout = lay_out(index, size, options.seed)
    print(
        f"images   {len(index):,}, {_size(int(index.length.sum()))}\n"
        f"shards   {len(layout):,}, {_size(layout.bytes)}, in {out}",
        flush=True,
    )
    asked = {"shard_size": size, "seed": options.seed}
    with _progress() as progress:
        report = write_shards(index, layout, out, asked, options.verify, options.workers, progress)
    if not report.written:
        print("The shards are complete: nothing to write.")
    else:
        kept = f", {report.shards - report.written:,} were there" if report.written < report.shards else ""
        print(f"wrote    {report.written:,} shards in {report.seconds:.1f} s{kept}, {_size(report.bytes)} in all")
    if report.bad:
        print(f"bad      {len(report.bad):,} left out, listed in {out / 'index.bad.jsonl'}")
        for entry in report.bad[:SHOWN]:
            print(f"         {entry.path}: {entry.reason}")
        if len(report.bad) > SHOWN:
            print(f"         and {len(report.bad) - SHOWN:,} more")
    print(f"index    {report.index}, {report.images:,} images")
    return 0


def byte_size(text: str, option: str) -> int:
    """A size in bytes from text such as 1000000, 512MiB or 1.5GB.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise ConfigError(f"`{text}` is no size in bytes", where=option, fix="Give one such as 512MiB or 1GB")
    return size


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
