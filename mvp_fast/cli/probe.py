"""`mvp-fast probe`: how well a frozen network's features tell classes apart."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch

    from mvp_fast.evaluate.probe_settings import ProbeSettings


@dataclass(frozen=True)
class Options:
    """Measure what a frozen network's features are worth: k nearest neighbours, and linear classifiers on every block.

    The neighbours are training images. A linear classifier for every block and learning rate is trained on CLS and mean
    of patches, joined; the best is chosen on a part of the training set that is held out, trained again on all of it,
    and tested. Features are kept in OUT/features; a probe that was stopped goes on from there.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|TIMM-NAME")]
    """A run's folder, a timm model's name, or a folder that `mvp-fast export --format timm` wrote."""
    train: str
    """The training set's Parquet index, or the folder that holds it as index.parquet."""
    test: str
    """The test set's; the same classes by name."""
    out: Path | None = None
    """The folder for results.json and features; RUN/probe for a run, else ./probe-NAME."""
    features: Path | None = None
    """The folder that features are kept in, which probes on other test sets may share; OUT/features where not given."""
    overwrite: bool = False
    """Compute results anew where these are there already. Features are taken as they are."""
    checkpoint: str = "latest"
    """Of a run: `latest`, a step number, or the path of a checkpoint."""
    ema: bool = False
    """Of a run: the averaged weights."""
    untrained: bool = False
    """Of a timm model: fresh weights drawn from --seed, as a control."""
    image_size: int | None = None
    """Side of the network's input, pixels; its own where not given."""
    crop_share: float = 0.875
    """Side of the centre crop as a share of the image's shorter side."""
    k: tuple[int, ...] = (10, 20)
    """Numbers of neighbours."""
    temperature: float = 0.07
    """T of the neighbours' votes, exp(cos / T)."""
    lr: tuple[float, ...] = (1e-4, 4e-4, 1e-3, 4e-3, 1e-2, 4e-2)
    """Learning rates of the linear classifiers, all trained at once."""
    epochs: int = 90
    """Epochs of the linear classifiers."""
    head_batch_size: int = 256
    """Images a step of the linear classifiers."""
    weight_decay: float = 0.0
    """Weight decay of the linear classifiers."""
    label_fraction: float = 1.0
    """Share of each class of the training set that is used, one image at least."""
    held_out: float = 0.1
    """Share of each class of that by which layer and learning rate are chosen."""
    seed: int = 0
    """Draws these parts, and the order in which classifiers see them."""
    batch_size: int = 128
    """Images that go through the network at a time."""
    loader: Literal["auto", "dali", "cpu", "torchvision", "ffcv"] = "auto"
    """The backend that loads images, as data.loader of `train`."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter; the loader `ffcv` has `area` alone."""
    threads: int = 0
    """Threads for reading and decoding; 0 takes all cores."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What the network computes in. auto: bf16 on a GPU, fp32 on the CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU where there is one."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "probe")

    import torch

    from mvp_fast.config.schema import TrainConfig
    from mvp_fast.evaluate.backbone import BackboneSource, load_backbone
    from mvp_fast.evaluate.probe import RESULTS, probe
    from mvp_fast.samples.index import Index
    from mvp_fast.train.distributed import choose_device

    device = choose_device(TrainConfig(device=options.device))
    settings = _settings(options, device)
    settings.check()
    train, test = Index.open(options.train), Index.open(options.test)
    source = BackboneSource(
        options.model, options.checkpoint, options.ema, options.untrained, options.seed, options.image_size
    )
    backbone = load_backbone(source).to(device)
    out = options.out or _default_out(options.model)
    print(f"network   {backbone.words}, {backbone.image_size} px, {settings.extraction.precision} on {device.type}")
    print(f"train     {train.path}: {len(train):,} images")
    print(f"test      {test.path}: {len(test):,} images")
    try:
        results = probe(
            backbone, train, test, settings, out, device, overwrite=options.overwrite, features=options.features
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"The GPU's memory is too small: {str(error).partition('.')[0]}",
            where=f"--batch-size {options.batch_size}, --head-batch-size {options.head_batch_size}",
            fix="Lower the one for making features, the other and the number of --lr for the linear classifiers;"
            " features that are finished are kept",
        ) from error
    _show(results)
    print(f"results   {out / RESULTS}")
    return 0


def _default_out(model: str) -> Path:
    """RUN/probe for a run, ./probe-NAME for others."""
    path = Path(model).expanduser()
    return path / "probe" if (path / "checkpoints").is_dir() else Path(f"probe-{path.resolve().name}")


def _settings(options: Options, device: torch.device) -> ProbeSettings:
    from mvp_fast.config.schema import DataConfig
    from mvp_fast.evaluate.features import Extraction
    from mvp_fast.evaluate.linear import HeadSettings
    from mvp_fast.evaluate.probe_settings import ProbeSettings

    if options.threads < 0:
        raise ConfigError(f"{options.threads} threads can't work", where="--threads", fix="Take 0 for all cores")
    precision = options.precision if options.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    data = DataConfig(loader=options.loader, interpolation=options.interpolation, threads=options.threads)
    return ProbeSettings(
        extraction=Extraction(options.crop_share, precision, options.batch_size, data),
        heads=HeadSettings(options.lr, options.epochs, options.head_batch_size, options.weight_decay),
        k=options.k,
        temperature=options.temperature,
        label_fraction=options.label_fraction,
        held_out=options.held_out,
        seed=options.seed,
    )


def _show(results: dict[str, Any]) -> None:
    """The table of layers, and what came of it."""
    from rich.console import Console
    from rich.table import Table

    knn, linear, k = results["knn"], results["linear"], str(max(results["settings"]["k"]))
    ways = list(dict.fromkeys(row["pooling"] for row in knn["layers"]))
    near = {(row["layer"], row["pooling"]): row["accuracy"][k] for row in knn["layers"]}
    table = Table(title=f"Accuracy, {len(results['classes'])} classes")
    table.add_column("layer", no_wrap=True)
    for head in (*(f"{k}-NN, {way}, test" for way in ways), "linear, held out", "at lr"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in linear["layers"]:
        lr, best = max(row["held_out_accuracy"].items(), key=lambda item: item[1])
        mark = " <" if row["layer"] == linear["chosen"]["layer"] else ""
        table.add_row(row["layer"], *(percent(near[row["layer"], way]) for way in ways), percent(best) + mark, lr)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for number, found in knn["k"].items():
        print(f"{number + '-NN':<9} {figures(found)}; {knn['layer']}, {knn['pooling']}")
    chosen = linear["chosen"]
    print(f"linear    {figures(linear['test'])}; {chosen['layer']}, lr {chosen['lr']:g}, chosen on held-out images")
    for note in results["notes"]:
        print(f"note      {note}")


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def figures(found: dict[str, Any]) -> str:
    """An accuracy with all that is known of it."""
    low, high = (percent(share) for share in found["interval95"])
    five = f", top 5 {percent(found['accuracy_top5'])}" if "accuracy_top5" in found else ""
    return f"{percent(found['accuracy'])} of {found['images']:,} test images (95 %: {low} to {high}){five}"
