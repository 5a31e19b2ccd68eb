"""UPerNet (Xiao et al., arXiv 1807.10221) on four blocks of a plain vision transformer, as BEiT has it.

The patch tokens of the four blocks are maps of one size. BEiT makes a pyramid of them: the first four times as large by
two transposed convolutions, the second twice, the third as it is, the fourth half. segmentation_models_pytorch's
decoder takes it from there.

Shape legend: B images, H and W pixels, h and w places of a map, C classes (of images: colours), D channels, L blocks,
S the two branches of a block (attention, MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.base.modules import Conv2dReLU
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone
from mvp_fast.evaluate.drop_path import PlannedDepth

SHARES = (1 / 3, 1 / 2, 2 / 3, 1)
"""Of the depth: after these parts of the blocks their output is taken (BEiT: 4 6 8 12 of 12, 8 12 16 24 of 24)."""
AUXILIARY_CHANNELS = 256
PREFIX = "backbone.model."


class Noise(NamedTuple):
    """What is dropped in a training step; None where nothing is.

    Attributes:
        branch_LSB: factors of the backbone's branches, 0 or 1 / keep (stochastic depth).
        decoder_BD, auxiliary_BD: factors of the channels before the last layer of each head, likewise.
    """

    branch_LSB: Tensor | None = None
    decoder_BD: Tensor | None = None
    auxiliary_BD: Tensor | None = None


class Segmenter(nn.Module):
    """A backbone with pyramid, decoder and heads.

    Args:
        backbone: at the size of the crops; its last norm, its head and the blocks above the last that is used go.
        classes: outputs.
        blocks: four numbers, ascending, from 0; none for SHARES of the depth.
        channels: of the decoder; 0 for the backbone's width.
        auxiliary: whether there is an auxiliary head.
        drop_path: rate of the last block of the whole backbone.
        seed: decides the weights of all but the backbone.

    Attributes:
        blocks: the four numbers.
        channels: of the decoder.
        depth: stochastic depth of the blocks of the whole backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        blocks: Sequence[int] = (),
        channels: int = 0,
        auxiliary: bool = True,
        drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        depth, width = backbone.depth, backbone.width
        self.blocks = tuple(blocks) or default_blocks(depth)
        if max(self.blocks) >= depth:
            raise ConfigError(
                f"There is no block {max(self.blocks)} in {backbone.words}, which has {depth}",
                where="segment.blocks",
                fix=f"Take numbers from 0 to {depth - 1}, or none for {default_blocks(depth)}",
            )
        self.channels = channels or width
        self.backbone, self.depth = backbone, PlannedDepth(backbone.model, drop_path, "segment.drop-path")
        # Gone is what is not used: DistributedDataParallel would wait for its gradients.
        backbone.model.prune_intermediate_layers(sorted(set(self.blocks)), prune_norm=True, prune_head=True)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.pyramid = make_pyramid(width, backbone.patch_size)
            self.decoder = UPerNetDecoder([3, width, *[width] * 4], decoder_channels=self.channels)
            self.head = SegmentationHead(self.channels, classes, kernel_size=1)
            self.auxiliary: nn.Module | None = None
            self.auxiliary_head: nn.Module | None = None
            initialize_decoder(self.decoder)
            initialize_head(self.head)
            if auxiliary:
                self.auxiliary = Conv2dReLU(width, AUXILIARY_CHANNELS, kernel_size=3, padding=1, use_norm="batchnorm")
                self.auxiliary_head = SegmentationHead(AUXILIARY_CHANNELS, classes, kernel_size=1)
                initialize_decoder(self.auxiliary)
                initialize_head(self.auxiliary_head)

    def features(self, pixels_BDHW: Tensor) -> list[Tensor]:
        """The patch tokens of the four blocks as maps (B, D, h, w), before any final norm."""
        wanted = sorted(set(self.blocks))
        maps = self.backbone.model.forward_intermediates(
            pixels_BDHW, indices=wanted, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        by_block = dict(zip(wanted, maps, strict=True))
        return [by_block[block] for block in self.blocks]

    def forward(self, images_BHWC: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores of the classes, at a quarter of the images' size where patches are 16 pixels.

        Args:
            images_BHWC: colours from 0 to 255, any type.
            noise: of a training step; evaluation mode drops nothing.

        Returns:
            (B, C, h, w), and those of the auxiliary head in training mode, where there is one.
        """
        noise = noise or Noise()
        if noise.branch_LSB is not None:
            self.depth.set(noise.branch_LSB)
        maps = self.features(self.backbone.pixels(images_BHWC))
        levels = [level(each) for level, each in zip(self.pyramid, maps, strict=True)]
        scores_BChw = self.head(_drop(self.decoder([None, None, *levels]), noise.decoder_BD))
        if not self.training or self.auxiliary is None or self.auxiliary_head is None:
            return scores_BChw, None
        return scores_BChw, self.auxiliary_head(_drop(self.auxiliary(levels[2]), noise.auxiliary_BD))

    def scores(self, images_BHWC: Tensor) -> Tensor:
        """Scores of the classes for each pixel, float32 (B, C, H, W)."""
        return upsample(self(images_BHWC)[0], images_BHWC.shape[1:3])

    def group_matcher(self, coarse: bool = False) -> Any:
        """The layer of each parameter, for layer decay: the backbone's as timm has them, all else above them."""
        from timm.models import group_parameters

        layers = group_parameters(self.backbone.model, self.backbone.model.group_matcher(coarse=coarse), reverse=True)

        def layer(name: str) -> tuple[float]:
            return (layers[name.removeprefix(PREFIX)] if name.startswith(PREFIX) else float("inf"),)

        return layer

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, beside biases and norms."""
        if not hasattr(self.backbone.model, "no_weight_decay"):
            return set()
        return {PREFIX + name for name in self.backbone.model.no_weight_decay()}


def default_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks whose output is taken: 3 5 7 11 of 12, 7 11 15 23 of 24."""
    return tuple(max(round(depth * share), 1) - 1 for share in SHARES)


def make_pyramid(width: int, patch_size: int) -> nn.ModuleList:
    """BEiT's pyramid: maps 4, 2, 1 and 1/2 times the size of the patches' grid; 2, 1, 1/2, 1/4 for patches of 8 px."""

    def twice() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    four = nn.Sequential(twice(), nn.BatchNorm2d(width), nn.GELU(), twice())
    levels = [four, twice(), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
    return nn.ModuleList(levels[1:] if patch_size <= 8 else levels[:4])


def upsample(scores_BChw: Tensor, size: Sequence[int]) -> Tensor:
    """Scores for each pixel, by bilinear interpolation in float32."""
    return F.interpolate(scores_BChw.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _drop(map_BDhw: Tensor, scale_BD: Tensor | None) -> Tensor:
    return map_BDhw if scale_BD is None else map_BDhw * scale_BD.to(map_BDhw.dtype)[:, :, None, None]
