"""The text side of the CLIP whose vision tower is the teacher: sentences to points of the space that targets lie in.

A teacher is built without its text tower. Here the whole model is: CLIP is arXiv 2103.00020, its ensembles of prompts
too.

Shape legend: T texts, D channels of a feature.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.teachers.clip_settings import SETTINGS, clip_folder, model_settings
from mvp_fast.models.teachers.clip_weights import Source, checkpoint_tensors, find_source, load_tower

# What else may be there, of no account for a text's feature; the last three are numbers in OpenAI's files.
_NO_WEIGHTS = {"logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size"}
_WANTED = "--text needs a CLIP with both its towers"


@dataclass(frozen=True)
class Clip:
    """A whole CLIP and its tokenizer.

    Attributes:
        model: open_clip's, on the CPU, in float32 and evaluation mode.
        tokenizer: texts to int64 (T, context_length).
        path: the file with the weights.
    """

    model: Any
    tokenizer: Any
    path: Path


def build_whole_clip(config: TeacherConfig, weights: Path | None = None) -> Clip:
    """The CLIP that a teacher is the vision tower of, both towers with their weights.

    Args:
        config: name and pretrained. Where open_clip_config.json lies beside the weights, its model_cfg describes the
            model in place of what open_clip knows by the name.
        weights: a file with the same weights and the text tower, read in place of what config.pretrained names.

    Raises:
        ConfigError: the teacher is no CLIP of open_clip, has random weights, or a text tower of another library.
        DataError: a file is missing, damaged, of another model, or without a text tower.
        EnvironmentProblem: weights or a vocabulary have to be downloaded, and can't be.
    """
    settings, folder = _settings(config, weights)
    source = find_source(config, bool(settings.get("quick_gelu", False)), weights)
    if source.path is None:
        raise ConfigError(
            f"The teacher {config.name} has random weights, which no language taught: {_WANTED}",
            where="teacher.pretrained random",
            fix="Take a run whose teacher.pretrained is a tag or a checkpoint",
        )
    model = _build(config, settings, source)
    load_tower(model, source.path)
    _load_text(model, source.path)
    tokenizer = _tokenizer(config.name if folder is None else f"local-dir:{folder}")
    return Clip(model.eval().requires_grad_(False), tokenizer, source.path)


@torch.no_grad()
def text_features(
    clip: Clip, texts: Sequence[str], templates: Sequence[str] = ("{}",), device: torch.device | str = "cpu"
) -> Tensor:
    """The features of texts, of length 1: float32 (T, D) on `device`.

    With several templates, the mean of the normalised features of all, normalised again.

    Args:
        templates: each with `{}` in the text's place, such as "a photo of {}".

    Raises:
        ConfigError: a text is empty or too long, or a template has no place for it.
    """
    _check_texts(clip, texts, templates)
    tower = clip.model.to(device)
    found = []
    for text in texts:
        tokens = clip.tokenizer([template.replace("{}", text) for template in templates]).to(device)
        if int(tokens.max()) >= tower.vocab_size:
            raise ConfigError(
                f"The CLIP knows {tower.vocab_size} words, the tokenizer gave number {int(tokens.max())}",
                where=f"--text {text!r}",
                fix="Give in teacher.name the model that the checkpoint is of",
            )
        found.append(F.normalize(tower.encode_text(tokens, normalize=True).float().mean(0), dim=-1))
    return torch.stack(found)


def _check_texts(clip: Clip, texts: Sequence[str], templates: Sequence[str]) -> None:
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"The template {template!r} has no {{}} for the text", where="--template")
    for text in texts:
        if not text.strip():
            raise ConfigError("A text is empty", where="--text", fix='Give words, such as --text "a red square"')
        if isinstance(clip.tokenizer, open_clip.SimpleTokenizer):  # it cuts off what is too long in silence
            length = 2 + max(len(clip.tokenizer.encode(template.replace("{}", text))) for template in templates)
            if length > clip.model.context_length:
                raise ConfigError(
                    f"The text has {length} tokens with its template, the CLIP takes {clip.model.context_length}",
                    where=f"--text {text!r}",
                    fix="Say it in fewer words",
                )


def _settings(config: TeacherConfig, weights: Path | None) -> tuple[dict[str, Any], Path | None]:
    """What describes the model, and the folder of the file that it stands in; None where open_clip knows the name.

    Raises:
        ConfigError: nobody knows the model.
    """
    for path in (weights, Path(config.pretrained).expanduser()):
        found = None if path is None else _beside(path)
        if path is not None and found is not None:
            return found, path.parent
    folder = clip_folder(config.name)
    if folder is None and config.name not in open_clip.list_models():
        near = difflib.get_close_matches(config.name, open_clip.list_models(), n=1, cutoff=0.6)
        raise ConfigError(
            f"The run's teacher {config.name} is no CLIP of open_clip: {_WANTED}",
            where="teacher.name",
            fix=(f"Did you mean {near[0]}? " if near else "") + "Take a run with a CLIP teacher, or leave --text out",
        )
    return model_settings(config.name), folder


def _beside(path: Path) -> dict[str, Any] | None:
    """The model_cfg in the settings beside a checkpoint; None where there is none."""
    settings = path.with_name(SETTINGS)
    if not settings.is_file():
        return None
    try:
        found = json.loads(settings.read_text(encoding="utf-8")).get("model_cfg")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"The checkpoint's configuration can't be read: {error}", where=str(settings)) from error
    return found if isinstance(found, dict) else None


def _build(config: TeacherConfig, settings: dict[str, Any], source: Source) -> Any:
    """An open_clip.CLIP of these settings, its weights still to be loaded."""
    text = settings.get("text_cfg") or {}
    if text.get("hf_model_name"):
        raise ConfigError(
            f"The text tower of {config.name} is Hugging Face's {text['hf_model_name']}, which is not supported",
            where="teacher.name",
            fix="Take a run whose teacher is a CLIP with open_clip's own text tower, such as ViT-B-16",
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return open_clip.CLIP(
                settings["embed_dim"],
                open_clip.CLIPVisionCfg(**settings["vision_cfg"]),
                open_clip.CLIPTextCfg(**text),
                quick_gelu=source.quick_gelu,
            )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"These settings describe no CLIP of this version of open_clip: {error}",
            where=str(source.path),
            fix=f"Mend {SETTINGS} beside it",
        ) from error


def _load_text(model: Any, path: Path) -> None:
    """Load the text tower, whose names begin with `text.` in some of open_clip's models and with nothing in others.

    Raises:
        DataError: there is none, or it is of another shape.
    """
    tensors = {
        name.removeprefix("text."): tensor.float()
        for name, tensor in checkpoint_tensors(path).items()
        if not name.startswith("visual.")
    }
    where = str(path)
    if "token_embedding.weight" not in tensors:
        raise DataError(
            f"The checkpoint holds a vision tower alone: {_WANTED}",
            where=where,
            fix="Give the whole checkpoint of the same CLIP with --clip-weights FILE",
        )
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("visual.")}
    wrong = sorted(
        name
        for name in (own.keys() | tensors.keys()) - _NO_WEIGHTS
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise DataError(
            f"The checkpoint's text tower is of another model: {len(wrong)} weights do not fit, first"
            f" {', '.join(wrong[:3])}",
            where=where,
            fix=f"Put open_clip's {SETTINGS} beside it, or give another file with --clip-weights",
        )
    model.load_state_dict({name: tensors[name] for name in own.keys() - _NO_WEIGHTS}, strict=False)


def _tokenizer(name: str) -> Any:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # a vocabulary from elsewhere comes by transports that raise errors of their own
        raise EnvironmentProblem(
            f"The tokenizer of {name} is not on this machine: {str(error).splitlines()[0] if str(error) else error!r}",
            where="--text",
            fix="Be online once, or put the tokenizer's files beside the checkpoint",
        ) from error
