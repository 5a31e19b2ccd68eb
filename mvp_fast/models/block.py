"""The student's blocks: timm's BEiT block with stochastic depth (arXiv 1603.09382) as the caller has planned it.

Shape legend: B images, N tokens, M tokens that leave the block, D channels, S the two branches (attention, MLP),
K images that a branch is computed for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvp_fast.models.attention import attention
from mvp_kernels import dispatch


class Block(nn.Module):
    """The parts of timm's BEiT block under timm's names, computed by `run_block`.

    A module that is called, so that whoever hangs on a block's call (sharding gathers its weights there) finds one.

    Attributes:
        recompute: keep the inputs alone for the backward pass.
        run: `run_block`, as it is or compiled.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.gamma_1, self.gamma_2 = block.gamma_1, block.gamma_2
        self.recompute = False
        self.run: Callable[..., Tensor] = run_block

    def forward(self, *arguments: Any) -> Tensor:
        """`run_block` of this block and `arguments`."""
        if self.recompute and torch.is_grad_enabled():
            # A block draws no random numbers, so there is no state to put back.
            out: Tensor = checkpoint(self.run, self, *arguments, use_reentrant=False, preserve_rng_state=False)
            return out
        return self.run(self, *arguments)


def run_block(
    block: Any,
    x_BND: Tensor,
    bias_HNN: Tensor,
    scale_SB: Tensor | None,
    impl: str,
    index_BM: Tensor | None = None,
    kept_SK: Tensor | None = None,
) -> Tensor:
    """timm's BEiT block; yields the tokens of `index_BM`, or all.

    Args:
        block: its parts.
        x_BND: tokens.
        bias_HNN: attention bias of all blocks.
        scale_SB: factor of each branch for each image: 0, or 1 / the share that is kept; None for one.
        impl: implementation of mvp_kernels.
        index_BM: int64 tokens that leave the block.
        kept_SK: in place of scale_SB: int64, the images that each branch is computed for; it counts B / K times.
    """
    if kept_SK is not None:
        return _run_on_some(block, x_BND, bias_HNN, impl, index_BM, kept_SK)
    branch_BMD = attention(block.attn, block.norm1(x_BND), bias_HNN, impl, index_BM)
    x_BMD = x_BND if index_BM is None else dispatch.masked_gather(x_BND, index_BM, impl=impl)
    x_BMD = x_BMD + _scaled(branch_BMD, block.gamma_1, None if scale_SB is None else scale_SB[0])
    branch_BMD = block.mlp(block.norm2(x_BMD))
    return x_BMD + _scaled(branch_BMD, block.gamma_2, None if scale_SB is None else scale_SB[1])


def _run_on_some(
    block: Any, x_BND: Tensor, bias_HNN: Tensor, impl: str, index_BM: Tensor | None, kept_SK: Tensor
) -> Tensor:
    """Each branch on its K images alone (DINOv2, arXiv 2304.07193): what is dropped is not computed."""
    attending_K, mixing_K = kept_SK.unbind()
    index_KM = None if index_BM is None else index_BM[attending_K]
    branch_KMD = attention(block.attn, block.norm1(x_BND[attending_K]), bias_HNN, impl, index_KM)
    x_BMD = x_BND if index_BM is None else dispatch.masked_gather(x_BND, index_BM, impl=impl)
    x_BMD = _added(x_BMD, branch_KMD, block.gamma_1, attending_K)
    return _added(x_BMD, block.mlp(block.norm2(x_BMD[mixing_K])), block.gamma_2, mixing_K)


def _added(x_BMD: Tensor, branch_KMD: Tensor, gamma_D: Tensor | None, kept_K: Tensor) -> Tensor:
    """The branch of some images, B / K times, added to theirs."""
    times = x_BMD.shape[0] / kept_K.shape[0]
    branch_KMD = (times if gamma_D is None else times * gamma_D) * branch_KMD
    dtype = torch.promote_types(x_BMD.dtype, branch_KMD.dtype)  # as the sum of the two would have
    return x_BMD.to(dtype).index_add(0, kept_K, branch_KMD.to(dtype))


def _scaled(branch_BND: Tensor, gamma_D: Tensor | None, scale_B: Tensor | None) -> Tensor:
    """The two factors are multiplied with each other first: they are small, the branch is not."""
    if scale_B is None:
        return branch_BND if gamma_D is None else gamma_D * branch_BND
    scale_B11 = scale_B[:, None, None]
    return (scale_B11 if gamma_D is None else scale_B11 * gamma_D) * branch_BND
