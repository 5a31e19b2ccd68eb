"""What an index takes in memory, and what the order `sharded` adds: bytes a sample, measured in a process of its own.

    python benchmarks/index_memory.py [--rows 10000000]

Keys are as long as ImageNet's (29 bytes with the class folder). Two indexes of the same images: files of their own, and
shards of 4,800. Printed: resident memory that Index.open leaves, its peak while it opens, both without what a process
has anyway, and the seconds that an epoch's table of shards takes. The formula they are held against is in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from mvp_fast.samples.index import COLUMNS
from mvp_fast.samples.index_build import write_table

IMAGES_A_SHARD = 4800

MEASURE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.compute, pyarrow.parquet
from mvp_fast.samples.index import Index
from mvp_fast.samples.sharded_order import ShardedOrder
now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
Index.open(sys.argv[1])  # a small one: what the libraries load when they are first used
if sys.argv[3] == "shards":
    ShardedOrder(np.array([0, 5, 9]), 0, 4)(np.zeros(3, np.int64), np.arange(3))  # compiled
before, start = now(), time.perf_counter()
index = Index.open(sys.argv[2])
found = {"seconds": time.perf_counter() - start, "resident": now() - before, "peak": most() - before}
if sys.argv[3] == "shards":
    order = ShardedOrder(index.shard_starts(), 0, 65536)
    start = time.perf_counter()
    order(np.zeros(1, np.int64), np.zeros(1, np.int64))
    found |= {"shards": len(index.shard_starts()) - 1, "table_seconds": time.perf_counter() - start}
print(json.dumps(found))
"""


def write(file: Path, rows: int, shards: bool) -> None:
    """An index of `rows` images, without the images."""
    number = np.arange(rows)
    keys = pa.array([f"n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300:04d}.JPEG" for i in range(rows)], pa.large_string())
    paths = pa.array([f"shard-{s:06d}.tar" for s in range(rows // IMAGES_A_SHARD + 1)], pa.large_string())
    columns = {
        "key": keys,
        "path": paths.take(pa.array(number // IMAGES_A_SHARD)) if shards else keys,
        "offset": number % IMAGES_A_SHARD * 112_640 + 512 if shards else np.zeros(rows, np.int64),
        "length": 80_000 + number % 60_000,
        "width": (300 + number % 300).astype(np.int32),
        "height": (300 + number % 200).astype(np.int32),
        "label": np.full(rows, -1, np.int32),
    }
    about = {"version": 1, "classes": [], "root": ".", "root_absolute": str(file.parent), "tool": "", "verified": False}
    write_table(pa.table(columns, schema=COLUMNS), about, file)


def main() -> None:
    """Write the indexes, measure them one by one, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small.parquet"
        write(small, 10, shards=True)
        for kind in ("files", "shards"):
            file = Path(name) / f"{kind}.parquet"
            write(file, rows, kind == "shards")
            words = [sys.executable, "-c", MEASURE, str(small), str(file), kind]
            found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            disk, left, peak = (size / rows for size in (file.stat().st_size, found["resident"], found["peak"]))
            line = f"{kind:6} {rows:,} rows, {disk:.1f} bytes a sample on disk; in memory {left:.1f}"
            line += f", at most {peak:.1f} while opening ({found['seconds']:.1f} s)"
            if kind == "shards":
                line += f"; the table of {found['shards']:,} shards: {1000 * found['table_seconds']:.1f} ms an epoch"
            print(line, flush=True)


if __name__ == "__main__":
    main()
