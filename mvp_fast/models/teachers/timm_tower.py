"""Any plain ViT of timm as the teacher: DINO (arXiv 2104.14294), supervised ones, a student that was exported.

A feature is a token after the tower's final norm: of CLS where there is one, and of the patches; registers and other
prefix tokens are left out. Where the model pools before its norm (timm's `fc_norm`), that norm is taken for each token,
which for an exported student is the norm that it was trained with.

Shape legend: B images, N patches, P pixel values a patch, T tokens of the tower, M tokens in the loss, D channels; in
attention H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.base import fingerprint
from mvp_fast.models.teachers.fp8 import project
from mvp_fast.models.teachers.timm_weights import VitSource, build_vit, find_vit
from mvp_fast.models.teachers.tower import TowerTeacher
from mvp_kernels import dispatch


class TimmTeacher(TowerTeacher):
    """timm's own forward pass, from embedded patches to what its last block takes; then the tokens in the loss alone.

    Of a plain timm block only those ask in the last block's attention, and go through its MLP; another kind of last
    block (BEiT's, EVA's) is computed whole. The result is the same.

    Args:
        model: timm's, with weights and without a head; taken apart.
        words, fingerprint, impl: see `TowerTeacher`.

    Attributes:
        model: what runs as timm wrote it.
        last: the last block where it is plain, else None.
        norm: the final norm.
        prefix: tokens before the patches.
        pruned: whether the last block runs on the tokens in the loss alone.
    """

    def __init__(self, model: Any, *, words: str, fingerprint: str, impl: str = "auto") -> None:
        embed = model.patch_embed
        super().__init__(
            words=words,
            mean=tuple(model.pretrained_cfg["mean"]),
            std=tuple(model.pretrained_cfg["std"]),
            fingerprint=fingerprint,
            width=model.embed_dim,
            grid=tuple(embed.grid_size),
            patch_size=embed.patch_size[0],
            has_cls=getattr(model, "cls_token", None) is not None,
            impl=impl,
        )
        self.prefix: int = model.num_prefix_tokens
        self.proj, self.patch_norm = embed.proj, embed.norm
        self.norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        self.last = model.blocks[-1] if is_plain(model) else None
        if self.last is not None:
            model.blocks = model.blocks[:-1]
        model.patch_embed = Embedded(self.grid)
        model.norm = model.fc_norm = nn.Identity()
        model.attn_pool = None
        self.model = model
        self.eval().requires_grad_(False)

    @property
    def pruned(self) -> bool:
        """Whether the last block runs on the tokens in the loss alone."""
        return self.last is not None

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks."""
        return [*self.model.blocks, *([] if self.last is None else [self.last])]

    @property
    def embedding(self) -> nn.Conv2d:
        """The tower's own patch embedding."""
        conv: nn.Conv2d = self.proj
        return conv

    def _features(self, x_BND: Tensor, index_BM: Tensor) -> Tensor:
        """From embedded patches on."""
        x_BTD = self.model.forward_features(self.patch_norm(x_BND))
        # Between CLS and the patches there may be registers; without a CLS token nobody asks for token 0.
        place_BM = index_BM + (self.prefix - 1) * (index_BM > 0)
        if self.last is None:
            x_BMD = dispatch.masked_gather(x_BTD, place_BM, impl=self.impl)
        else:
            x_BMD = last_block(self.last, x_BTD, place_BM, self.impl)
        features_BMD: Tensor = self.norm(x_BMD)
        return features_BMD


class Embedded(nn.Identity):
    """In the place of a tower's patch embedding: what comes is embedded.

    Attributes:
        grid_size: which rotary positions may ask for.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid


def build_timm(
    config: TeacherConfig,
    *,
    grid: tuple[int, int] = (14, 14),
    image_size: int = 224,
    cls: bool = False,
    impl: str = "auto",
) -> TimmTeacher:
    """Build the tower, on the CPU in float32.

    Args:
        config: name, where the weights come from, seed of random ones.
        grid: the student's patches down and across; the tower is made to have the same.
        image_size: side of the crops, pixels; the tower never sees more pixels than they have.
        cls: whether the CLS token's feature is wanted.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Raises:
        ConfigError: there is no such model, tag or weights, it is no plain ViT, its grid can't be the student's, or it
            has no CLS token and that was wanted.
        DataError: the file or folder is missing, damaged, or of another model.
        EnvironmentProblem: the weights have to be downloaded, and can't be.
    """
    source = find_vit(config)
    model = build_vit(source, grid=grid, image_size=image_size, seed=config.seed)
    if cls and getattr(model, "cls_token", None) is None:
        raise ConfigError(
            f"timm's {source.architecture} has no CLS token, whose feature objective.cls asks for",
            where="teacher.name",
            fix="Set objective.cls to False, or take a tower with a CLS token, such as vit_small_patch16_224.dino",
        )
    return TimmTeacher(model, words=source.words, fingerprint=_fingerprint(model, source), impl=impl)


def _fingerprint(model: Any, source: VitSource) -> str:
    """The architecture's name stands for what no weight tells: heads, activation, epsilons, rotary positions."""
    description = {
        "kind": "timm",
        "architecture": source.architecture,
        "arguments": source.arguments,
        "mean": list(model.pretrained_cfg["mean"]),
        "std": list(model.pretrained_cfg["std"]),
        "grid": list(model.patch_embed.grid_size),
        "patch_size": model.patch_embed.patch_size[0],
        "resize": "bicubic antialias uint8",
    }
    return fingerprint(description, model.state_dict())


def is_plain(model: Any) -> bool:
    """Whether the last block is one that `last_block` computes."""
    return (
        isinstance(model.blocks, nn.Sequential)
        and type(model.blocks[-1]) is Block
        and type(model.blocks[-1].attn) is Attention
    )


def last_block(block: Any, x_BTD: Tensor, place_BM: Tensor, impl: str = "auto") -> Tensor:
    """`block(x_BTD)` of the tokens at `place_BM`: keys and values are of all tokens.

    Args:
        block: timm's plain Block, in evaluation mode.
        place_BM: int64 places among the T tokens, -1 for padding.
        impl: implementation of mvp_kernels.
    """
    normed_BTD = block.norm1(x_BTD)
    asking_BMD = dispatch.masked_gather(normed_BTD, place_BM, impl=impl)
    x_BMD = dispatch.masked_gather(x_BTD, place_BM, impl=impl)
    x_BMD = x_BMD + block.ls1(_attention(block.attn, normed_BTD, asking_BMD))
    out_BMD: Tensor = x_BMD + block.ls2(block.mlp(block.norm2(x_BMD)))
    return out_BMD


def _attention(attn: Any, x_BTD: Tensor, asking_BMD: Tensor) -> Tensor:
    size = attn.attn_dim
    q_BHMD = project(attn.qkv, asking_BMD, stop=size).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    both = project(attn.qkv, x_BTD, start=size).unflatten(-1, (2, attn.num_heads, -1))
    k_BHTD, v_BHTD = both.permute(2, 0, 3, 1, 4).unbind(0)
    out_BHMD = F.scaled_dot_product_attention(attn.q_norm(q_BHMD), attn.k_norm(k_BHTD), v_BHTD)
    out_BMD = attn.norm(out_BHMD.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out_BMD = out_BMD * attn.gate(asking_BMD).sigmoid()
    projected_BMD: Tensor = attn.proj(out_BMD)
    return projected_BMD
