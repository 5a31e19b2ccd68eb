"""`mvp-fast data convert`: write a data set anew in a form that loads faster than image files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvp_fast.cli.data.tell import progress, show_bad
from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError

if TYPE_CHECKING:
    from mvp_fast.loaders.convert.beton_estimate import Estimate

ONLY_FOR = {"shards": ("shard_size", "seed", "verify"), "beton": ("mode", "side", "quality")}
_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Options:
    """Write the images of an index anew in a form that loads faster, and the index of that. Images that can't be used
    are left out and listed beside that index. An interrupted call goes on when the same command is given again.

    `--to shards` writes WebDataset tar files of bounded size in a shuffled order, each with an index for DALI's
    webdataset reader, and OUT/index.parquet, with which every loader reads them. Images are copied byte for byte.

    `--to beton` writes one file that FFCV's programs read, with the fields image, label and row (of INDEX). Images are
    decoded, shrunk and stored anew. Train with --data.index OUT.parquet --data.loader ffcv --data.interpolation area.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    to: Literal["shards", "beton"]
    """The form."""
    out: str = ""
    """shards: the folder to write; the index's folder with `-shards` after its name where this is empty. beton: the
    file to write, its index goes beside it; beside INDEX, named after mode and side, where this is empty."""
    workers: int = 0
    """Processes that convert; 0 takes one a core. What is written does not depend on it."""
    shard_size: str | None = None
    """shards: greatest size of a tar file, such as 512MiB (where not given) or 1GB."""
    seed: int | None = None
    """shards: decides the order of the samples in the shards; 0 where not given."""
    verify: bool = False
    """shards: decode every image, to leave out those that are corrupt, instead of looking at its length, header and
    end."""
    mode: Literal["raw", "jpeg", "mixed"] | None = None
    """beton: how pixels are stored: as they are, as JPEG (where not given), or half of the images each way."""
    side: int | None = None
    """beton: greatest width and height that is stored, pixels (usual: 256, 400, 500; 500 where not given); larger
    images are shrunk."""
    quality: int | None = None
    """beton: quality of the JPEGs; 90 where not given."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data convert")
    for form, names in ONLY_FOR.items():
        for name in names:
            if form != options.to and getattr(options, name) not in (None, False):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is for --to {form}", where=f"--to {options.to}", fix=f"Leave {option} out")
    return {"shards": _shards, "beton": _beton}[options.to](options)


def _shards(options: Options) -> int:
    from mvp_fast.loaders.convert.layout import lay_out
    from mvp_fast.loaders.convert.shards import write_shards
    from mvp_fast.samples.index import Index

    size = byte_size("512MiB" if options.shard_size is None else options.shard_size, "--shard-size")
    seed = options.seed or 0
    index = Index.open(options.index)
    out = Path(options.out or f"{os.path.abspath(index.path.parent)}-shards")
    layout = lay_out(index, size, seed)
    print(
        f"images   {len(index):,}, {_size(int(index.length.sum()))}\n"
        f"shards   {len(layout):,}, {_size(layout.bytes)}, in {out}",
        flush=True,
    )
    with progress("converting images") as told:
        asked = {"shard_size": size, "seed": seed}
        report = write_shards(index, layout, out, asked, options.verify, options.workers, told)
    if not report.written:
        print("The shards are complete: nothing to write.")
    else:
        kept = f", {report.shards - report.written:,} were there" if report.written < report.shards else ""
        print(f"wrote    {report.written:,} shards in {report.seconds:.1f} s{kept}, {_size(report.bytes)} in all")
    show_bad(report.bad, out / "index.bad.jsonl")
    print(f"index    {report.index}, {report.images:,} images")
    return 0


def _beton(options: Options) -> int:
    from mvp_fast.loaders.convert.beton import write_beton
    from mvp_fast.loaders.convert.beton_parts import Form
    from mvp_fast.samples.index import Index

    index = Index.open(options.index)
    side, quality = (
        (500 if options.side is None else options.side),
        (90 if options.quality is None else options.quality),
    )
    form = Form(options.mode or "jpeg", side, quality)

    def tell(expected: Estimate, free: int) -> None:
        print(f"expected {expected.bytes / 1e9:.2f} GB, judging by {expected.images} images; {free / 1e9:.1f} GB free")
        print(f"         {expected.seconds / 60:.1f} minutes of one core's work", flush=True)

    out = Path(options.out) if options.out else None
    with progress("converting images") as told:
        report = write_beton(index, out, form, options.workers, tell, told)
    each = report.bytes / report.images / 1000
    kept = f", {report.resumed:,} were done before" if report.resumed else ""
    print(f"images   {report.images:,}, {report.bytes / 1e9:.2f} GB, {each:.1f} KB an image")
    print(f"took     {report.seconds:.1f} s{kept}")
    show_bad(report.bad, report.bad_path)
    print(f"beton    {report.path}")
    print(f"index    {report.index}")
    print(f"next     mvp-fast train --data.index {report.index} --data.loader ffcv --data.interpolation area")
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
