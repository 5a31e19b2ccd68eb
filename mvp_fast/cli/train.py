"""`mvp-fast train`: pre-train a student against a frozen teacher."""

from __future__ import annotations

import argparse

from mvp_fast.cli.training import memory_told, tell_outcome, train_in_ranks
from mvp_fast.config.load import config_to_yaml, load_config, parse_overrides
from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError

PROFILED_STEPS = 20
DESCRIPTION = """Pre-train a student against a frozen teacher.

--config FILE reads a YAML file (configs/ has some), --print-config shows the settings in force and ends; every other
option overrides one setting. --profile [STEPS] measures that many steps (20) of the run in place of training: where
their time goes and what limits it, in RUN/profile/report.html; nothing else in RUN is touched.
Under torchrun: torchrun --nproc-per-node 8 -m mvp_fast train ..."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--profile", nargs="?", const=str(PROFILED_STEPS))
    own, rest = parser.parse_known_args(argv)
    steps = None if own.profile is None else _steps(own.profile)
    base = load_config(own.config) if own.config else Config()
    config = parse_overrides(base, rest, "mvp-fast train", DESCRIPTION)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    return _train(config) if steps is None else _profile(config, steps)


def _steps(text: str) -> int:
    """The number of steps after --profile."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{text} is no number of steps to measure",
            where="--profile",
            fix=f"Give a whole number from 1, or none for {PROFILED_STEPS}",
        )
    return int(text)


def _profile(config: Config, steps: int) -> int:
    from mvp_fast.train.distributed import join_ranks
    from mvp_fast.train.profile.session import profile

    with join_ranks(config.train) as ranks, memory_told(config):
        report = profile(config, ranks, steps)
        if ranks.is_main:
            print(f"\nreport    {report}")
            print(f"trace     {report.with_name('trace.json.gz')}, to be opened in https://ui.perfetto.dev")
    return 0


def _train(config: Config) -> int:
    outcome = train_in_ranks(config)
    if outcome is not None:
        tell_outcome(outcome, "1 - cos" if config.objective.loss == "cosine" else config.objective.loss)
        print(f"next     mvp-fast export {outcome.folder} --format timm")
    return 0
