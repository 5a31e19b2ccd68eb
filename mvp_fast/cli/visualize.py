"""`mvp-fast visualize`: pictures of what a network sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvp_fast.cli.parse import parse

if TYPE_CHECKING:
    from mvp_fast.evaluate.visualize.session import Drawn


@dataclass(frozen=True)
class Options:
    """Draw what a network sees in some images, as PNG sheets to look at.

    attention.png: where CLS looks, by each head. pca.png: the patches' features as colour. similarity.png: how like
    one patch all others are. With --text, of a run whose teacher is a CLIP: text.png, how near the feature that the
    student predicts for each patch is to each text's. No label is used for it. results.json says what was drawn, and
    where the images have masks (data scenes), how well each text that names a shape finds it.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a folder that `mvp-fast export` wrote, or a timm model's name."""
    data: tuple[str, ...] = ()
    """An index (Parquet, or the folder that holds index.parquet), or image files. A run's own index where not given."""
    text: tuple[str, ...] = ()
    """Texts to find: --text "a red square" "grass". Several are drawn side by side, with a map of the nearest."""
    patch: tuple[str, ...] = ()
    """Patches that all others are compared with: ROW,COLUMN of the grid from 0, or a pixel of the crop as x=X,y=Y.
    Three of them where not given."""
    images: int = 8
    """How many images of an index, evenly over its classes."""
    seed: int = 0
    """Decides which images, and the weights with --untrained."""
    block: int = -1
    """The block whose attention and features are drawn, from 0; -1 is the last."""
    pictures: tuple[Literal["attention", "pca", "similarity", "text"], ...] = ("attention", "pca", "similarity", "text")
    """Which pictures to draw."""
    foreground: float | None = None
    """Of pca.png: show only patches whose first component, scaled to 0 to 1, exceeds this, such as 0.5, in colours
    fitted on them alone."""
    template: tuple[str, ...] = ("{}",)
    """Sentences to put a text into before CLIP reads it, {} in its place; their features are averaged."""
    clip_weights: Path | None = None
    """A checkpoint of the run's CLIP with both towers, where the run's own is not here or has no text tower."""
    with_teacher: bool = False
    """Draw the same maps of the teacher's own patch features too, as text-teacher.png."""
    score_images: int = 0
    """How many images the figures of the texts are taken over; 0: those that are shown."""
    out: Path | None = None
    """Folder to write to; RUN/visualize for a run, else ./visualize-MODEL."""
    crop_share: float = 1.0
    """Side of the central square that is shown, as a share of the image's shorter side."""
    checkpoint: str = "latest"
    """Of a run: `latest`, a step number, or the path of a checkpoint."""
    ema: bool = False
    """Of a run: take the averaged weights."""
    untrained: bool = False
    """Of a timm model: fresh weights, as a control."""
    image_size: int | None = None
    """Side of the crops, pixels, a multiple of the patch size; the network's own where not given."""
    loader: Literal["auto", "dali", "cpu", "torchvision"] = "auto"
    """The backend that reads an index."""
    threads: int = 0
    """CPU threads for it; 0 takes all cores."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the network runs."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "visualize")

    from mvp_fast.evaluate.backbone import BackboneSource
    from mvp_fast.evaluate.visualize.session import Settings, visualize

    source = BackboneSource(
        options.model, options.checkpoint, options.ema, options.untrained, options.seed, options.image_size
    )
    drawn = visualize(
        Settings(
            source,
            options.data,
            options.out or _out(options.model),
            images=options.images,
            seed=options.seed,
            texts=options.text,
            templates=options.template,
            clip_weights=None if options.clip_weights is None else options.clip_weights.expanduser(),
            with_teacher=options.with_teacher,
            score_images=options.score_images,
            patches=options.patch,
            block=options.block,
            foreground=options.foreground,
            pictures=options.pictures,
            crop_share=options.crop_share,
            loader=options.loader,
            threads=options.threads,
            device=options.device,
        )
    )
    _tell(drawn, options.out or _out(options.model))
    return 0


def _out(model: str) -> Path:
    """The folder to write to where none was given."""
    path = Path(model).expanduser()
    return path / "visualize" if (path / "checkpoints").is_dir() else Path(f"visualize-{path.resolve().name}")


def _tell(drawn: Drawn, out: Path) -> None:
    results = drawn.results
    settings = results["settings"]
    print(f"network   {results['backbone']['words']}")
    print(f"images    {len(results['data']['images'])} of {settings['image_size']} px, seed {settings['seed']}")
    for path in drawn.paths:
        print(f"{path.stem:<9} {path}" if len(path.stem) < 10 else f"{path.stem} {path}")
    for name, whose in (("text", "student"), ("text-teacher", "teacher")):
        for row in results.get("text", {}).get(name, {}).get("figures", []):
            print(_figure(row, whose))
    for remark in drawn.remarks:
        print(f"note      {remark}")
    print(f"results   {out / 'results.json'}")


def _figure(row: dict[str, Any], whose: str) -> str:
    start = f"finds     {whose}, “{row['text']}”: {row['word']} in {row['images_with_it']} of {row['images']} images"
    if row["roc_auc"] is None:
        return f"{start}: no figure"
    precision, share = row["average_precision"], row["patches"]
    return f"{start}, ROC AUC {row['roc_auc']:.3f}, average precision {precision:.3f} (at random {share:.3f})"
