"""A whole CLIP of open_clip's, with fresh weights, and the folder that it is written to; CLIP is arXiv 2103.00020.

Shape legend: B images, H and W pixels, C colours.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from mvp_fast.config.fit import ClipConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.clip import check_tower
from mvp_fast.models.teachers.clip_settings import SETTINGS, WEIGHTS, model_settings
from mvp_fast.samples.files import replacing

HEAD_WIDTH = 64
"""Channels of an attention head where nobody says otherwise, as open_clip has it."""
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def clip_settings(config: ClipConfig, image_size: int) -> dict[str, Any]:
    """open_clip's settings of the model: the named one's, with the other sizes put in.

    Raises:
        ConfigError: open_clip has no such model, it is no plain CLIP, or its sizes do not fit together.
    """
    settings = copy.deepcopy(model_settings(config.name, where="model.name"))
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    check_tower(config.name, open_clip.CLIPVisionCfg(**vision), where="model.name")
    if settings.get("custom_text") or text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ConfigError(
            f"{config.name} has a text tower or a tokenizer of another kind than CLIP's own",
            where="model.name",
            fix="Take a plain CLIP, such as ViT-S-16 or ViT-B-16",
        )
    vision["image_size"] = image_size
    settings["embed_dim"] = config.embed_dim or settings["embed_dim"]
    for name in ("width", "layers", "patch_size"):
        vision[name] = getattr(config, name) or vision[name]
    if config.heads:
        vision["head_width"] = _channels("model.width", vision["width"], config.heads)
    else:
        head_width = vision.setdefault("head_width", HEAD_WIDTH)
        if vision["width"] % head_width:
            raise ConfigError(
                f"An image tower of width {vision['width']} does not divide into heads of {head_width} channels",
                where="model.width",
                fix="Give model.heads",
            )
    text["layers"] = config.text_layers or text["layers"]
    text["context_length"] = config.context_length or text.get("context_length", 77)
    if config.text_width:
        text["width"], text["heads"] = config.text_width, max(config.text_width // HEAD_WIDTH, 1)
    text["heads"] = config.text_heads or text["heads"]
    _channels("model.text-width", text["width"], text["heads"])
    return settings


def new_clip(settings: Mapping[str, Any], seed: int) -> Any:
    """An open_clip.CLIP of these settings with fresh weights from `seed`: on the CPU, in float32."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return open_clip.CLIP(
            settings["embed_dim"],
            open_clip.CLIPVisionCfg(**settings["vision_cfg"]),
            open_clip.CLIPTextCfg(**settings["text_cfg"]),
            quick_gelu=bool(settings.get("quick_gelu", False)),
        )


def write_clip(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a CLIP in open_clip's hub format: `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it.

    Raises:
        EnvironmentProblem: the folder can't be written.
    """
    from safetensors.torch import save

    about = {
        "model_cfg": settings,
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    with replacing(folder / SETTINGS, "--run.dir") as file:
        file.write((json.dumps(about, indent=1) + "\n").encode())
    with replacing(folder / WEIGHTS, "--run.dir") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _channels(name: str, width: int, heads: int) -> int:
    """Channels a head; ConfigError where the heads do not divide the width."""
    if width % heads:
        raise ConfigError(f"A width of {width} does not divide into {heads} heads", where=name)
    return width // heads
