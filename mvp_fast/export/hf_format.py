"""A student in transformers' BEiT format, for BeitModel.from_pretrained and AutoImageProcessor.from_pretrained.

The names are those of the checkpoints that were published for transformers, which its versions 4 and 5 both read. The
mapping is this project's own: transformers is not needed to write them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mvp_fast.export.timm_format import timm_model
from mvp_fast.export.write import CARD, CONFIG, WEIGHTS, replacing
from mvp_fast.models.student import Student

PREPROCESSOR = "preprocessor_config.json"
# timm's names to transformers', outside the blocks and in one; what ends in a dot stands for all that begin so.
NAMES = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "rel_pos_bias.": "encoder.relative_position_bias.",
    "norm.": "layernorm.",
    "fc_norm.": "pooler.layernorm.",
}
BLOCK_NAMES = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
PROJECTIONS = ("query", "key", "value")


def hf_state(model: Any) -> dict[str, Tensor]:
    """The weights of timm's BEiT under transformers' names: a BeitModel's, with a head BeitForImageClassification's.

    The one matrix of queries, keys and values becomes three. Keys have no bias: in BEiT it is fixed at zero.

    Raises:
        ValueError: the model has a weight that transformers' BEiT has not.
    """
    prefix = "beit." if model.num_classes else ""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.detach().cpu()
        area, _, rest = name.partition(".")
        if area == "head":
            state[f"classifier.{rest}"] = weight.clone()
        elif area != "blocks":
            state[prefix + _renamed(name, NAMES)] = weight.clone()
        else:
            number, _, inner = rest.partition(".")
            block = f"{prefix}encoder.layer.{number}."
            if inner == "attn.qkv.weight":
                for projection, part in zip(PROJECTIONS, weight.chunk(3), strict=True):
                    state[f"{block}attention.attention.{projection}.weight"] = part.clone()
            else:
                state[block + _renamed(inner, BLOCK_NAMES)] = weight.clone()
    return state


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"transformers' BEiT has no place for {name}")


def hf_config(model: Any) -> dict[str, Any]:
    """config.json of a timm BEiT: what transformers' BeitConfig has to be told.

    `out_indices` are the stages that BEiT's recipe for segmentation takes (of 12 blocks 4, 6, 8 and 12, from 1).
    """
    block, depth = model.blocks[0], len(model.blocks)
    config: dict[str, Any] = {
        "architectures": ["BeitForImageClassification" if model.num_classes else "BeitModel"],
        "model_type": "beit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": block.norm1.eps,
        "layer_scale_init_value": float(block.init_values),
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_relative_position_bias": model.rel_pos_bias is not None,
        "use_mean_pooling": True,
        "out_indices": sorted({max(1, depth * part // 6) for part in (2, 3, 4, 6)}),
        "torch_dtype": "float32",
    }
    if model.num_classes:
        labels = {str(number): f"LABEL_{number}" for number in range(model.num_classes)}
        config["id2label"] = labels
        config["label2id"] = {label: int(number) for number, label in labels.items()}
    return config


def hf_preprocessor(model: Any) -> dict[str, Any]:
    """preprocessor_config.json: what timm does to an image for this model, in evaluation.

    The class is Bit's: transformers' own for BEiT can't scale the shorter side and keep the aspect ratio.
    """
    declared = model.pretrained_cfg
    side = model.patch_embed.img_size[0]
    bicubic, bilinear = 3, 2  # Pillow's numbers
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(side / declared["crop_pct"])},
        "resample": {"bicubic": bicubic, "bilinear": bilinear}[declared["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(declared["mean"]),
        "image_std": list(declared["std"]),
    }


def write_hf(student: Student, out: Path, *, num_classes: int = 0, seed: int = 0, card: str = "") -> Path:
    """Write `out`/model.safetensors, config.json, preprocessor_config.json and, where there is a card, README.md.

    All are written beside `out` and then renamed; other files in `out` stay. The relative position table stays one for
    all blocks (`use_shared_relative_position_bias`). The final norm becomes the pooler's, of the mean of the patch
    tokens: `pooler_output` is normed, `last_hidden_state` is not.

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
    model = timm_model(student, num_classes, seed, shared_table=True)
    state, parts = hf_state(model), {CONFIG: hf_config(model), PREPROCESSOR: hf_preprocessor(model)}
    with replacing(out) as partial:
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})  # transformers refuses a file without
        for name, content in parts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card:
            (partial / CARD).write_text(card, encoding="utf-8")
    return out
