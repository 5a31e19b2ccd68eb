"""`mvp-fast segment`: train UPerNet on a pre-trained network and judge it on masks."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mvp_fast.cli.training import memory_told, tell_outcome
from mvp_fast.config.load import config_to_yaml, load_settings, override
from mvp_fast.config.segment import SegmentSettings, check_segment

if TYPE_CHECKING:
    from mvp_fast.train.loop import Outcome

DESCRIPTION = """Train UPerNet on a pre-trained network, and judge it on masks: mIoU, pixel accuracy, IoU of each class.

MODEL, the first word, is a run of `mvp-fast train`, a timm model's name, or a folder of `mvp-fast export`.
--segment.train and --segment.val are ADE20K's folder, or folders of images with masks (PNG, a class's number a pixel).
--from-scratch is the control: the same network with fresh weights. --config FILE reads a YAML file
(configs/segment_*.yaml), --print-config shows the settings in force and ends; every other option overrides one setting.
Figures come to RUN/results.json, pictures to RUN/predictions/.
Under torchrun: torchrun --nproc-per-node 8 -m mvp_fast segment MODEL ..."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast segment", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--from-scratch", action="store_true")
    # Only the first word: what stands later may be the value of an option that this parser does not know.
    model, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    own, rest = parser.parse_known_args(rest)
    base = load_settings(SegmentSettings, own.config) if own.config else SegmentSettings()
    settings = override(base, rest, "mvp-fast segment [MODEL]", DESCRIPTION)
    segment = replace(
        settings.segment,
        model=model or settings.segment.model,
        from_scratch=own.from_scratch or settings.segment.from_scratch,
    )
    settings = replace(settings, segment=segment)
    if own.print_config:
        print(config_to_yaml(settings), end="")
        return 0
    check_segment(settings)
    return _segment(settings)


def _segment(settings: SegmentSettings) -> int:
    from mvp_fast.evaluate.segment.finish import finish
    from mvp_fast.evaluate.segment.run import SegmentRun, build_segment_run
    from mvp_fast.train.distributed import join_ranks
    from mvp_fast.train.guards import StopRequest
    from mvp_fast.train.loop import train

    built: list[SegmentRun] = []

    def build(*parts: Any) -> SegmentRun:
        built.append(build_segment_run(*parts))
        return built[-1]

    with join_ranks(settings.train) as ranks, memory_told(settings):
        outcome = train(settings, ranks, build)
        if ranks.is_main:
            tell_outcome(outcome, "cross entropy")
        with StopRequest() as stop:
            content = finish(built[-1], lambda: stop.requested)
        if ranks.is_main:
            _tell(outcome, content)
    return 0


def _tell(outcome: Outcome, content: dict[str, Any]) -> None:
    """The figures, and the classes from the best to the worst."""
    print(
        f"\nmIoU {content['miou']:.4f}  pixel accuracy {content['pixel_accuracy']:.4f}  mean class accuracy"
        f" {content['mean_accuracy']:.4f}  ({content['classes_counted']} classes)"
    )
    found = {name: each["iou"] for name, each in content["per_class"].items() if each["iou"] is not None}
    ranked = sorted(found, key=lambda name: found[name], reverse=True)
    shown = ranked if len(ranked) <= 20 else [*ranked[:10], *ranked[-10:]]
    for name in shown:
        print(f"  {found[name]:.4f}  {name}")
    print(f"results  {outcome.folder / 'results.json'}")
    print(f"pictures {outcome.folder / 'predictions'}")
