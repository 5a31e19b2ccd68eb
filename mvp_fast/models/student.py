"""The student: one of timm's BEiT models with a mask token and a linear predictor of the teacher's features.

BEiT is arXiv 2106.08254, BEiT v2 2208.06366, MVP 2203.05175: a ViT with one relative position bias for all blocks,
layer scale, a CLS token, and a mask token put in before the encoder. Its blocks: `block`.

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch (C * patch * patch, ordered colour,
row, column), M tokens in the loss, D channels, L blocks, S the two branches of a block (attention, MLP), K images that
a branch is computed for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.config.schema import StudentConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.attention import shared_bias
from mvp_fast.models.block import Block, run_block
from mvp_fast.models.patches import input_dtype
from mvp_kernels import dispatch

INIT_STD = 0.02


class Student(nn.Module):
    """A BEiT that predicts a feature for each token in the loss.

    The parts of timm's model are this module's own children, so that `state_dict` has timm's names, plus `mask_token`
    and `predictor`. Weights are float32 and on the CPU when built, and depend on the arguments alone.

    Args:
        config: name, overrides, layer scale and drop path rate.
        target_width: channels of the predicted features.
        image_size: side of the square input, pixels; a multiple of the model's patch size.
        seed: decides the initial weights; the global random state is left as it was.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Attributes:
        patch_size: side of a patch, pixels.
        grid: patches down and across.
        mean, std: colour statistics that timm declares for the model, of values in [0, 1] (BEiT v2: ImageNet's).
        compiled: whether `compile_blocks` was called.

    Raises:
        ConfigError: there is no such BEiT, or the sizes don't fit together.
    """

    cls_token: nn.Parameter
    mask_token: nn.Parameter
    patch_embed: Any
    rel_pos_bias: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        config: StudentConfig,
        *,
        target_width: int,
        image_size: int = 224,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.image_size, self.impl = config, image_size, impl
        self.compiled = False
        # Only the CPU's generator is used, so only its state has to be put back.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            beit = build_beit(config, image_size, global_pool="", shared_rel_pos_bias=True)
            self.cls_token = beit.cls_token
            self.mask_token = nn.Parameter(torch.empty_like(beit.cls_token))
            self.patch_embed = beit.patch_embed
            self.rel_pos_bias = beit.rel_pos_bias
            self.blocks = nn.ModuleList(Block(block) for block in beit.blocks)
            self.norm = beit.norm
            self.predictor = nn.Linear(beit.embed_dim, target_width)
            torch.default_generator.manual_seed(seed)
            self._init_weights()
        self.width: int = beit.embed_dim
        self.patch_size: int = beit.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(beit.patch_embed.grid_size)
        self.mean: tuple[float, ...] = tuple(beit.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(beit.pretrained_cfg["std"])

    def compile_blocks(self) -> None:
        """Run the blocks through torch.compile from now on: whole, and for fixed shapes."""
        if self.config.drop_path_mode == "subset":  # then the blocks differ in the number of images that they take
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(self.blocks))
        compiled = torch.compile(run_block, fullgraph=True, dynamic=False)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.run = compiled
        self.compiled = True

    def recompute_blocks(self) -> None:
        """Keep only the blocks' inputs for the backward pass from now on (arXiv 1604.06174)."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = True

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic depth rate of each block, linear from 0 to config.drop_path (arXiv 1603.09382)."""
        last = max(len(self.blocks) - 1, 1)
        return tuple(self.config.drop_path * block / last for block in range(len(self.blocks)))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two dimensions or more that weight decay must leave alone."""
        return {"cls_token", "mask_token", "rel_pos_bias.relative_position_bias_table"}

    def normalization(self) -> dispatch.Normalization:
        """How this model wants its pixels, in the type that it computes in."""
        return dispatch.Normalization(self.mean, self.std, input_dtype(self.patch_embed.proj.weight))

    def patches(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images to patches_BNP, normalised as `normalization` says."""
        return dispatch.patchify(images_BHWC, self.patch_size, [self.normalization()], impl=self.impl)[0]

    def forward(
        self,
        patches_BNP: Tensor,
        mask_BN: Tensor,
        index_BM: Tensor,
        drop_scale_LSB: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict the features of the tokens in the loss.

        The final norm and the predictor run on those tokens alone, and so do the queries, the output projection and the
        MLP of the last block. That changes neither the result nor its gradient.

        Args:
            patches_BNP: normalised patches, see `patches`.
            mask_BN: bool, True where the patch is replaced by the mask token.
            index_BM: int64 tokens to predict: 0 is CLS, 1 + n is patch n.
            drop_scale_LSB: factor of each residual branch for each image (0, or 1 / keep): stochastic depth as planned
                by the caller; None drops nothing.
            kept: in its place, for each block the images that its branches are computed for, int64 (2, K) of K of the B
                images, different ones a branch; the results count B / K times.

        Returns:
            pred_BMD, D = target_width.
        """
        taken_BMD = self._encode(patches_BNP, mask_BN, drop_scale_LSB, index_BM, kept)
        pred_BMD: Tensor = self.predictor(self.norm(taken_BMD))
        return pred_BMD

    def encode(self, patches_BNP: Tensor) -> Tensor:
        """All tokens of whole images after the final norm: (B, 1 + N, D), CLS first, D = width.

        The same as `forward_features` of timm's model with these weights.
        """
        tokens_BND: Tensor = self.norm(self._encode(patches_BNP, None, None))
        return tokens_BND

    def _encode(
        self,
        patches_BNP: Tensor,
        mask_BN: Tensor | None,
        drop_scale_LSB: Tensor | None,
        index_BM: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The tokens that the last block yields: all, or those of `index_BM`."""
        proj = self.patch_embed.proj
        x_BND = F.linear(patches_BNP, proj.weight.flatten(1), proj.bias)
        if mask_BN is not None:
            x_BND = torch.where(mask_BN[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        cls_B1D = self.cls_token.to(x_BND.dtype).expand(x_BND.shape[0], -1, -1)
        x_BND = torch.cat((cls_B1D, x_BND), dim=1)
        bias_HNN = shared_bias(self.rel_pos_bias, self.impl)
        for number, block in enumerate(self.blocks):
            scale_SB = None if drop_scale_LSB is None else drop_scale_LSB[number]
            last = number == len(self.blocks) - 1
            kept_SK = None if kept is None else kept[number]
            x_BND = block(x_BND, bias_HNN, scale_SB, self.impl, index_BM if last else None, kept_SK)
        return x_BND

    def _init_weights(self) -> None:
        """BEiT's initialisation for pre-training: normal, cut at one standard deviation; biases 0.

        The output layers of block l (from 1) are divided by sqrt(2 l). The predictor is drawn last, so that the encoder
        begins the same whatever the target width.
        """
        _trunc_normal_(self.cls_token)
        _trunc_normal_(self.mask_token)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                _trunc_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                _rescale(block, math.sqrt(2 * number))


def patch_size_of(name: str) -> int:
    """Side of a BEiT's patches, pixels, without building the model at its size.

    Raises:
        ConfigError: there is no such BEiT.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        small = build_beit(
            StudentConfig(name, width=8, depth=1, heads=1), None, global_pool="", shared_rel_pos_bias=True
        )
    patch: int = small.patch_embed.patch_size[0]
    return patch


def build_beit(
    config: StudentConfig,
    image_size: int | None,
    *,
    global_pool: str,
    shared_rel_pos_bias: bool,
    num_classes: int = 0,
) -> Any:
    """timm's model of a student's shape.

    Args:
        config: name and overrides.
        image_size: side of the square input, pixels; None for the named model's.
        global_pool: "" keeps the final norm on all tokens, "avg" pools the patches and norms the mean.
        shared_rel_pos_bias: one table for all blocks (pre-training), or one in each (as timm's names mean it).
        num_classes: outputs of the head; 0 for none.

    Raises:
        ConfigError: there is no such BEiT, or the sizes don't fit together.
    """
    names = timm.list_models(module="beit")
    if config.name not in names:
        raise ConfigError(
            f"timm has no BEiT named {config.name!r}",
            where="student.name",
            fix=f"Did you mean {' or '.join(difflib.get_close_matches(config.name, names, n=2, cutoff=0))}?",
        )
    overrides = {"init_values": config.layer_scale, **beit_overrides(config, image_size)}
    beit = timm.create_model(
        config.name,
        pretrained=False,
        num_classes=num_classes,
        global_pool=global_pool,
        use_rel_pos_bias=not shared_rel_pos_bias,
        use_shared_rel_pos_bias=shared_rel_pos_bias,
        **overrides,
    )
    width, heads = beit.embed_dim, beit.blocks[0].attn.num_heads
    if width % heads:
        raise ConfigError(
            f"The student's width {width} can't be split among {heads} attention heads",
            where="student.width, student.heads",
            fix=f"Take a width that is a multiple of {heads}, or set student.heads",
        )
    patch = beit.patch_embed.patch_size[0]
    if image_size is not None and image_size % patch:
        raise ConfigError(
            f"Images of {image_size} px can't be cut into {config.name}'s patches of {patch} px",
            where="data.image_size",
            fix=f"Take a multiple of {patch}",
        )
    return beit


def beit_overrides(config: StudentConfig, image_size: int | None) -> dict[str, int]:
    """The arguments of timm.create_model in which a student differs from the model it is named after."""
    asked = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    overrides = {name: value for name, value in asked.items() if value is not None}
    if image_size is not None and image_size != timm.get_pretrained_cfg(config.name).input_size[-1]:
        overrides["img_size"] = image_size
    return overrides


def _rescale(block: Any, divisor: float) -> None:
    for layer in (block.attn.proj, block.mlp.fc2):
        layer.weight.div_(divisor)


def _trunc_normal_(tensor: Tensor, std: float = INIT_STD) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)
