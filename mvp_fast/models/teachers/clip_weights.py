"""Where a CLIP tower's weights come from, and reading them without running anything that a file may contain.

A checkpoint is a safetensors file, or a file of torch.save that holds tensors alone, with open_clip's names
(`visual.conv1.weight`, ...), with or without the text tower.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import resize_pos_embed
from torch import Tensor

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.teachers.checkpoint_file import FILE_TYPES, RANDOM, read_checkpoint
from mvp_fast.models.teachers.clip_settings import SETTINGS, WEIGHTS, clip_folder, takes_own_weights


@dataclass(frozen=True)
class Source:
    """What a TeacherConfig's `pretrained` stands for.

    Attributes:
        path: the checkpoint; None for random weights.
        mean, std: colour statistics that go with the weights.
        quick_gelu: the weights were trained with x * sigmoid(1.702 x) in place of GELU, as OpenAI's.
    """

    path: Path | None
    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
    quick_gelu: bool = False


def find_source(config: TeacherConfig, quick_gelu: bool, weights: Path | None = None) -> Source:
    """Resolve `pretrained`: `random`, a tag (downloaded, or taken from the cache), or the path of a file.

    Where the name is a folder that holds a CLIP, the default stands for the weights in it.

    Args:
        config: name and pretrained.
        quick_gelu: what the model named by config.name uses. A tag knows better: `openai` weights need it even where
            the name is plain ViT-B-16.
        weights: a file with the same weights, read in place of what `pretrained` names; nothing is downloaded.

    Raises:
        ConfigError: there is no such tag.
        DataError: there is no such file.
        EnvironmentProblem: a tag's weights can't be downloaded.
    """
    wanted = config.pretrained
    if wanted == RANDOM:
        return Source(None, quick_gelu=quick_gelu)
    folder = clip_folder(config.name)
    if folder is not None and takes_own_weights(wanted):
        if not (folder / WEIGHTS).is_file():
            raise DataError(f"The CLIP's folder has no {WEIGHTS}", where=f"teacher.name {config.name}")
        return _file_source(folder / WEIGHTS, quick_gelu)
    tag = open_clip.get_pretrained_cfg(config.name, wanted)
    if tag:
        path = weights or _download(config.name, wanted, tag)
        return Source(path, tuple(tag["mean"]), tuple(tag["std"]), bool(tag.get("quick_gelu", False)))
    path = Path(wanted).expanduser()
    if path.is_file():
        found = _file_source(path, quick_gelu)
        return found if weights is None else replace(found, path=weights)
    if weights is not None:
        return _file_source(weights, quick_gelu)
    if path.is_dir() or path.suffix in FILE_TYPES or len(path.parts) > 1:
        raise DataError(
            "There is no such checkpoint file",
            where=f"teacher.pretrained {wanted}",
            fix="Give the path of a file with open_clip's weights, an open_clip tag, or `random`",
        )
    tags = open_clip.list_pretrained_tags_by_model(config.name)
    near = difflib.get_close_matches(wanted, tags, n=1)
    raise ConfigError(
        f"open_clip has no weights {wanted!r} for {config.name}",
        where="teacher.pretrained",
        fix=(f"Did you mean {near[0]}? " if near else "")
        + f"Its tags: {', '.join(tags) or 'none'}. Or give the path of a local checkpoint, or `random`",
    )


def load_tower(clip: Any, path: Path) -> None:
    """Load a checkpoint's vision tower into `clip.visual`, its position embedding resized to the tower's grid.

    Raises:
        DataError: the file is damaged, holds more than tensors, or is of another model.
    """
    state = {name: tensor.float() for name, tensor in _tower_state(path).items()}
    own = clip.visual.state_dict()
    wrong = sorted(own.keys() ^ {name.removeprefix("visual.") for name in state})
    if not wrong:
        with contextlib.suppress(RuntimeError):  # a grid that is not square: reported below, as a wrong shape
            resize_pos_embed(state, clip)
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
        wrong = [
            f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for name in sorted(own)
            if own[name].shape != state[name].shape
        ]
    if wrong:
        raise DataError(
            f"The checkpoint is of another model: {len(wrong)} weights do not fit, first {'; '.join(wrong[:3])}",
            where=f"teacher.pretrained {path}",
            fix="Give in teacher.name the open_clip model that the checkpoint is of, or the folder that holds it beside"
            f" {SETTINGS}",
        )
    clip.visual.load_state_dict(state)


def _download(name: str, tag: str, settings: dict[str, Any]) -> Path:
    try:
        return Path(open_clip.download_pretrained(settings))
    except Exception as error:  # every transport raises errors of its own
        raise EnvironmentProblem(
            f"The weights {tag} of {name} are not on this machine and could not be downloaded:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where="teacher.pretrained",
            fix="Give the path of a local checkpoint, or `random` for a trial run; or be online once",
        ) from error


def _file_source(path: Path, quick_gelu: bool) -> Source:
    """A local file; open_clip_config.json beside it, as its hub folders have, tells its statistics and activation."""
    beside = path.with_name(SETTINGS)
    if not beside.is_file():
        return Source(path, quick_gelu=quick_gelu)
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
        colours = settings.get("preprocess_cfg", {})
        return Source(
            path,
            tuple(colours.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            tuple(colours.get("std", open_clip.OPENAI_DATASET_STD)),
            bool(settings.get("model_cfg", {}).get("quick_gelu", False)),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"The checkpoint's configuration can't be read: {error}", where=str(beside)) from error


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under open_clip's names; none where it holds something else.

    Raises:
        DataError: the file is damaged, or holds more than tensors.
    """
    found = read_checkpoint(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        return {}
    return {str(name).removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}


def _tower_state(path: Path) -> dict[str, Tensor]:
    """The tensors of the vision tower, named `visual.*`."""
    tensors = checkpoint_tensors(path)
    if "class_embedding" in tensors:  # a vision tower saved on its own
        return {f"visual.{name}": tensor for name, tensor in tensors.items()}
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    if not tower:
        raise DataError(
            "The checkpoint holds no vision tower of open_clip (no weights named visual.*)"
            + (f"; its first names are {', '.join(list(tensors)[:3])}" if tensors else ""),
            where=f"teacher.pretrained {path}",
            fix="Give a checkpoint in open_clip's format",
        )
    return tower
