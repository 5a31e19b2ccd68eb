"""`mvp-fast data index`: write the Parquet index of a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mvp_fast.cli.data.tell import progress, show_bad
from mvp_fast.cli.parse import parse

SHOWN = 10  # bad files that are printed; the list beside the index has all


@dataclass(frozen=True)
class Options:
    """Write the Parquet index of a folder of images: names, lengths, sizes and labels.

    DIR holds class folders (DIR/CLASS/**/image) or images without classes. Images: .jpg .jpeg .png .webp .bmp .gif.
    A bad file is left out and listed beside the index, in index.bad.jsonl. A top-level folder `masks` that mirrors the
    class folders is left out too.
    """

    dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder of images."""
    out: str = ""
    """The index; DIR/index.parquet where this is empty."""
    verify: bool = False
    """Decode every image, to find those that are truncated or corrupt, instead of reading headers alone."""
    workers: int = 0
    """Processes that read images; 0 takes one a core, or one alone for the headers of few files."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data index")

    from mvp_fast.samples.index_build import build_index

    with progress("reading images") as told:
        report = build_index(options.dir, options.out or None, options.verify, options.workers, told)
    files = report.images + len(report.bad)
    size = f"{report.bytes / 1e9:.2f} GB, {report.bytes / report.images / 1000:.1f} KB an image"
    rate = f"{files / max(report.seconds, 1e-9):,.0f} files/s"
    print(f"images   {report.images:,} in {_classes(len(report.classes))}, {size}")
    print(f"took     {report.seconds:.1f} s ({rate}{', every image decoded' if options.verify else ''})")
    show_bad(report.bad, report.bad_path)
    print(f"index    {report.path}")
    return 0


def _classes(count: int) -> str:
    if not count:
        return "no class folders"
    return f"{count:,} class{'es' if count > 1 else ''}"
