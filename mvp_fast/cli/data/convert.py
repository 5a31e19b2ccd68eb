"""`mvp-fast data convert`: write a data set in a format that loads faster than image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvp_fast.cli.parse import parse

if TYPE_CHECKING:
    from mvp_fast.loaders.convert.beton_estimate import Estimate
    from mvp_fast.samples.index_build import BadFile

SHOWN = 10  # bad images that are printed; the list beside the index has all


@dataclass(frozen=True)
class Options:
    """Write the images of an index in a format that loads faster, and the index of that.

    Every image is decoded and judged as by `data index --verify`; bad ones are left out and listed. An interrupted
    conversion goes on when the same command is given again.

    `--to beton` writes one file that FFCV's programs read, with the fields image, label and row (of INDEX). Train with
    --data.index OUT.parquet --data.loader ffcv --data.interpolation area.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    to: Literal["beton"]
    """The format."""
    out: str = ""
    """The file to write; its index goes beside it. Beside INDEX, named after mode and side, where this is empty."""
    mode: Literal["raw", "jpeg", "mixed"] = "jpeg"
    """How pixels are stored: as they are, as JPEG, or half of the images each way."""
    side: int = 500
    """Greatest width and height that is stored, pixels (usual: 256, 400, 500); larger images are shrunk."""
    quality: int = 90
    """Quality of the JPEGs."""
    workers: int = 0
    """Processes that convert; 0 takes one a core. What is written does not depend on it."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data convert")
    return {"beton": _beton}[options.to](options)


def _beton(options: Options) -> int:
    from mvp_fast.loaders.convert.beton import write_beton
    from mvp_fast.loaders.convert.beton_parts import Form
    from mvp_fast.samples.index import Index

    index = Index.open(options.index)
    form = Form(options.mode, options.side, options.quality)

    def tell(expected: Estimate, free: int) -> None:
        print(f"expected {expected.bytes / 1e9:.2f} GB, judging by {expected.images} images; {free / 1e9:.1f} GB free")
        print(f"         {expected.seconds / 60:.1f} minutes of one core's work", flush=True)

    out = Path(options.out) if options.out else None
    with _progress() as progress:
        report = write_beton(index, out, form, options.workers, tell, progress)
    each = report.bytes / report.images / 1000
    kept = f", {report.resumed:,} were done before" if report.resumed else ""
    print(f"images   {report.images:,}, {report.bytes / 1e9:.2f} GB, {each:.1f} KB an image")
    print(f"took     {report.seconds:.1f} s{kept}")
    show_bad(report.bad, report.bad_path)
    print(f"beton    {report.path}")
    print(f"index    {report.index}")
    print(f"next     mvp-fast train --data.index {report.index} --data.loader ffcv --data.interpolation area")
    return 0


def show_bad(bad: list[BadFile], path: Path) -> None:
    """Print what was left out."""
    if bad:
        print(f"bad      {len(bad):,} left out, listed in {path}")
    for entry in bad[:SHOWN]:
        print(f"         {entry.path}: {entry.reason}")
    if len(bad) > SHOWN:
        print(f"         and {len(bad) - SHOWN:,} more")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("converting images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
