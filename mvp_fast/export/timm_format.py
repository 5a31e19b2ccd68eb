"""A student in timm's own format, for timm.create_model and everything built on it.

What changes on the way: the mask token and the predictor are left out; the shared relative position table is copied
into every block, where timm's names expect one each; the final norm becomes `fc_norm`, of the mean of the patch tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_fast.export.write import CARD, replacing
from mvp_fast.models.student import Student, beit_overrides, build_beit
from mvp_fast.models.teachers.base import fingerprint

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


def timm_state(student: Student, shared_table: bool = False) -> dict[str, Tensor]:
    """A student's weights under the names of timm's model without a head; copies on the CPU.

    A student without layer scale gets factors of one, which timm's names expect and which change nothing.

    Args:
        student: trained.
        shared_table: leave the relative position table one for all blocks.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    for name in ("mask_token", "predictor.weight", "predictor.bias"):
        del state[name]
    for kind in ("weight", "bias"):
        state[f"fc_norm.{kind}"] = state.pop(f"norm.{kind}")
    table = state[SHARED_TABLE] if shared_table else state.pop(SHARED_TABLE)
    for number in range(len(student.blocks)):
        if not shared_table:
            state[f"blocks.{number}.attn.relative_position_bias_table"] = table.clone()
        for gamma in ("gamma_1", "gamma_2"):
            state.setdefault(f"blocks.{number}.{gamma}", torch.ones_like(state["fc_norm.weight"]))
    return state


def timm_model(student: Student, num_classes: int = 0, seed: int = 0, shared_table: bool = False) -> Any:
    """timm's model of the student's name and shape, with its weights; it pools the mean of the patch tokens.

    Args:
        student: trained.
        num_classes: outputs of a head with fresh weights (timm's initialisation); 0 for none.
        seed: decides the head's weights.
        shared_table: one relative position table for all blocks, as the student has it; False copies it into each,
            as timm's names mean it. The model computes the same.
    """
    config = replace(student.config, layer_scale=student.config.layer_scale or 1.0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = build_beit(
            config, student.image_size, global_pool="avg", shared_rel_pos_bias=shared_table, num_classes=num_classes
        )
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict({**timm_state(student, shared_table), **head})
    return model


def timm_fingerprint(model: Any) -> str:
    """Identifies a timm vision transformer: shape, colour statistics and every weight but a head's."""
    description = {
        "mean": tuple(model.pretrained_cfg["mean"]),
        "std": tuple(model.pretrained_cfg["std"]),
        "grid": tuple(model.patch_embed.grid_size),
        "patch_size": model.patch_embed.patch_size[0],
    }
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    return fingerprint(description, weights)


def create_arguments(student: Student, num_classes: int = 0) -> dict[str, Any]:
    """What timm.create_model has to be told beside the model's name to rebuild an exported student."""
    return {"num_classes": num_classes, **beit_overrides(student.config, student.image_size)}


def write_timm(student: Student, out: Path, *, num_classes: int = 0, seed: int = 0, card: str = "") -> Path:
    """Write `out`/model.safetensors, `out`/config.json and, where there is a card, `out`/README.md: timm's hub format.

    All are written beside `out` and then renamed, so that none is ever half there; other files in `out` stay.

    Args:
        student: trained.
        out: a folder, made where missing.
        num_classes, seed: as in `timm_model`.
        card: the model card; see card.py.

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
    with replacing(out) as partial:
        save_for_hf(model, str(partial), model_args=arguments, safe_serialization=True)
        if card:
            (partial / CARD).write_text(card, encoding="utf-8")
    return out
