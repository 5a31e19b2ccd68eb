"""`mvp-fast finetune`: train a classifier from a pre-trained network."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from mvp_fast.cli.training import memory_told, tell_outcome
from mvp_fast.config.finetune import FinetuneConfig, check_finetune
from mvp_fast.config.load import config_to_yaml, load_settings, override

DESCRIPTION = """Train a classifier from a pre-trained network, and test it.

mvp-fast finetune MODEL --data.index TRAIN --finetune.test TEST --run.dir DIR
MODEL is a run of `mvp-fast train` or `finetune`, a timm model's name, or a folder that `mvp-fast export` wrote; it
comes first, or in the settings as model.name. Images lie in class folders, and both sets have the same ones.
--config FILE reads a YAML file (configs/ has some), --print-config shows the settings in force and ends;
--from-scratch (or --untrained) takes MODEL's shape with fresh weights; --checkpoint and --ema are model.checkpoint and
model.ema; every other option overrides one setting. DIR/results.json has the result.
Under torchrun: torchrun --nproc-per-node 8 -m mvp_fast finetune MODEL ..."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    parser = argparse.ArgumentParser("mvp-fast finetune", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--from-scratch", "--untrained", dest="untrained", action="store_true")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--checkpoint", default="")
    own, rest = parser.parse_known_args(argv)
    config = load_settings(FinetuneConfig, own.config) if own.config else FinetuneConfig()
    given: dict[str, Any] = {"name": name, "untrained": own.untrained, "ema": own.ema, "checkpoint": own.checkpoint}
    config = replace(config, model=replace(config.model, **{field: value for field, value in given.items() if value}))
    config = override(config, rest, "mvp-fast finetune", DESCRIPTION)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    check_finetune(config)
    return _finetune(config)


def _finetune(config: FinetuneConfig) -> int:
    from mvp_fast.evaluate.finetune.build import finetune
    from mvp_fast.evaluate.finetune.run import EMA, RESULTS, WEIGHTS
    from mvp_fast.train.distributed import join_ranks

    with join_ranks(config.train) as ranks, memory_told(config):
        outcome, results = finetune(config, ranks)
        if not ranks.is_main:
            return 0
    tell_outcome(outcome, "cross entropy")
    for name, words in ((WEIGHTS, "test"), (EMA, "averaged")):
        if name in results:
            told = results[name]
            top5 = f", top-5 {100 * told['accuracy_top5']:.2f} %" if "accuracy_top5" in told else ""
            top1 = f"top-1 {100 * told['accuracy']:.2f} %"
            print(f"{words:<9}{top1}{top5}, loss {told['loss']:.4f}, of {told['images']:,} images")
    print(f"results  {outcome.folder / RESULTS}")
    return 0
