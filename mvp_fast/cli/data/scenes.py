"""`mvp-fast data scenes`: draw a synthetic set of JPEG images with labels, captions and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvp_fast.cli.data.tell import progress
from mvp_fast.cli.parse import parse


@dataclass(frozen=True)
class Options:
    """Draw a synthetic set of JPEG images: scenes of shapes on textured grounds, with class, caption and mask.

    OUT/<class>/*.jpg are the images, OUT/masks/<class>/*.png their masks, OUT/scenes.parquet their captions and
    objects, OUT/scenes.json says what the set is. The same arguments give the same files; a complete set is left as it
    is, and an interrupted one is taken up where it stopped.
    """

    out: str
    """The set's folder; made where it is missing."""
    images: int
    """How many images to draw."""
    profile: Literal["imagenet", "small", "plain"] = "imagenet"
    """imagenet: ImageNet's image sizes and about 110 KB a file, to measure with. small: 96 x 96, to learn from. plain:
    the same size, with one or two untextured objects on three grounds: easier to learn from."""
    seed: int = 0
    """Decides what is drawn."""
    pairs: Literal["all", "seen", "held-out"] = "all"
    """Which pairs of colour and shape objects may have: all, all but the held-out ones, or those alone. A set of
    `seen` to train on and one of `held-out` to test on share no pair, in no object."""
    holdout_share: float = 0.2
    """Share of the pairs that is held out, the same number of every colour and of every shape."""
    holdout_seed: int = 0
    """Decides which pairs are held out; the same for both sets."""
    workers: int = 0
    """Processes that draw; 0 takes one a core."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "data scenes")

    from mvp_fast.samples.scenes import SceneSet, chosen_pairs, write_set

    pairs = chosen_pairs(options.pairs, options.holdout_share, options.holdout_seed)
    asked = SceneSet(options.images, options.profile, options.seed, pairs)
    with progress("drawing scenes") as told:
        report = write_set(options.out, asked, options.workers, told and (lambda done: told(done, options.images)))
    size = f"{report.bytes / report.images / 1000:.0f} KB a file"
    if report.drawn:
        rate = f"{report.drawn / report.seconds:.0f} images/s"
        kept = f", {report.images - report.drawn:,} were there" if report.drawn < report.images else ""
        print(f"drew     {report.drawn:,} images in {report.seconds:.1f} s ({rate}){kept}")
    else:
        print("The set is complete: nothing to draw.")
    print(f"set      {report.images:,} images, {size}, {len(report.classes)} classes, profile {options.profile}")
    if pairs is not None:
        print(f"pairs    {options.pairs}: {len(pairs)} of colour and shape")
    print(f"folder   {report.folder}")
    print(f"next     mvp-fast data index {report.folder}")
    return 0
