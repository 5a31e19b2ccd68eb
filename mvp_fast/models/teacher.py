"""The teacher: a frozen CLIP vision tower of open_clip, whose token features are the targets.

A feature is `ln_post(token) @ proj`, of the CLS token (CLIP's own image feature) and, by the same layers, of the patch
tokens. CLIP is arXiv 2103.00020.

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch, M tokens in the loss, D channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.clip_settings import model_settings
from mvp_fast.models.clip_weights import find_source, load_tower
from mvp_fast.models.patches import input_dtype
from mvp_fast.models.tower import block
from mvp_kernels import dispatch

# (value - 128) / 256 as a normalisation of value / 255: eight bits hold it.
EXACT_MEAN, EXACT_STD = 128 / 255, 256 / 255
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Teacher(nn.Module):
    """A frozen vision tower: `teacher(teacher.patches(images_BHWC), index_BM) -> features_BMD`, without a gradient.

    `patches` takes the crops as the student's loader yields them, normalises them in CLIP's own way and, where the
    tower's patches are smaller or larger than the student's, resizes them so that its grid is the student's.

    Args:
        visual: open_clip's VisionTransformer, with weights.
        mean, std: colour statistics the tower was trained with, of values in [0, 1].
        fingerprint: identifies name, shape, preprocessing and every weight.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Attributes:
        width: channels of a feature.
        grid: patches down and across.
        input_size: pixels down and across that the tower sees.
        dtype: that it computes in; under autocast only a float32 tower follows autocast's.
    """

    visual: Any
    patch_weight_DP: Tensor
    patch_shift_D: Tensor

    def __init__(
        self,
        visual: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fingerprint: str,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.visual = visual
        self.mean, self.std, self.fingerprint, self.impl = mean, std, fingerprint, impl
        self.width: int = self.visual.proj.shape[1]
        self.patch_size: int = self.visual.patch_size[0]
        self.grid: tuple[int, int] = tuple(self.visual.grid_size)
        self.input_size: tuple[int, int] = tuple(self.visual.image_size)
        self.dtype = torch.float32
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def lower(self, dtype: torch.dtype) -> Teacher:
        """Compute in float16 or bfloat16 from now on: all weights are cast, once.

        The colour statistics move into the patch embedding's weights (in float64, before the cast): it then takes
        (value - 128) / 256, which is exact in both types, where a normalised colour is rounded.
        """
        visual = self.visual
        weight_DCP = visual.conv1.weight.double().flatten(2)
        mean_C1, std_C1 = (weight_DCP.new_tensor(values)[:, None] for values in (self.mean, self.std))
        weight_DCP = weight_DCP / std_C1
        shift_D = (weight_DCP * (EXACT_MEAN - mean_C1)).sum((1, 2))
        self.to(dtype)
        self.dtype = dtype
        self.register_buffer("patch_weight_DP", (weight_DCP * EXACT_STD).flatten(1).to(dtype), persistent=False)
        self.register_buffer("patch_shift_D", shift_D.to(dtype), persistent=False)
        return self

    @property
    def lowered(self) -> bool:
        """Whether `lower` was called."""
        return self.dtype != torch.float32

    def normalization(self) -> dispatch.Normalization:
        """How the tower wants its pixels, in the type that it computes in."""
        if self.lowered:
            colours = len(self.mean)
            return dispatch.Normalization((EXACT_MEAN,) * colours, (EXACT_STD,) * colours, self.dtype)
        return dispatch.Normalization(self.mean, self.std, input_dtype(self.visual.conv1.weight))

    def patches(self, images_BHWC: Tensor) -> Tensor:
        """uint8 crops of any size to patches_BNP of `input_size`, normalised as `normalization` says."""
        images_BHWC = resize(images_BHWC, self.input_size)
        return dispatch.patchify(images_BHWC, self.patch_size, [self.normalization()], impl=self.impl)[0]

    @torch.no_grad()
    def forward(self, patches_BNP: Tensor, index_BM: Tensor) -> Tensor:
        """Features of the tokens in the loss.

        ln_post and proj run on those tokens alone, and so do the queries, the output projection and the MLP of the last
        block, to the same result.

        Args:
            patches_BNP: normalised patches, see `patches`.
            index_BM: int64 tokens: 0 is CLS, 1 + n is patch n of the grid, row-major.

        Returns:
            features_BMD, D = width, not normalised; in `dtype`, or in autocast's type where it is on and dtype float32.
        """
        if self.lowered:
            with torch.autocast(patches_BNP.device.type, enabled=False):
                return self._features(F.linear(patches_BNP, self.patch_weight_DP, self.patch_shift_D), index_BM)
        return self._features(F.linear(patches_BNP, self.visual.conv1.weight.flatten(1)), index_BM)

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


def resize(images_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images, bicubic with antialiasing, on their own device; as they are where the size fits.

    The result is rounded to uint8, as CLIP's own preprocessing leaves it before it normalises.
    """
    if tuple(images_BHWC.shape[1:3]) == tuple(size):
        return images_BHWC
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    x_BCHW = F.interpolate(x_BCHW, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return x_BCHW.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def build_teacher(
    config: TeacherConfig, *, grid: tuple[int, int] = (14, 14), image_size: int = 224, impl: str = "auto"
) -> Teacher:
    """Build the tower, on the CPU in float32; the text tower is neither built nor kept.

    Args:
        config: name, where the weights come from, seed of random ones.
        grid: the student's patches down and across; the tower is made to have the same, its position embedding resized
            as open_clip does it.
        image_size: side of the crops, pixels; the tower never sees more pixels than they have.
        impl: implementation of mvp_kernels: auto, triton or reference.

    Raises:
        ConfigError: there is no such model or tag, it is not a plain CLIP ViT, or its grid can't be the student's.
        DataError: the checkpoint file is missing, damaged, or of another model.
        EnvironmentProblem: the weights have to be downloaded, and can't be.
    """
    model = model_settings(config.name)
    vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
    check_tower(config.name, vision)
    _check_grid(config.name, vision.patch_size, grid, image_size)
    source = find_source(config, bool(model.get("quick_gelu", False)))
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
    return Teacher(
        clip.visual,
        mean=source.mean,
        std=source.std,
        fingerprint=fingerprint(description, clip.visual.state_dict()),
        impl=impl,
    )


def fingerprint(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """sha256 over what decides the features: shape and preprocessing as JSON, and every weight with its name.

    The model's name and the file are left out: the same weights from another place are the same teacher.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def teacher_dtype(precision: str, train_precision: str, device: torch.device) -> torch.dtype:
    """The type that a teacher of this setting computes in (see TeacherConfig.precision)."""
    if precision != "auto":
        return PRECISIONS[precision]
    if train_precision == "fp32":
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


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


def _check_grid(name: str, patch: int, grid: tuple[int, int], image_size: int) -> None:
    greatest = image_size // max(grid)
    if patch > greatest:
        own = image_size // patch
        raise ConfigError(
            f"{name} has patches of {patch} px: {image_size} px crops give it a grid of {own}x{own}, the student has"
            f" {grid[0]}x{grid[1]}",
            where="teacher.name",
            fix=f"Take a teacher with patches of at most {greatest} px, such as {_fitting(greatest)}",
        )


def _fitting(greatest: int) -> str:
    """The names of usual towers with patches of at most this many pixels."""
    usual = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
    fitting = [name for name in usual if open_clip.get_model_config(name)["vision_cfg"]["patch_size"] <= greatest]
    return " or ".join(fitting) or "none that open_clip ships; or a larger data.image_size"
