"""What the verbs that train have in common: joining the ranks, and telling what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mvp_fast.config.schema import RunSettings
from mvp_fast.errors import EnvironmentProblem

if TYPE_CHECKING:
    from mvp_fast.train.loop import Builder, Outcome


@contextmanager
def memory_told(config: RunSettings) -> Iterator[None]:
    """What is to be done where the GPU's memory is too small."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"The GPU's memory is too small: {str(error).partition('.')[0]}",
            where=f"train.batch-size {config.train.batch_size}, train.accumulate {config.train.accumulate}",
            fix="Raise train.accumulate, which keeps the result, lower train.batch-size, or with several GPUs set"
            " train.sharding to full",
        ) from error


def train_in_ranks(config: RunSettings, build: Builder | None = None) -> Outcome | None:
    """Train in the ranks that torchrun started; what came of it on the rank that speaks, None on the others.

    Args:
        build: of another task than pre-training; see `loop.train`.
    """
    from mvp_fast.train.build import build_run
    from mvp_fast.train.distributed import join_ranks
    from mvp_fast.train.loop import train

    with join_ranks(config.train) as ranks:
        with memory_told(config):
            outcome = train(config, ranks, build or build_run)
        return outcome if ranks.is_main else None


def tell_outcome(outcome: Outcome, loss: str) -> None:
    """Print steps, loss (called `loss`) and speed of a finished run, and where it lies."""
    if not outcome.images_per_second:  # no step was taken
        print(f"The run is complete: {outcome.steps} steps. A greater --train.steps goes on from here.")
    else:
        memory = f", peak GPU memory {outcome.peak_memory_bytes / 2**30:.1f} GiB" if outcome.peak_memory_bytes else ""
        last = "every update of the last steps skipped" if outcome.loss is None else f"{loss} {outcome.loss:.4f}"
        print(f"\n{outcome.steps} steps, {last}{memory}")
        print(f"{outcome.images_per_second:.1f} images/s, {100 * outcome.data_wait:.1f} % of the time waiting for data")
    print(f"run      {outcome.folder}")
