"""Every setting of a run: one frozen dataclass a part, one docstring a field (`mvp-fast train --help` shows them).

The values here are the ViT-B/16 recipe; configs/*.yaml say what differs. This module imports nothing heavy, so that
`--help` answers at once. Marks: BEiT is arXiv 2106.08254, BEiT v2 2208.06366, MVP 2203.05175.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it writes."""

    dir: str = "runs/mvp"
    """The run's folder: config.yaml, metrics.jsonl, checkpoints/ and the rest."""
    tensorboard: bool = True
    """Write tensorboard/ beside metrics.jsonl."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs the extra `wandb`); empty for none."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are cropped, and which backend loads them."""

    index: str = ""
    """The Parquet index that `mvp-fast data index` wrote, or the folder that holds it as index.parquet."""
    loader: Literal["auto", "dali", "cpu", "torchvision", "ffcv", "synthetic"] = "auto"
    """The backend; all see the same samples, boxes and masks. auto: `dali` where it decodes on the GPU, else `cpu`; the
    run's header says which. `ffcv` reads a beton (data convert). `synthetic` repeats one resident batch (a ceiling)."""
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    """Where `dali` decodes, resizes and flips. auto: on the GPU in a run on a GPU. gpu: there, or not at all."""
    hw_decoder_load: float = 0.65
    """Share of the images that go to the GPU's JPEG decoder, where it has one; the others are for its multiprocessors.
    DALI's own default; which share is fastest depends on GPU and threads."""
    threads: int = 0
    """CPU threads a rank for reading and decoding; 0 takes this machine's cores divided by its ranks."""
    order: Literal["shuffled", "sharded"] = "shuffled"
    """shuffled mixes all samples; sharded reads an index of shards a few shards at a time, for disks that seek slowly
    and for storage in the network."""
    shuffle_window: int = 65536
    """Samples mixed at a time in the order `sharded`: neighbours in their shards come within two windows."""
    repeat: int = 1
    """Crops from each decoded image, in a row, in the same batch. An image is still seen train.epochs times in all."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    image_size: int = 224
    """Side of the square crop, pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the image's area in a crop (BEiT v2: 0.2 1; BEiT: 0.08 1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest aspect ratio (width / height) of a crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter, antialiased. `area` is OpenCV's, which the loader `ffcv` has alone, and it has no other."""
    bad_sample_budget: float = 0.001
    """Greatest share of samples that may fail to decode; each is replaced by a stand-in. 0 stops at the first."""
    bad_sample_probation: int = 1000
    """Samples seen before the share counts; until then the budget is that share of this many, rounded up."""


@dataclass(frozen=True)
class MaskConfig:
    """Block-wise masks as in BEiT and BEiT v2."""

    patches: int = 75
    """Patches masked in each image, exactly (75 of 196 in BEiT v2)."""
    min_block: int = 16
    """Least area of a masked rectangle, patches."""
    min_aspect: float = 0.3
    """Rectangles have an aspect ratio log-uniform in [this, 1 / this]."""


@dataclass(frozen=True)
class StudentConfig:
    """The network that is trained: one of timm's BEiT models, with shared relative position bias."""

    name: str = "beitv2_base_patch16_224"
    """A timm BEiT by name: beitv2_base_patch16_224, beitv2_large_patch16_224, beit_base_patch16_224, ..."""
    width: int | None = None
    """Embedding width in place of the named model's; a multiple of the number of heads."""
    depth: int | None = None
    """Number of blocks in place of the named model's."""
    heads: int | None = None
    """Number of attention heads in place of the named model's."""
    layer_scale: float = 0.1
    """Initial value of the layer scale (BEiT: B 0.1, L 1e-5)."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, rising linearly from 0 at the first."""
    drop_path_mode: Literal["image", "subset"] = "image"
    """image: each image drops each branch by its own chance; all branches are computed. subset: that share of each
    micro-batch drops a branch, which is computed for the others alone (DINOv2); it pays at rates above 0.1."""


