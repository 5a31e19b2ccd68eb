"""timm's BEiT attention with its core by mvp_kernels: the same parameters, the same result.

Shape legend: B images, N tokens, M tokens that need a result, H heads, D channels (of a head behind H); 3 is q, k, v,
2 the last two.
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


def attention(
    module: Any, x_BND: Tensor, bias_HNN: Tensor, impl: str = "auto", index_BM: Tensor | None = None
) -> Tensor:
    """What `module(x_BND, shared_rel_pos_bias=bias_HNN)` computes: for all tokens, or those of `index_BM`.

    The projection's output goes into `mvp_kernels.relpos_attention_qkv` as it is. Dropout of attention weights, which
    that does not have, and a table of the block's own stay with timm's forward pass.

    Args:
        module: timm.models.beit.Attention.
        x_BND: tokens.
        bias_HNN: of all blocks.
        impl: implementation of mvp_kernels.
        index_BM: int64 tokens that need a result: only they have a query and an output projection.
    """
    out: Tensor
    if (module.training and module.attn_drop.p > 0) or module.relative_position_bias_table is not None:
        out = module(x_BND, shared_rel_pos_bias=bias_HNN)
        return out if index_BM is None else dispatch.masked_gather(out, index_BM, impl=impl)
    if index_BM is None:
        out = _core(module, x_BND, bias_HNN, impl)
    else:
        out = _core_of_some(module, x_BND, bias_HNN, impl, index_BM)
    out = module.proj_drop(module.proj(out))
    return out


def _core(module: Any, x_BND: Tensor, bias_HNN: Tensor, impl: str) -> Tensor:
    """What comes between the norm before and the projection behind: (B, N, H D)."""
    shift = None if module.q_bias is None else torch.cat((module.q_bias, module.k_bias, module.v_bias))
    qkv_BN3HD = F.linear(x_BND, module.qkv.weight, shift).unflatten(-1, (3, module.num_heads, -1))
    out_BNHD = dispatch.relpos_attention_qkv(qkv_BN3HD, bias_HNN, scale=module.scale, impl=impl)
    return out_BNHD.flatten(2)


def _core_of_some(module: Any, x_BND: Tensor, bias_HNN: Tensor, impl: str, index_BM: Tensor) -> Tensor:
    """The same for the tokens of `index_BM`: (B, M, H D)."""
    asking_BMD = dispatch.masked_gather(x_BND, index_BM, impl=impl)
    width = module.qkv.weight.shape[0] // 3
    shift = None if module.q_bias is None else torch.cat((module.k_bias, module.v_bias))
    q_BMHD = F.linear(asking_BMD, module.qkv.weight[:width], module.q_bias).unflatten(-1, (module.num_heads, -1))
    kv_BN2HD = F.linear(x_BND, module.qkv.weight[width:], shift).unflatten(-1, (2, module.num_heads, -1))
    k_BHND, v_BHND = kv_BN2HD.permute(2, 0, 3, 1, 4).unbind(0)
    out_BHMD = dispatch.relpos_attention(
        q_BMHD.transpose(1, 2), k_BHND, v_BHND, bias_HNN, None, module.scale, index_BM, impl=impl
    )
    return out_BHMD.transpose(1, 2).flatten(2)
