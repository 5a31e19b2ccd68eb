"""`mvp-fast teacher fit`: train a CLIP on images and their captions, to be a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mvp_fast.cli.training import tell_outcome, train_in_ranks
from mvp_fast.config.fit import TeacherFitConfig, check_fit
from mvp_fast.config.load import config_to_yaml, load_settings, override

DESCRIPTION = """Train a CLIP on images and their captions, to be a teacher.

RUN/model is what comes of it, in open_clip's hub format: `mvp-fast train --teacher.name RUN`. With --fit.test and
--fit.held-out, zero-shot accuracy and recall are measured and written to RUN/results.json.
--config FILE reads a YAML file (configs/mini/clip.yaml is one), --print-config shows the settings in force and ends;
every other option overrides one setting. Under torchrun: torchrun --nproc-per-node 8 -m mvp_fast teacher fit ..."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast teacher fit", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    own, rest = parser.parse_known_args(argv)
    base = load_settings(TeacherFitConfig, own.config) if own.config else TeacherFitConfig()
    config = override(base, rest, "mvp-fast teacher fit", DESCRIPTION)
    check_fit(config)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    from mvp_fast.train.fit.run import build_fit

    outcome = train_in_ranks(config, build_fit)
    if outcome is not None:
        tell_outcome(outcome, "contrastive loss")
        _finish(outcome.folder)
    return 0


def _finish(run: Path) -> None:
    """Write the model and the results of a finished run; both are of its last checkpoint, so they can be made again."""
    from mvp_fast.evaluate.results import write_results
    from mvp_fast.train.checkpoint import find_checkpoint, read_state
    from mvp_fast.train.fit.run import write_model

    model = write_model(run)
    state = read_state(find_checkpoint(run))
    figures = dict(state["figures"])
    if figures:
        content: dict[str, Any] = {
            "model": state["model"],
            "step": figures.pop("step"),
            "data": {"train": {"index": state["plan"]["index"]}, **state["tests"]},
            "settings": state["config"],
            "figures": figures,
            "chances": state["chances"],
        }
        write_results(run / "results.json", "teacher fit", content)
        for name, value in figures.items():
            print(f"{name:<25}{value:7.4f}  (chance {state['chances'][name]:.4f})")
    print(f"model    {model}")
    print(f"next     mvp-fast train --teacher.name {run}")
