"""The settings of `mvp-fast teacher fit`: a CLIP trained from the beginning on images and captions. Light imports.

CLIP is arXiv 2103.00020. Where a default differs from pre-training's, the section is a class of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mvp_fast.config.check import check_other_task
from mvp_fast.config.schema import DataConfig, KernelsConfig, OptimConfig, RunConfig, TrainConfig
from mvp_fast.errors import ConfigError


@dataclass(frozen=True)
class FitRunConfig(RunConfig):
    """Where the run lives and what it writes."""

    dir: str = "runs/clip"
    """The run's folder; at the end it has model/, in open_clip's hub format: what `train` takes as teacher.name."""


@dataclass(frozen=True)
class FitDataConfig(DataConfig):
    """Which images, how they are cropped, and which backend loads them."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Least and greatest share of the image's area in a crop (CLIP: 0.9 1): a caption tells of the whole image."""
    flip: float = 0.0
    """Probability of a horizontal flip; 0, because captions may tell left from right."""


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP that is trained: one of open_clip's, with its two towers, or of other sizes."""

    name: str = "ViT-S-16"
    """An open_clip model by name, a plain ViT and open_clip's own text tower; its image size is data.image_size."""
    embed_dim: int | None = None
    """Channels of the space that both towers end in, in place of the named model's; the width of the targets later."""
    width: int | None = None
    """Width of the image tower in place of the named model's; a multiple of its heads."""
    layers: int | None = None
    """Blocks of the image tower in place of the named model's."""
    heads: int | None = None
    """Attention heads of the image tower; where it is left out, one for every 64 channels."""
    patch_size: int | None = None
    """Side of a patch, pixels, in place of the named model's; must divide data.image_size."""
    text_width: int | None = None
    """Width of the text tower in place of the named model's; a multiple of its heads."""
    text_layers: int | None = None
    """Blocks of the text tower in place of the named model's."""
    text_heads: int | None = None
    """Attention heads of the text tower; where it is left out, the named model's, or with another width one for every
    64 channels."""
    context_length: int | None = None
    """Tokens of the longest text, with the two at its ends, in place of the named model's (77). Nothing is cut off: a
    longer caption is an error."""


@dataclass(frozen=True)
class FitConfig:
    """What images are matched with, and what is measured on the way."""

    captions: str = ""
    """A table (.parquet, .tsv, .jsonl) with the columns key and caption; a key is the image's path in its folder, with
    or without the suffix. Of several captions of an image one is drawn each time. Empty: scenes.parquet beside the
    index."""
    brief: bool = False
    """Of scenes: match an image a third of the time each with its caption, with the main object's colour and shape ("a
    red square"), and with these, its size and its texture. What a prompt asks for is then learnt sooner."""
    test: str = ""
    """The index of images to measure on: recall of captions, and of scenes the zero-shot accuracy."""
    held_out: str = ""
    """The index of scenes of held-out compositions (`mvp-fast data scenes --pairs held-out`), to measure on too.
    Refused where the training set has one of their pairs."""
    test_captions: str = ""
    """As `captions`, of the images in `test`."""
    evaluate_every: int = 0
    """Steps between measurements; 0 measures at the end alone."""


@dataclass(frozen=True)
class FitOptimConfig(OptimConfig):
    """Optimizer and learning rate schedule: linear warm-up, then half a cosine."""

    lr: float = 1e-3
    """Peak learning rate at `reference_batch_size`; scaled linearly with train.batch_size."""
    reference_batch_size: int = 1024
    """The batch size for which `lr` holds."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine; not scaled."""
    warmup_fraction: float = 0.05
    """Share of the steps in warm-up."""
    weight_decay: float = 0.2
    """Weight decay of matrices (CLIP: 0.2); biases, norms, the temperature and position tables have none."""
    eps: float = 1e-6
    """Adam's epsilon (CLIP's for ViTs: 1e-6)."""
    clip_grad: float = 1.0
    """Greatest norm of the whole gradient; 0 for no clipping."""


@dataclass(frozen=True)
class FitTrainConfig(TrainConfig):
    """Length, batch, precision and what is kept."""

    epochs: float = 32.0
    """Times that each image is seen; used where `steps` is 0."""
    batch_size: int = 1024
    """Global batch size: over all ranks and accumulation steps. Each image is told from as many captions."""
    accumulate: int = 1
    """Micro-batches an optimizer step: less memory. Images are still told from the captions of the whole batch, so the
    result is the same; for that each micro-batch is computed twice, the first time without a gradient."""


@dataclass(frozen=True)
class TeacherFitConfig:
    """A whole run."""

    run: FitRunConfig = field(default_factory=FitRunConfig)
    data: FitDataConfig = field(default_factory=FitDataConfig)
    model: ClipConfig = field(default_factory=ClipConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    optim: FitOptimConfig = field(default_factory=FitOptimConfig)
    train: FitTrainConfig = field(default_factory=FitTrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    seed: int = 0
    """Decides order, crops, captions and initial weights."""
    resume: str = "none"
    """none starts anew (and refuses a folder that holds a run), auto goes on from the newest checkpoint of run.dir if
    there is one, or the path of a checkpoint."""


def check_fit(config: TeacherFitConfig) -> None:
    """Check the ranges and combinations of a run.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    check_other_task(config)
    model = config.model
    for name in (
        *("embed_dim", "width", "layers", "heads", "patch_size"),
        *("text_width", "text_layers", "text_heads", "context_length"),
    ):
        value = getattr(model, name)
        least = 3 if name == "context_length" else 1
        if value is not None and value < least:
            raise ConfigError(f"model.{name.replace('_', '-')} is {value}, but must be {least} or more")
    if config.fit.evaluate_every < 0:
        raise ConfigError(f"fit.evaluate-every is {config.fit.evaluate_every}, but must be 0 or more")
    if config.data.loader == "synthetic":
        raise ConfigError(
            "The loader `synthetic` has no captions: data.loader is synthetic", fix="Take another, such as auto"
        )
    if config.train.batch_size < 2:
        raise ConfigError("train.batch-size is 1, but an image must be told from another: 2 or more")
