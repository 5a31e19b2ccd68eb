"""timm's BEiT attention with its core by mvp_kernels: the same parameters, the same result.

Shape legend: B images, N tokens, H heads, D channels of a head; 3 is q, k, v.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_kernels import dispatch


def shared_bias(rel_pos_bias: Any, impl: str = "auto") -> Tensor:
    """bias_HNN of timm's RelativePositionBias, spread out once for all blocks; as calling that module.

    Args:
        rel_pos_bias: the module, with its table and index.
        impl: implementation of mvp_kernels.
    """
    table_RH, index_NN = rel_pos_bias.relative_position_bias_table, rel_pos_bias.relative_position_index
    return dispatch.relpos_bias(table_RH, index_NN, impl=impl)


def attention(module: Any, x: Tensor, bias_HNN: Tensor, impl: str = "auto") -> Tensor:
    """What `module(x, shared_rel_pos_bias=bias_HNN)` computes.

    The projection's output goes into `mvp_kernels.relpos_attention_qkv` as it is. Dropout of attention weights, which
    that does not have, and a table of the block's own stay with timm's forward pass.

    Args:
        module: timm.models.beit.Attention.
        x: tokens (B, N, channels).
        bias_HNN: of all blocks.
        impl: implementation of mvp_kernels.
    """
    out: Tensor
    if (module.training and module.attn_drop.p > 0) or module.relative_position_bias_table is not None:
        out = module(x, shared_rel_pos_bias=bias_HNN)
    else:
        out = module.proj_drop(module.proj(_core(module, x, bias_HNN, impl)))
    return out


def _core(module: Any, x: Tensor, bias_HNN: Tensor, impl: str) -> Tensor:
    """What comes between the norm before and the projection behind: (B, N, H D)."""
    images, tokens, _ = x.shape
    shift = None if module.q_bias is None else torch.cat((module.q_bias, module.k_bias, module.v_bias))
    qkv_BN3HD = F.linear(x, module.qkv.weight, shift).reshape(images, tokens, 3, module.num_heads, -1)
    out_BNHD = dispatch.relpos_attention_qkv(qkv_BN3HD, bias_HNN, scale=module.scale, impl=impl)
    return out_BNHD.flatten(2)
