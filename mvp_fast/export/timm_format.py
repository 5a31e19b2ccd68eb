"""A student in timm's own format, for timm.create_model and everything built on it.

What changes on the way: the mask token and the predictor are left out; the shared relative position table is copied
into every block, where timm's names expect one each; the final norm becomes `fc_norm`, of the mean of the patch tokens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_fast.errors import EnvironmentProblem
from mvp_fast.models.student import Student, beit_overrides, build_beit

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PROVENANCE = (
    "tag",
    "license",
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
)
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def timm_state(student: Student) -> dict[str, Tensor]:
    """A student's weights under the names of timm's model without a head; copies on the CPU.

    A student without layer scale gets factors of one, which timm's names expect and which change nothing.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    for name in ("mask_token", "predictor.weight", "predictor.bias"):
        del state[name]
    for kind in ("weight", "bias"):
        state[f"fc_norm.{kind}"] = state.pop(f"norm.{kind}")
    table = state.pop(SHARED_TABLE)
    for number in range(len(student.blocks)):
        state[f"blocks.{number}.attn.relative_position_bias_table"] = table.clone()
        for gamma in ("gamma_1", "gamma_2"):
            state.setdefault(f"blocks.{number}.{gamma}", torch.ones_like(state["fc_norm.weight"]))
    return state


def timm_model(student: Student, num_classes: int = 0, seed: int = 0) -> Any:
    """timm's model of the student's name and shape, with its weights; it pools the mean of the patch tokens.

    Args:
        student: trained.
        num_classes: outputs of a head with fresh weights (timm's initialisation); 0 for none.
        seed: decides the head's weights.
    """
    config = replace(student.config, layer_scale=student.config.layer_scale or 1.0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = build_beit(
            config, student.image_size, global_pool="avg", shared_rel_pos_bias=False, num_classes=num_classes
        )
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict({**timm_state(student), **head})
    return model


def create_arguments(student: Student, num_classes: int = 0) -> dict[str, Any]:
    """What timm.create_model has to be told beside the model's name to rebuild an exported student."""
    return {"num_classes": num_classes, **beit_overrides(student.config, student.image_size)}


def write_timm(student: Student, out: Path, *, num_classes: int = 0, seed: int = 0) -> Path:
    """Write `out`/model.safetensors and `out`/config.json, in timm's hub format.

    Both are written beside `out` and then renamed, so that neither is ever half there; other files in `out` stay.

    Args:
        student: trained.
        out: a folder, made where missing.
        num_classes, seed: as in `timm_model`.

    Returns:
        `out`.

    Raises:
        EnvironmentProblem: `out` can't be written.
    """
    from timm.models import save_for_hf

    model = timm_model(student, num_classes, seed)
    # What timm says of its own weights of this name: not true of these.
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in PROVENANCE}
    arguments = create_arguments(student, num_classes)
    arguments.pop("num_classes")  # has a field of its own in config.json
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            save_for_hf(model, str(partial), model_args=arguments, safe_serialization=True)
            shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors writes for the owner alone
            out.mkdir(exist_ok=True)
            for name in (WEIGHTS, CONFIG):
                _sync(partial / name)
                os.replace(partial / name, out / name)
            _sync(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"The export could not be written: {error.strerror or error}",
            where=str(out),
            fix="Free some space or mend the folder's rights, or give another --out",
        ) from error
    return out


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
