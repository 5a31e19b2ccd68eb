"""`mvp-fast data plan`: write the samples, boxes and masks of an epoch as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from mvp_fast.samples.plan import PlanRows, SamplePlan

ROWS_A_GROUP = 16384


@dataclass(frozen=True)
class Options:
    """Write the sample plan of an epoch as a Parquet table, a row a sample in the order in which training sees them.

    Columns: position in the epoch, key of the image, crop box x, y, width, height in pixels of the stored image, flip,
    and mask (a list of true and false, a patch each, row by row). Every loader carries out this plan.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    out: str
    """The table to write."""
    epoch: int = 0
    """Which epoch, from 0."""
    limit: int = 0
    """Rows from the beginning of the epoch; 0 for all."""
    seed: int | None = None
    """In place of the configuration's seed (0 by default)."""
    config: str = ""
    """A YAML configuration, for its crops, masks and seed; the defaults where this is empty."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data plan")

    from mvp_fast.config.schema import Config
    from mvp_fast.samples.index import Index
    from mvp_fast.samples.plan import SamplePlan

    if options.config:
        from mvp_fast.config.load import load_config

        config = load_config(options.config)
    else:
        config = Config()
    if options.limit < 0:
        raise ConfigError(f"{options.limit} rows can't be written", where="--limit", fix="Take 0 for all of the epoch")
    index = Index.open(options.index)
    seed = config.seed if options.seed is None else options.seed
    plan = SamplePlan(index, seed=seed, batch_size=config.data.repeat, data=config.data, mask=config.mask)
    rows = min(options.limit or plan.epoch_rows, plan.epoch_rows)
    _write(plan, options.epoch, rows, Path(options.out))
    print(f"rows     {rows:,} of the {plan.epoch_rows:,} in epoch {options.epoch}, seed {seed}")
    print(f"table    {options.out}")
    return 0


def _write(plan: SamplePlan, epoch: int, rows: int, out: Path) -> None:
    """Write the first rows of an epoch, a group at a time."""
    import numpy as np
    import pyarrow.parquet as pq

    from mvp_fast.samples.files import replacing

    def groups() -> Iterator[pa.Table]:
        for start in range(0, rows, ROWS_A_GROUP):
            yield _table(plan, plan.rows(epoch, np.arange(start, min(start + ROWS_A_GROUP, rows))))

    every = groups()
    first = next(every)  # an index has at least one sample
    with replacing(out) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for group in itertools.chain([first], every):
            writer.write_table(group)


def _table(plan: SamplePlan, rows: PlanRows) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    count, patches = rows.mask_BN.shape
    ends = np.arange(0, (count + 1) * patches, patches, dtype=np.int32)
    columns = {
        "position": rows.position_B,
        "key": pa.array([plan.index.key(i) for i in rows.sample_B.tolist()], pa.large_string()),
        "x": rows.x_B,
        "y": rows.y_B,
        "width": rows.width_B,
        "height": rows.height_B,
        "flip": rows.flip_B,
        "mask": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(rows.mask_BN.reshape(-1))),
    }
    return pa.table(columns)
