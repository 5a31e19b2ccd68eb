"""Where CLS looks: the attention weights that a block really uses, whatever kind of attention it has.

timm's blocks compute attention by torch's scaled_dot_product_attention. What they hand to it is watched, so that
relative position biases, rotary embeddings and norms of queries and keys are in the weights as they are in the block.

Shape legend: B images, N tokens, M patches, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone, BlockTokens


class Seen(NamedTuple):
    """What one pass through a network shows.

    Attributes:
        tokens: of each block.
        attention_BHN: of CLS to all tokens in one block, float32 or wider, each row sums to 1; None where there is
            no CLS, or it is not wanted.
    """

    tokens: list[BlockTokens]
    attention_BHN: Tensor | None


def block_number(block: int, depth: int) -> int:
    """A block's number from 0; -1 is the last, as in Python.

    Raises:
        ConfigError: there is no such block.
    """
    if not -depth <= block < depth:
        raise ConfigError(
            f"There is no block {block}: the network has {depth}, from 0 to {depth - 1}",
            where="--block",
            fix="Take one of them, or -1 for the last",
        )
    return block % depth


def has_cls(backbone: Backbone) -> bool:
    """Whether the network has a CLS token (registers are none)."""
    return getattr(backbone.model, "cls_token", None) is not None


@torch.no_grad()
def look(backbone: Backbone, images_BHWC: Tensor, block: int, attention: bool = True) -> Seen:
    """The tokens of all blocks, and the attention of CLS in one.

    Args:
        images_BHWC: uint8, on the backbone's device.
        block: from 0.
        attention: whether it is wanted.

    Raises:
        ConfigError: the block has no single softmax over its tokens.
    """
    if not attention or not has_cls(backbone):
        return Seen(backbone.tokens(images_BHWC), None)
    module = backbone.model.blocks[block]
    with _Watch() as watch, _fused(module):
        handles = [
            module.register_forward_pre_hook(lambda *_: watch.listen(True)),
            module.register_forward_hook(lambda *_: watch.listen(False)),
        ]
        try:
            tokens = backbone.tokens(images_BHWC)
        finally:
            for handle in handles:
                handle.remove()
    if len(watch.found) != 1:
        raise ConfigError(
            f"Block {block} of {backbone.words} has {len(watch.found)} attention maps in place of one",
            fix="Take a network with plain attention, or leave attention out of --pictures",
        )
    return Seen(tokens, watch.found[0])


def patch_attention(attention_BHN: Tensor, patches: int) -> Tensor:
    """The patches' part of `Seen.attention_BHN`: (B, H, M); CLS and registers come before the patches."""
    return attention_BHN[..., -patches:]


class _Watch(TorchFunctionMode):
    """Computes the attention weights of token 0 whenever scaled_dot_product_attention is called while it listens."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._listening = False

    def listen(self, on: bool) -> None:
        """Begin or stop."""
        self._listening = on

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._listening and func is F.scaled_dot_product_attention:
            self.found.append(cls_weights(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def cls_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights that scaled_dot_product_attention gives these arguments, of query 0: (B, H, N), float32 or wider."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q_BHD, k_BHND = query[:, :, 0].to(dtype), key.to(dtype)
    if k_BHND.shape[1] != q_BHD.shape[1]:  # grouped queries share a key
        k_BHND = k_BHND.repeat_interleave(q_BHD.shape[1] // k_BHND.shape[1], 1)
    scale = q_BHD.shape[-1] ** -0.5 if scale is None else scale
    score_BHN = torch.einsum("bhd,bhnd->bhn", q_BHD, k_BHND) * scale
    if attn_mask is not None:
        row = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])[:, :, 0]
        score_BHN = score_BHN.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else score_BHN + row.to(dtype)
    return score_BHN.softmax(-1)


@contextmanager
def _fused(module: Any) -> Iterator[None]:
    """While it lasts, the block's attention goes through scaled_dot_product_attention, which computes the same."""
    parts = [part for part in module.modules() if getattr(part, "fused_attn", None) is False]
    for part in parts:
        part.fused_attn = True
    try:
        yield
    finally:
        for part in parts:
            part.fused_attn = False
