"""CLIP as the teacher: a frozen vision tower of open_clip, whose token features are the targets.

A feature is `ln_post(token) @ proj`, of the CLS token (CLIP's own image feature) and, by the same layers, of the patch
tokens. CLIP is arXiv 2103.00020.

Shape legend: B images, N patches, M tokens in the loss, D channels.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.base import check_grid, fingerprint
from mvp_fast.models.teachers.clip_block import block
from mvp_fast.models.teachers.clip_settings import clip_words, model_settings
from mvp_fast.models.teachers.clip_weights import find_source, load_tower
from mvp_fast.models.teachers.tower import TowerTeacher


class ClipTeacher(TowerTeacher):
    """A tower of open_clip; ln_post and proj, and in the last block all but keys and values, run on the tokens in the
    loss alone, to the same result.

    Args:
        visual: open_clip's VisionTransformer, with weights.
        words, mean, std, fingerprint, impl: see `TowerTeacher`.
    """

    visual: Any

    def __init__(
        self,
        visual: Any,
        *,
        words: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fingerprint: str,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            words=words,
            mean=mean,
            std=std,
            fingerprint=fingerprint,
            width=visual.proj.shape[1],
            grid=tuple(visual.grid_size),
            patch_size=visual.patch_size[0],
            has_cls=True,
            impl=impl,
        )
        self.visual = visual
        self.eval().requires_grad_(False)

    @property
    def embedding(self) -> nn.Conv2d:
        """The tower's own patch embedding."""
        conv: nn.Conv2d = self.visual.conv1
        return conv

    @property
    def blocks(self) -> list[nn.Module]:
        """The tower's blocks."""
        return list(self.visual.transformer.resblocks)

    def _features(self, x_BND: Tensor, index_BM: Tensor) -> Tensor:
        """From embedded patches on."""
        visual = self.visual
        cls_B1D = visual.class_embedding.to(x_BND.dtype).expand(x_BND.shape[0], 1, -1)
        x_BND = torch.cat((cls_B1D, x_BND), dim=1) + visual.positional_embedding.to(x_BND.dtype)
        x_BND = visual.ln_pre(x_BND)
        *others, last = visual.transformer.resblocks
        for resblock in others:
            x_BND = block(resblock, x_BND)
        x_BMD = block(last, x_BND, index_BM, self.impl)
        features_BMD: Tensor = visual.ln_post(x_BMD) @ visual.proj
        return features_BMD


def build_clip(
    config: TeacherConfig,
    *,
    grid: tuple[int, int] = (14, 14),
    image_size: int = 224,
    impl: str = "auto",
    weights: Path | None = None,
) -> ClipTeacher:
    """Build the tower, on the CPU in float32; the text tower is neither built nor kept.

    Args:
        config: name, where the weights come from, seed of random ones.
        grid: the student's patches down and across; the tower is made to have the same, its position embedding resized
            as open_clip does it.
        image_size: side of the crops, pixels; the tower never sees more pixels than they have.
        impl: implementation of mvp_kernels: auto, triton or reference.
        weights: a file with the same weights, read in place of what config.pretrained names.

    Raises:
        ConfigError: there is no such model or tag, it is not a plain CLIP ViT, or its grid can't be the student's.
        DataError: the checkpoint file is missing, damaged, or of another model.
        EnvironmentProblem: the weights have to be downloaded, and can't be.
    """
    model = model_settings(config.name)
    vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
    check_tower(config.name, vision)
    check_grid(config.name, vision.patch_size, grid, image_size, _fitting(image_size // max(grid)))
    source = find_source(config, bool(model.get("quick_gelu", False)), weights)
    vision.image_size = (grid[0] * vision.patch_size, grid[1] * vision.patch_size)
    # open_clip builds a tower only as part of a whole CLIP: the text tower is as small as can be, and is dropped.
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)
        clip = open_clip.CLIP(model["embed_dim"], vision, text, quick_gelu=source.quick_gelu)
    if source.path is not None:
        load_tower(clip, source.path)
    description = {
        "embed_dim": model["embed_dim"],
        "vision": asdict(vision),
        "quick_gelu": source.quick_gelu,
        "mean": source.mean,
        "std": source.std,
        "resize": "bicubic antialias uint8",
    }
    return ClipTeacher(
        clip.visual,
        words=clip_words(config.name, config.pretrained),
        mean=source.mean,
        std=source.std,
        fingerprint=fingerprint(description, clip.visual.state_dict()),
        impl=impl,
    )


def check_tower(name: str, vision: open_clip.CLIPVisionCfg, where: str = "teacher.name") -> None:
    """ConfigError where it is no plain ViT with a CLS token: else `ln_post(token) @ proj` is no token's feature."""
    obstacle = ""
    if vision.timm_model_name:
        obstacle = f"is timm's {vision.timm_model_name}"
    elif isinstance(vision.layers, list | tuple):
        obstacle = "is a ResNet"
    elif vision.attentional_pool:
        obstacle = "pools its tokens by attention"
    elif vision.pool_type != "tok":
        obstacle = f"pools its tokens ({vision.pool_type}) in place of a CLS token"
    if obstacle:
        raise ConfigError(
            f"{name} can't be the teacher: its vision tower {obstacle}",
            where=where,
            fix="Take a plain CLIP ViT, such as ViT-B-16 or ViT-L-14",
        )


def _fitting(greatest: int) -> str:
    """The names of usual towers with patches of at most this many pixels."""
    usual = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
    fitting = [name for name in usual if open_clip.get_model_config(name)["vision_cfg"]["patch_size"] <= greatest]
    return " or ".join(fitting) or "none that open_clip ships; or a larger data.image_size"
