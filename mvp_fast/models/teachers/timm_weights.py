"""Building one of timm's vision transformers as a teacher: which one, its weights, its grid.

Weights are timm's own, those of a file (safetensors, or of torch.save with tensors alone), those of a folder that
`mvp-fast export` or timm's save_for_hf wrote, or random. Files may be in any format that timm converts for the model
(DINOv2's, MAE's, BEiT's, ...), and may come from a training run (`state_dict`, `model`, DINO's `teacher`).
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.teachers.base import check_grid
from mvp_fast.models.teachers.checkpoint_file import FILE_TYPES, RANDOM, read_checkpoint

OWN = "timm"  # of `pretrained`: timm's own weights
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# timm's modules whose models are a patch embedding, equal blocks over all tokens, and a norm.
MODULES = ("vision_transformer", "deit", "beit", "eva")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
PREFIXES = ("_orig_mod.", "module.", "backbone.")
LEFT_BEHIND = ("head", "mask_token", "decoder", "attn_pool")


@dataclass(frozen=True)
class VitSource:
    """What a TeacherConfig of kind timm stands for.

    Attributes:
        model: of timm.create_model: a name, with a tag where there is one, or `local-dir:` and a folder.
        architecture: the name without a tag.
        path: the weights' file; None for timm's own, or random ones.
        random: the weights are random.
        arguments: in which the model differs from what the architecture's name says.
        words: what it is, for people.
        where: the setting to blame, and its value.
    """

    model: str
    architecture: str
    words: str
    where: str
    path: Path | None = None
    random: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def find_vit(config: TeacherConfig) -> VitSource:
    """Resolve name and pretrained.

    Raises:
        ConfigError: there is no such model, tag or weights, or it is no plain vision transformer.
        DataError: there is no such file, or the folder is not one of timm's format.
    """
    wanted, path = config.pretrained, Path(config.pretrained).expanduser()
    where = f"teacher.pretrained {wanted}"
    if wanted not in (OWN, RANDOM) and path.is_dir():
        return _folder(path, where)
    architecture, _, tag = config.name.partition(".")
    _check_architecture(architecture, "teacher.name")
    if tag or wanted == OWN:
        _check_tag(architecture, tag, config.name)
    if wanted in (OWN, RANDOM):
        words = f"timm's {config.name}" + (f", random weights (seed {config.seed})" if wanted == RANDOM else "")
        return VitSource(config.name, architecture, words, where, random=wanted == RANDOM)
    if path.is_file():
        return VitSource(config.name, architecture, f"{config.name} ({path})", where, path)
    if path.suffix in FILE_TYPES or len(path.parts) > 1:
        raise DataError(
            "There is no such checkpoint file or folder",
            where=where,
            fix=f"Give a file with the model's weights, a folder with {WEIGHTS} and {CONFIG}, `timm` or `random`",
        )
    raise ConfigError(
        f"A teacher of timm has no weights {wanted!r}",
        where="teacher.pretrained",
        fix="Say `timm` for timm's own (a tag goes into teacher.name, as in vit_small_patch16_224.dino), the path of a"
        " file or folder, or `random`",
    )


def build_vit(source: VitSource, *, grid: tuple[int, int], image_size: int, seed: int) -> Any:
    """timm's model with this grid, on the CPU in float32, without a head.

    Positions are resampled by timm where the weights were trained with another grid.

    Raises:
        ConfigError: the grid can't be had.
        DataError: the file is damaged, or of another model.
        EnvironmentProblem: timm's weights are not here and can't be downloaded.
    """
    try:
        small = _create(source, seed, depth=1)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        if not source.model.startswith("local-dir:"):
            raise _no_plain_vit(source.architecture, _first_line(error), "teacher.name") from error
        raise DataError(
            f"timm can't build the {source.architecture} of this folder: {_first_line(error)}",
            where=source.where,
            fix="Write it anew with `mvp-fast export RUN --format timm`",
        ) from error
    proj = getattr(small.patch_embed, "proj", None)
    if not isinstance(proj, torch.nn.Conv2d) or proj.kernel_size != proj.stride or len(set(proj.stride)) > 1:
        raise _no_plain_vit(source.architecture, "it embeds no plain square patches", "teacher.name")
    patch: int = proj.stride[0]
    check_grid(source.architecture, patch, grid, image_size, "vit_small_patch16_224.dino")
    size = (grid[0] * patch, grid[1] * patch)
    if source.path is not None or source.random:
        model = _create(source, seed, img_size=size)
        if source.path is not None:
            _load(model, source)
        return model
    try:
        return _create(source, seed, pretrained=True, img_size=size)
    except Exception as error:  # every transport raises errors of its own
        raise EnvironmentProblem(
            f"The weights of timm's {source.model} are not on this machine and could not be downloaded:"
            f" {_first_line(error)}",
            where="teacher.pretrained timm",
            fix="Be online once, give the path of a file or folder with the weights, or say `random` for a control",
        ) from error


def _create(source: VitSource, seed: int, pretrained: bool = False, **arguments: Any) -> Any:
    # The grid is fixed, so nothing has to be found out while it runs.
    module = timm.models.model_entrypoint(source.architecture).__module__.rsplit(".", 1)[-1]
    fixed = {} if module == "beit" else {"dynamic_img_size": False}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return timm.create_model(source.model, pretrained=pretrained, num_classes=0, **fixed, **arguments)


def _folder(folder: Path, where: str) -> VitSource:
    if (folder / "checkpoints").is_dir():
        raise DataError(
            "This is a run's folder, not an export",
            where=where,
            fix=f"Write one with `mvp-fast export {folder} --format timm` and give {folder / 'export' / 'timm'}",
        )
    lacking = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    try:
        if lacking:
            raise FileNotFoundError(f"it has no {' and no '.join(lacking)}")
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture, arguments = settings["architecture"], settings.get("model_args") or {}
        if not isinstance(architecture, str) or not isinstance(arguments, dict):
            raise TypeError(f"{CONFIG} has no `architecture` and `model_args` of timm's kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{CONFIG} lacks {error}" if isinstance(error, KeyError) else _first_line(error)
        raise DataError(
            f"The folder is not in timm's format: {reason}",
            where=where,
            fix=f"Give one that holds {WEIGHTS} and {CONFIG}, as `mvp-fast export RUN --format timm` writes it",
        ) from error
    _check_architecture(architecture, str(folder / CONFIG))
    return VitSource(
        f"local-dir:{folder}",
        architecture,
        f"{architecture} ({folder})",
        where,
        folder / WEIGHTS,
        arguments={name: value for name, value in arguments.items() if name != "img_size"},
    )


def _check_architecture(architecture: str, where: str) -> None:
    names = timm.list_models()
    if architecture not in names:
        near = difflib.get_close_matches(architecture, _vits(), n=3, cutoff=0.5) or ["vit_small_patch16_224"]
        raise ConfigError(
            f"timm has no model named {architecture!r}", where=where, fix=f"Did you mean {' or '.join(near)}?"
        )
    if architecture not in _vits():
        raise _no_plain_vit(architecture, "it is of another kind", where)


def _vits() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def _no_plain_vit(architecture: str, reason: str, where: str) -> ConfigError:
    return ConfigError(
        f"timm's {architecture} can't be the teacher, which must be a plain vision transformer: {reason}",
        where=where,
        fix="Take a ViT, DeiT, DINO, BEiT or EVA model of timm, such as vit_small_patch16_224.dino",
    )


def _check_tag(architecture: str, tag: str, name: str) -> None:
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if (tag or tags) and (not tag or tag in tags):
        return
    near = difflib.get_close_matches(tag, tags, n=2, cutoff=0.3)
    hint = f"Did you mean {' or '.join(f'{architecture}.{each}' for each in near)}? " if near else ""
    raise ConfigError(
        f"timm has no weights for {name}",
        where="teacher.name",
        fix=f"{hint}Its tags: {', '.join(tags) or 'none'}; or give in teacher.pretrained a file or folder, or `random`",
    )


def _load(model: Any, source: VitSource) -> None:
    """Load the source's file into `model`, converted by timm; what belongs to heads and decoders is left behind."""
    assert source.path is not None
    state = _tensors(read_checkpoint(source.path), source.where)
    own = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:  # timm's DeiT uses the conversion of the plain ViT
        convert = sys.modules["timm.models.vision_transformer"].checkpoint_filter_fn
    try:
        state = convert(state, model)
    except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError, TypeError) as error:
        raise _another_model(source, f"timm can't convert it ({_first_line(error)})") from error
    # The same norm is `norm` where tokens leave through it and `fc_norm` where the model pools before it.
    for theirs, ours in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{ours}weight" in own and f"{ours}weight" not in state:
            state = {
                ours + name.removeprefix(theirs) if name.startswith(theirs) else name: state[name] for name in state
            }
    state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(LEFT_BEHIND)}
    wrong = sorted(own.keys() ^ state.keys()) or [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own)
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise _another_model(source, f"{len(wrong)} weights do not fit, first {'; '.join(wrong[:3])}")
    model.load_state_dict(state)


def _another_model(source: VitSource, reason: str) -> DataError:
    return DataError(
        f"The checkpoint is of another model than {source.architecture}: {reason}",
        where=source.where,
        fix="Give in teacher.name the timm model that the file is of",
    )


def _tensors(found: Any, where: str) -> dict[str, Tensor]:
    """The weights in what a file holds, float32, without the wrappings of training."""
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    tensors = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, Tensor):
            for prefix in PREFIXES:
                name = str(name).removeprefix(prefix)
            tensors[name] = value.float() if value.is_floating_point() else value
    if not tensors:
        raise DataError("The checkpoint holds no weights", where=where, fix="Give a file with a model's state_dict")
    return tensors


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
