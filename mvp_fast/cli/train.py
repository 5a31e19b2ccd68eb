"""`mvp-fast train`: pre-train a student against a frozen CLIP teacher."""

from __future__ import annotations

import argparse

from mvp_fast.config.load import config_to_yaml, load_config, parse_overrides
from mvp_fast.config.schema import Config
from mvp_fast.errors import EnvironmentProblem

DESCRIPTION = """Pre-train a student against a frozen CLIP teacher.

--config FILE reads a YAML file (configs/ has some), --print-config shows the settings in force and ends; every other
option overrides one setting. Under torchrun: torchrun --nproc-per-node 8 -m mvp_fast train ..."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    own, rest = parser.parse_known_args(argv)
    base = load_config(own.config) if own.config else Config()
    config = parse_overrides(base, rest, "mvp-fast train", DESCRIPTION)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    return _train(config)


def _train(config: Config) -> int:
    import torch

    from mvp_fast.train.distributed import join_ranks
    from mvp_fast.train.loop import train

    with join_ranks(config.train) as ranks:
        try:
            outcome = train(config, ranks)
        except torch.OutOfMemoryError as error:
            raise EnvironmentProblem(
                f"The GPU's memory is too small: {str(error).partition('.')[0]}",
                where=f"train.batch-size {config.train.batch_size}, train.accumulate {config.train.accumulate}",
                fix="Raise train.accumulate, which keeps the result, lower train.batch-size, or with several GPUs set"
                " train.sharding to full",
            ) from error
        if not ranks.is_main:
            return 0
    if not outcome.images_per_second:  # no step was taken
        print(f"The run is complete: {outcome.steps} steps. A greater --train.steps goes on from here.")
    else:
        name = "1 - cos" if config.objective.loss == "cosine" else config.objective.loss
        memory = f", peak GPU memory {outcome.peak_memory_bytes / 2**30:.1f} GiB" if outcome.peak_memory_bytes else ""
        loss = "every update of the last steps skipped" if outcome.loss is None else f"{name} {outcome.loss:.4f}"
        print(f"\n{outcome.steps} steps, {loss}{memory}")
        print(f"{outcome.images_per_second:.1f} images/s, {100 * outcome.data_wait:.1f} % of the time waiting for data")
    print(f"run      {outcome.folder}")
    print(f"next     mvp-fast export {outcome.folder} --format timm")
    return 0
