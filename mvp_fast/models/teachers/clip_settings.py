"""What a CLIP is: an open_clip model by name, or a folder in open_clip's hub format, such as `teacher fit` writes.

    FOLDER/open_clip_config.json         model_cfg (sizes of both towers) and preprocess_cfg (colour statistics)
    FOLDER/open_clip_model.safetensors   the weights of both towers

A run's folder stands for the folder `model` in it.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import open_clip

from mvp_fast.errors import ConfigError, DataError

SETTINGS = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
IN_RUN = "model"


def clip_folder(name: str) -> Path | None:
    """The folder in open_clip's hub format that `name` stands for; None where it is none."""
    folder = Path(name).expanduser()
    return next((each for each in (folder, folder / IN_RUN) if (each / SETTINGS).is_file()), None)


def model_settings(name: str, where: str = "teacher.name") -> dict[str, Any]:
    """open_clip's settings of a model: embed_dim, vision_cfg, text_cfg, and maybe more.

    Args:
        name: an open_clip model by name, or the path of a folder; see `clip_folder`.
        where: the setting that holds the name, for messages.

    Raises:
        ConfigError: open_clip has no such model.
        DataError: the folder's settings can't be read.
    """
    folder = clip_folder(name)
    if folder is not None:
        return _read(folder / SETTINGS)
    names = open_clip.list_models()
    if name not in names:
        if Path(name).expanduser().is_dir():
            raise ConfigError(
                f"The folder {name} holds no CLIP: there is no {SETTINGS}",
                where=where,
                fix="Give the folder that `mvp-fast teacher fit` wrote when it was done, or the name of an open_clip"
                " model",
            )
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or ["ViT-B-16"]
        raise ConfigError(
            f"open_clip has no model named {name!r}", where=where, fix=f"Did you mean {' or '.join(near)}?"
        )
    settings: dict[str, Any] = open_clip.get_model_config(name)
    return settings


def clip_words(name: str, pretrained: str) -> str:
    """A CLIP and where its weights come from, for people."""
    own = clip_folder(name) is not None and takes_own_weights(pretrained)
    return f"{name} ({'its own weights' if own else pretrained})"


def takes_own_weights(pretrained: str) -> bool:
    """Whether a folder's own weights are meant by this `teacher.pretrained`: its default says nothing else."""
    return pretrained in ("", "auto", "openai")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in settings]
        if missing:
            raise KeyError(*missing)
        open_clip.CLIPVisionCfg(**settings["vision_cfg"])
        open_clip.CLIPTextCfg(**settings["text_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{', '.join(error.args)} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"The CLIP's settings can't be read: {reason}",
            where=str(path),
            fix="Copy its folder again, or give another in teacher.name",
        ) from error
    return dict(settings)
