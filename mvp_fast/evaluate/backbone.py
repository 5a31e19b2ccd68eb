"""The network that is evaluated: a run's student, any timm model, or a folder that `mvp-fast export` wrote.

All of them are timm models from here on. A student becomes one as `mvp-fast export` writes it, so a run and its export
are the same network.

Shape legend: B images, H and W pixels, C colours, N patches, D channels.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.evaluate.finetune.export import load_classifier
from mvp_fast.evaluate.network import is_export
from mvp_fast.export.timm_format import timm_fingerprint, timm_model
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.train.checkpoint import find_checkpoint, load_student, read_state


@dataclass(frozen=True)
class BackboneSource:
    """Which network.

    Attributes:
        name: a run's folder (pre-trained or fine-tuned), a timm model's name, or a folder with timm's model.safetensors
            and config.json.
        checkpoint: of a run: `latest`, a step number, or a checkpoint's path.
        ema: of a run: its averaged weights.
        untrained: of a timm model: fresh weights from `seed` in place of timm's own, as a control.
        image_size: side of the input, pixels; None for the network's own.
    """

    name: str
    checkpoint: str = "latest"
    ema: bool = False
    untrained: bool = False
    seed: int = 0
    image_size: int | None = None


class BlockTokens(NamedTuple):
    """What one block yields.

    Attributes:
        cls_BD: the CLS token; None where the network has none.
        patches_BND: the patch tokens, row-major.
    """

    cls_BD: Tensor | None
    patches_BND: Tensor


class Backbone(nn.Module):
    """A timm vision transformer with what its pixels must be.

    Attributes:
        model: timm's.
        words: what it is, for people.
        step: of a run, how many optimizer steps; None for others.
        fingerprint: identifies shape, colour statistics and every weight.
        mean, std: colour statistics of values in [0, 1].
        image_size, patch_size: pixels.
        grid: patches down and across.
        width: channels of a token.
        depth: blocks.
        pixels: crops on the backbone's device to what `model` takes: float32 (B, C, H, W), normalised.
    """

    def __init__(self, model: Any, words: str, step: int | None = None) -> None:
        super().__init__()
        _check_kind(model, words)
        self.model, self.words, self.step = model, words, step
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.image_size: int = self.grid[0] * self.patch_size
        self.width: int = model.embed_dim
        self.depth: int = len(model.blocks)
        self.fingerprint = timm_fingerprint(model)
        self.pixels = Normaliser(self.mean, self.std)

    def tokens(self, images_BHWC: Tensor) -> list[BlockTokens]:
        """The tokens that each block yields, before any final norm; first block first."""
        found = self.model.forward_intermediates(
            self.pixels(images_BHWC),
            indices=self.depth,
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # timm gives pairs where there are prefix tokens (CLS first, then registers), else the patches alone.
        pairs = [each if isinstance(each, tuple) else (each, None) for each in found]
        if getattr(self.model, "cls_token", None) is None:  # registers alone
            return [BlockTokens(None, patches_BND) for patches_BND, _ in pairs]
        return [BlockTokens(None if prefix is None else prefix[:, 0], patches_BND) for patches_BND, prefix in pairs]


def load_backbone(source: BackboneSource) -> Backbone:
    """Load the network that `source` names, on the CPU, in float32 and evaluation mode, without a head.

    Raises:
        ConfigError: there is no such model, or it is no vision transformer, or the size does not fit.
        DataError: the run has no checkpoint, or files are damaged.
        EnvironmentProblem: timm's weights are not here and can't be downloaded.
    """
    path = Path(source.name).expanduser()
    if path.is_dir() and is_export(path):
        backbone = _local(source, path)
    elif path.is_dir():
        backbone = _run(source, path)
    else:
        backbone = _timm(source)
    if source.image_size not in (None, backbone.image_size):
        raise ConfigError(
            f"Images of {source.image_size} px can't be cut into {source.name}'s patches of {backbone.patch_size} px",
            fix=f"Take a multiple of {backbone.patch_size}",
        )
    backbone.eval()
    return backbone


def _run(source: BackboneSource, run: Path) -> Backbone:
    if source.untrained:
        raise ConfigError("--untrained is for timm models", where=source.name, fix="Leave it out, or name a timm model")
    path = find_checkpoint(run, source.checkpoint)
    averaged = ", averaged weights" if source.ema else ""
    if read_state(path).get("task") == "finetune":
        model, name, step = _finetuned(path, source.ema)
        name += ", fine-tuned,"
    else:
        student, config, step = load_student(run, source.checkpoint, source.ema)
        model, name = timm_model(student), config.student.name
    backbone = Backbone(model, f"{name} of {run}, step {step:,}{averaged}", step)
    if source.image_size not in (None, backbone.image_size):
        raise ConfigError(
            f"The run was trained on {backbone.image_size} px images, {source.image_size} was asked for",
            where=source.name,
            fix="Leave the image size out",
        )
    return backbone


def _finetuned(path: Path, ema: bool) -> tuple[Any, str, int]:
    """The model in a checkpoint of `mvp-fast finetune` without its head, its name, and the step."""
    model, network, state = load_classifier(path, ema)
    model.reset_classifier(0)
    return model, network.architecture, int(state["step"])


def _local(source: BackboneSource, folder: Path) -> Backbone:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **_size(source))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError, SafetensorError) as error:
        raise DataError(
            f"timm can't load this folder: {_first_line(error)}",
            where=str(folder),
            fix="Write it anew with `mvp-fast export RUN --format timm`",
        ) from error
    return Backbone(model, f"the export in {folder}")


def _timm(source: BackboneSource) -> Backbone:
    architecture = source.name.partition(".")[0]
    if architecture not in timm.list_models():
        near = difflib.get_close_matches(architecture, timm.list_models(), n=2, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"There is no run and no timm model named {source.name!r}",
            where=f"looked in {Path(source.name).absolute().parent} and in timm {timm.__version__}",
            fix=f"{hint}Give a run's folder, or a name of timm.list_models()",
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(source.seed)
            model = timm.create_model(source.name, pretrained=not source.untrained, num_classes=0, **_size(source))
    except (TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm can't build {source.name} for {source.image_size} px images: {_first_line(error)}",
            where=source.name,
            fix="Leave the image size out, or take another model",
        ) from error
    except Exception as error:  # every transport raises errors of its own
        raise EnvironmentProblem(
            f"The weights of timm's {source.name} are not on this machine and could not be downloaded:"
            f" {_first_line(error)}",
            where=source.name,
            fix="Be online once, give a folder with its model.safetensors and config.json, or say --untrained",
        ) from error
    words = f"timm's {source.name}" + (f", untrained (seed {source.seed})" if source.untrained else "")
    return Backbone(model, words)


def _size(source: BackboneSource) -> dict[str, int]:
    return {} if source.image_size is None else {"img_size": source.image_size}


def _check_kind(model: Any, words: str) -> None:
    """Only a network of equal blocks over a square grid of tokens has features of each block for each patch."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    plain = all(hasattr(model, name) for name in ("blocks", "embed_dim", "forward_intermediates"))
    if not plain or grid is None or grid[0] != grid[1]:
        raise ConfigError(
            f"{words} is no plain vision transformer over a square grid of patches",
            fix="Take a ViT, DeiT, BEiT, EVA or DINO model of timm",
        )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
