"""Blocks of open_clip's vision tower, as calling them, and the last one on the tokens in the loss alone.

Shape legend: B images, N tokens, M tokens that leave the block, H heads, D channels (of a head behind H).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mvp_kernels import dispatch


def block(resblock: Any, x_BND: Tensor, index_BM: Tensor | None = None, impl: str = "auto") -> Tensor:
    """What `resblock(x_BND)` computes: all tokens, or those of `index_BM`.

    Keys and values are of all tokens; a query, the output projection and the MLP only of those that leave the block.

    Args:
        resblock: open_clip's ResidualAttentionBlock, in evaluation mode.
        index_BM: int64 tokens, -1 for padding.
        impl: implementation of mvp_kernels.
    """
    normed_BND = resblock.ln_1(x_BND)
    if index_BM is None:
        branch_BMD = _attention(resblock.attn, normed_BND, None)
    else:
        branch_BMD = _attention(resblock.attn, normed_BND, dispatch.masked_gather(normed_BND, index_BM, impl=impl))
        x_BND = dispatch.masked_gather(x_BND, index_BM, impl=impl)
    x_BMD = x_BND + resblock.ls_1(branch_BMD)
    out_BMD: Tensor = x_BMD + resblock.ls_2(resblock.mlp(resblock.ln_2(x_BMD)))
    return out_BMD


def _attention(module: Any, x_BND: Tensor, asking_BMD: Tensor | None) -> Tensor:
    """nn.MultiheadAttention as `module(x, x, x)`; with `asking_BMD`, `module(asking, x, x)`."""
    if asking_BMD is None:
        q, k, v = _heads(_project_in(module, x_BND), 3, module.num_heads)
    else:
        first = module.embed_dim
        (q,) = _heads(_project_in(module, asking_BMD, stop=first), 1, module.num_heads)
        k, v = _heads(_project_in(module, x_BND, start=first), 2, module.num_heads)
    out_BMHD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    out_BMD: Tensor = module.out_proj(out_BMHD.flatten(2))
    return out_BMD


def _project_in(module: Any, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Queries, keys and values in one, or some channels of them; in FP8 where the tower was quantised (`fp8`)."""
    if module.in_proj_weight is None:
        fp8: Tensor = module.fp8_in(x, start, stop)
        return fp8
    return F.linear(x, module.in_proj_weight[start:stop], module.in_proj_bias[start:stop])


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts H D) to `parts` views (B, H, N, D)."""
    views: tuple[Tensor, ...] = x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return views
