"""A loader in a process of its own that may use so many cores, to see how its rate grows with them.

    python pinned_loader.py LOADER INDEX CORES

The process answers each line on its standard input with one line of JSON: "digest" with the sum of the first batch's
pixels, a number of batches with the seconds they took in the steady state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

BATCH, WARM_UP = 32, 4


class PinnedLoader:
    """The caller's side."""

    def __init__(self, name: str, index: Path, cores: int) -> None:
        words = [sys.executable, __file__, name, str(index), str(cores)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: object) -> Any:
        """The answer to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))}: ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def main(name: str, folder: str, cores: int) -> None:
    """The process's side."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before threads are started: they inherit it
    from mvp_fast.config.schema import DataConfig, MaskConfig
    from mvp_fast.loaders.registry import make_loader
    from mvp_fast.samples.index import Index
    from mvp_fast.samples.plan import SamplePlan

    data = DataConfig()
    plan = SamplePlan(Index.open(folder), seed=0, batch_size=BATCH, data=data, mask=MaskConfig())
    loader = make_loader(name, data)  # as many threads as cores
    for line in sys.stdin:
        batches = loader.batches(plan, 0)
        if line.strip() == "digest":
            answer: float = int(next(batches).images_BHWC.long().sum())
        else:
            skip(batches, WARM_UP)
            start = time.perf_counter()
            skip(batches, int(line))
            answer = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]
        print(json.dumps(answer), flush=True)
    loader.close()


def skip(batches: Any, count: int) -> None:
    for _ in islice(batches, count):
        pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