@dataclass(frozen=True)
class TeacherConfig:
    """What makes the targets: the token features of a frozen network, or a patch's own pixels or gradients."""

    kind: Literal["clip", "timm", "pixels", "hog"] = field(default="clip", kw_only=True)
    """clip: a vision tower of open_clip. timm: a plain ViT of timm, such as DINO's. pixels: a patch's values,
    normalised per patch (MAE, 2111.06377). hog: histograms of oriented gradients of its cells (MaskFeat, 2112.09133).
    The last two have no CLS token (objective.cls False)."""
    name: str = "ViT-B-16"
    """clip: an open_clip model by name (open_clip.list_models()), or the folder of a run of `mvp-fast teacher fit`.
    timm: a timm model by name, with a tag for weights other than its usual ones (vit_small_patch16_224.dino). Ignored
    for pixels, hog, and a folder of timm's format."""
    pretrained: str = "openai"
    """clip: an open_clip tag (needs the network once), the path of a local checkpoint, or `random`; where the name is a
    folder, the default stands for the weights in it. timm: `timm` for its own weights (the network, once), the path of
    a file or of a folder with model.safetensors and config.json (`mvp-fast export` writes one), or `random`. Ignored
    for pixels and hog."""
    seed: int = 0
    """Seed of the weights where `pretrained` is random."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """What a tower computes in; its weights are cast once. auto: fp32 where train.precision is fp32, else fp16 on a GPU
    and bf16 on the CPU. pixels and hog are always fp32."""
    fp8: bool = False
    """A tower's linear layers in FP8, with a scale for each token and each channel. The run's header says how near its
    features come to those without. Needs fp16 or bf16 as precision, and on a GPU compute capability 8.9."""
    graph: bool = True
    """On a GPU: patches, mask and targets as one CUDA graph, without launching kernels one by one."""
    ahead: bool = True
    """On a GPU: make the next micro-batch's targets on a stream of their own while the student works on this one."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student predicts and how it is scored."""

    tokens: Literal["masked", "all"] = "masked"
    """Patch tokens in the loss."""
    cls: bool = True
    """The CLS token is in the loss too (the global feature)."""
    target_norm: Literal["l2", "layernorm", "none"] = "l2"
    """Per-token normalisation of the targets (layernorm has no affine part)."""
    loss: Literal["cosine", "smooth_l1", "mse"] = "cosine"
    """cosine reports 1 - cos, mean over tokens; smooth_l1 and mse (squared difference; MAE's and MaskFeat's, with
    target_norm none) are means over tokens and channels."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule: linear warm-up, then a decay."""

    name: str = "adamw"
    """An optimizer of timm's factory (timm.optim.list_optimizers()). adamw and adam are torch's fused ones; fusedadam,
    fusedadamw and fusedlamb are apex's, where NVIDIA's is built. All but fusedlamb of these clip and skip a non-finite
    update on the device; with the others the host waits for each step."""
    lr: float = 1.5e-3
    """Peak learning rate at `reference_batch_size`; scaled linearly with train.batch_size."""
    reference_batch_size: int = 2048
    """The batch size for which `lr` holds."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """How it decays after the warm-up: along half a cosine, or along a line (poly, power 1, usual in segmentation)."""
    min_lr: float = 1e-5
    """Learning rate at the end of the decay; not scaled."""
    warmup_fraction: float = 10 / 300
    """Share of the steps in warm-up (BEiT v2: 10 of 300 epochs)."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms, layer scale, tokens and position tables have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's averaging factors (0.9 0.98 shortens loss spikes; BEiT 0.9 0.999)."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 3.0
    """Greatest norm of the whole gradient; 0 for no clipping."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and what is kept."""

    epochs: float = 300.0
    """Times that each image is seen; used where `steps` is 0. With data.repeat r, 1/r as many decodes."""
    steps: int = 0
    """Optimizer steps; 0 derives them from `epochs`."""
    batch_size: int = 2048
    """Global batch size: over all ranks and accumulation steps."""
    accumulate: int = 1
    """Micro-batches an optimizer step."""
    sharding: Literal["none", "full"] = "none"
    """none: each rank holds the whole student (DDP). full: ranks share its weights, gradients and optimizer state
    (FSDP), for L and larger; the same curve and the same checkpoints, so a run may change it. No effect on one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast for student and teacher, or float32 throughout."""
    compile: Literal["auto", "blocks", "off"] = "auto"
    """blocks: the student's blocks go through torch.compile, whole and with fixed shapes. auto: on a GPU."""
    step_graph: bool = False
    """On one GPU: forward, backward and update as one CUDA graph. It pays where launching kernels takes longer than
    running them: small batches or students. Needs adamw or adam."""
    recompute: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights; 0 for none."""
    log_every: int = 10
    """Steps between metric lines; only then, and for a checkpoint, does the host wait for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one. 0 for that one alone."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    nonfinite_budget: int = 10
    """Optimizer steps that may be skipped for a non-finite loss or gradient before the run ends with exit code 5."""


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation of mvp_kernels runs."""

    impl: Literal["auto", "triton", "reference"] = "auto"
    """auto takes Triton on a GPU and the plain-torch reference elsewhere; a request that can't be met is an error."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    seed: int = 0
    """Decides order, crops, masks, drop path and initial weights."""
    resume: str = "none"
    """none starts anew (and refuses a folder that holds a run), auto goes on from the newest checkpoint of run.dir if
    there is one, or the path of a checkpoint."""


class RunSettings(Protocol):
    """What the settings of every training run have, whatever its task; `Config` is one of them."""

    @property
    def run(self) -> RunConfig:
        """Where it lives."""
        ...

    @property
    def data(self) -> DataConfig:
        """Its images."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """Optimizer and schedule."""
        ...

    @property
    def train(self) -> TrainConfig:
        """Length, batch, precision."""
        ...

    @property
    def kernels(self) -> KernelsConfig:
        """Implementation of the kernels."""
        ...

    @property
    def seed(self) -> int:
        """Decides all that is random."""
        ...

    @property
    def resume(self) -> str:
        """Where it goes on from."""
        ...
