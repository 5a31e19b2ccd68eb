"""Frozen features: of every block, the CLS token and the mean of the patches.

Layers are the blocks, first to last, each before any norm, and behind them the last block after the network's own final
norm: what the network itself pools.

Shape legend: B images of a batch, N samples of a set, K of them in use, L layers, P poolings, D channels.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.backbone import Backbone, BlockTokens
from mvp_fast.evaluate.feature_cache import FeatureCache, Features
from mvp_fast.evaluate.progress import Tell
from mvp_fast.loaders.passage import passage
from mvp_fast.loaders.registry import resolve
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index

VERSION = 1
SECONDS_AT_RISK = 5.0  # work that a kill may cost
Precision = Literal["fp32", "bf16"]
# bf16's range is float32's, but features lie well within float16's, which keeps three bits more.
STORED: dict[Precision, Any] = {"fp32": np.float32, "bf16": np.float16}


@dataclass(frozen=True)
class Extraction:
    """How features are made.

    Attributes:
        share: of the shorter side in the centre crop.
        precision: what the network computes in; bf16 by autocast. Kept as float32 and float16.
        batch_size: images at a time.
        data: loader, threads, interpolation, prefetch and the budget for bad samples.
    """

    share: float = 0.875
    precision: Precision = "fp32"
    batch_size: int = 128
    data: DataConfig = field(default_factory=DataConfig)


def layer_names(backbone: Backbone) -> list[str]:
    """What the layers are called, in order."""
    return [*(f"block {number}" for number in range(1, backbone.depth + 1)), "final norm"]


def poolings(backbone: Backbone) -> tuple[str, ...]:
    """How tokens become one vector: `cls` where the network has such a token, and `mean` of the patches."""
    return ("cls", "mean") if getattr(backbone.model, "cls_token", None) is not None else ("mean",)


def own_pooling(backbone: Backbone) -> str:
    """The pooling of the network itself."""
    return "cls" if getattr(backbone.model, "global_pool", "") == "token" and "cls" in poolings(backbone) else "mean"


def pool(backbone: Backbone, tokens: list[BlockTokens]) -> Tensor:
    """Blocks' tokens to (B, L, P, D): every block, then the last one after the final norm as timm's head sees it.

    timm's models have a norm of the tokens (`norm`) or one of what was pooled (`fc_norm`); the other is the identity.
    """
    with_cls = "cls" in poolings(backbone)
    pooled = [_pooled(each.cls_BD if with_cls else None, each.patches_BND) for each in tokens]
    norm, fc_norm = (getattr(backbone.model, name, nn.Identity()) for name in ("norm", "fc_norm"))
    cls_BD, patches_BND = tokens[-1]
    normed_BD = norm(cls_BD) if with_cls and cls_BD is not None else None
    pooled.append(fc_norm(_pooled(normed_BD, norm(patches_BND))).float())
    return torch.stack(pooled, dim=1)


def _pooled(cls_BD: Tensor | None, patches_BND: Tensor) -> Tensor:
    mean_BD = patches_BND.float().mean(1)
    return mean_BD[:, None] if cls_BD is None else torch.stack((cls_BD.float(), mean_BD), dim=1)


def identity(backbone: Backbone, index: Index, how: Extraction, device: torch.device) -> dict[str, Any]:
    """All that features depend on, JSON-able."""
    return {
        "version": VERSION,
        "backbone": backbone.fingerprint,
        "index": index.fingerprint(),
        "image_size": backbone.image_size,
        "crop_share": how.share,
        "precision": how.precision,
        "loader": resolve(how.data.loader, how.data, device),
        "interpolation": how.data.interpolation,
        "shape": [len(index), backbone.depth + 1, len(poolings(backbone)), backbone.width],
    }


def find_features(
    folder: Path, backbone: Backbone, index: Index, how: Extraction, device: torch.device
) -> Features | None:
    """Complete features that are in `folder` already; None where they are not, or not all."""
    about = identity(backbone, index, how, device)
    cache = FeatureCache(folder, about, STORED[how.precision])
    return cache.features() if cache.matches() and cache.read_progress()[0] == len(index) else None


def make_features(
    folder: Path,
    backbone: Backbone,
    index: Index,
    how: Extraction,
    device: torch.device,
    tell: Tell = lambda done: None,
    *,
    seconds_at_risk: float = SECONDS_AT_RISK,
) -> Features:
    """The features of a set, from `folder` as far as they are there.

    Args:
        folder: of all caches; this one gets a folder of its own in it.
        backbone: on `device`.
        tell: called with the number of samples done.
        seconds_at_risk: least time between two records of progress.

    Raises:
        DataError: more samples are bad than the budget allows, or a feature is not finite.
        ConfigError: a feature is beyond float16.
        EnvironmentProblem: no room or no right to write, or another process is writing here.
    """
    about = identity(backbone, index, how, device)
    cache = FeatureCache(folder, about, STORED[how.precision])
    with cache.locked():
        done, bad = cache.begin()
        if done < len(index):
            _extract(cache, backbone, index, how, device, tell, done, bad, seconds_at_risk)
    return cache.features()


def _extract(
    cache: FeatureCache,
    backbone: Backbone,
    index: Index,
    how: Extraction,
    device: torch.device,
    tell: Tell,
    done: int,
    bad: list[int],
    seconds_at_risk: float,
) -> None:
    """Compute what is missing from sample `done` on."""
    size = min(how.batch_size, len(index))
    plan = CentrePlan(
        index, batch_size=size, image_size=backbone.image_size, patch_size=backbone.patch_size, share=how.share
    )
    data = replace(how.data, image_size=backbone.image_size)
    saved = time.monotonic()
    passes = passage(plan, data, device, start_step=done // size, ledger=cache.ledger)
    with cache.writing() as file, closing(passes), torch.inference_mode():
        try:
            for crops in passes:
                new_B = crops.sample_B >= done  # a cache may have been begun with batches of another size
                values_BLPD = _features(backbone, crops.images_BHWC, how.precision, device)[new_B]
                cache.write(file, done - len(bad), values_BLPD)
                end = min((int(crops.sample_B[-1]) // size + 1) * size, len(index))
                bad += np.setdiff1d(np.arange(done, end), crops.sample_B).tolist()
                done = end
                if time.monotonic() - saved >= seconds_at_risk:
                    cache.save(file, done, bad)
                    saved = time.monotonic()
                tell(done)
            bad += range(done, len(index))  # the last batches may have had no sample that counts
            done = len(index)
        finally:
            cache.save(file, done, bad)
    tell(done)


def _features(backbone: Backbone, images_BHWC: Tensor, precision: Precision, device: torch.device) -> npt.NDArray[Any]:
    """(B, L, P, D) as they are kept; an error where they can't be."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        values_BLPD = pool(backbone, backbone.tokens(images_BHWC)).float()
    stored_BLPD: npt.NDArray[Any] = values_BLPD.to(getattr(torch, np.dtype(STORED[precision]).name)).cpu().numpy()
    if not np.isfinite(stored_BLPD).all():
        if bool(values_BLPD.isfinite().all()):
            raise ConfigError(
                f"A feature is {float(values_BLPD.abs().max()):.3g}, and float16 ends at 65504",
                where=backbone.words,
                fix="Take --precision fp32",
            )
        raise DataError("A feature is not finite", where=backbone.words, fix="Evaluate an earlier checkpoint")
    return stored_BLPD
