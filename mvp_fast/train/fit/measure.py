"""What a CLIP has learnt, measured on images that it was not trained on: zero-shot accuracy, and recall of captions.

Zero-shot: the class is the one whose prompts' feature is nearest to the image's; no label is used. Recall at k: the
share of images whose caption is among the k nearest (and of captions whose image is).

Shape legend: N images, C classes, B a batch, D channels, H and W pixels, L tokens of a text, T templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.config.fit import TeacherFitConfig
from mvp_fast.loaders.passage import passage
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.models.teachers.new_clip import MEAN, STD
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index
from mvp_fast.samples.scenes.vocabulary import COLOURS, SHAPES
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.fit.captions import Captions, tokenize
from mvp_fast.train.fit.scene_truth import TEMPLATES, Truth

RECALLS = (1, 5)
TEXTS_AT_A_TIME, ROWS_AT_A_TIME = 256, 1024
Figures = dict[str, float]


@dataclass(frozen=True)
class TestSet:
    """Images to measure on.

    Attributes:
        name: what its figures' names begin with.
        index, captions: of the images.
        truth: of a set of scenes; None for others.
    """

    name: str
    index: Index
    captions: Captions
    truth: Truth | None

    def chances(self) -> Figures:
        """The figures that guessing gives."""
        chances = {f"{way}_{k}": min(k / len(self.index), 1.0) for way in _WAYS for k in RECALLS}
        if self.truth is not None:
            classes = {"shape": len(SHAPES), "colour": len(COLOURS), "pair": len(SHAPES) * len(COLOURS)}
            chances |= {name: 1 / count for name, count in classes.items()}
        return {f"{self.name}_{name}": chance for name, chance in chances.items()}


_WAYS = ("image_to_text", "text_to_image")


@torch.no_grad()
def measure(
    clip: Any, sets: Sequence[TestSet], config: TeacherFitConfig, ranks: Ranks, stopped: Callable[[], bool]
) -> Figures:
    """All figures of a model as it stands, by name, such as `held_out_pair`; shares in [0, 1]. Every rank must call it.

    Args:
        clip: bare, on the ranks' device.
        stopped: whether to break off; then there are no figures.
    """
    training = clip.training
    clip.eval()
    try:
        figures: Figures = {}
        for test in sets:
            features = _image_features(clip, test, config, ranks, stopped)
            if features is None:
                return {}
            image_ND, there_N = features
            if test.truth is not None:
                figures |= _named(test, zero_shot(image_ND, there_N, test.truth, prompt_features(clip, config, ranks)))
            first_N = test.captions.start[:-1]
            text_ND = _text_features(clip, torch.from_numpy(test.captions.tokens_KL[first_N]), config, ranks)
            texts = np.asarray(test.captions.texts, dtype=object)[first_N]
            same_N = torch.from_numpy(np.unique(texts.astype(str), return_inverse=True)[1]).to(ranks.device)
            figures |= _named(test, recall(image_ND[there_N], text_ND[there_N], same_N[there_N]))
        return figures
    finally:
        clip.train(training)


def zero_shot(image_ND: Tensor, there_N: Tensor, truth: Truth, pair_CSD: Tensor) -> Figures:
    """Share of images whose main object's shape, colour and pair of both the nearest prompts name.

    Args:
        image_ND: features of length 1.
        there_N: bool, images that did not decode left out.
        pair_CSD: of every colour with every shape, see `prompt_features`. A shape's feature is the mean over colours.
    """
    shape_SD, colour_CD = F.normalize(pair_CSD.mean(0), dim=-1), F.normalize(pair_CSD.mean(1), dim=-1)
    shape_N, colour_N = (torch.from_numpy(each).to(image_ND.device) for each in (truth.shape_N, truth.colour_N))
    answers = {
        "shape": (shape_SD, shape_N),
        "colour": (colour_CD, colour_N),
        "pair": (pair_CSD.flatten(0, 1), colour_N * len(SHAPES) + shape_N),
    }
    return {
        name: float(((image_ND @ classes.T).argmax(1) == true_N)[there_N].double().mean())
        for name, (classes, true_N) in answers.items()
    }


def recall(image_ND: Tensor, text_ND: Tensor, same_N: Tensor) -> Figures:
    """Recall at 1 and 5, from images to texts and from texts to images. A tie counts as a miss.

    Args:
        image_ND, text_ND: features of length 1 of images and their captions.
        same_N: int64, equal for captions that are the same text: any of them, or of their images, will do.
    """
    figures: Figures = {}
    for way, (query_ND, found_ND) in zip(_WAYS, ((image_ND, text_ND), (text_ND, image_ND)), strict=True):
        ranks = []
        for at in range(0, len(query_ND), ROWS_AT_A_TIME):
            rows = slice(at, at + ROWS_AT_A_TIME)
            near_BN = query_ND[rows] @ found_ND.T
            right_BN = same_N[rows, None] == same_N[None]
            best_B1 = near_BN.masked_fill(~right_BN, -torch.inf).amax(1, keepdim=True)
            ranks.append(((near_BN >= best_B1) & ~right_BN).sum(1))
        rank_N = torch.cat(ranks)
        figures |= {f"{way}_{k}": float((rank_N < k).double().mean()) for k in RECALLS}
    return figures


def prompt_features(clip: Any, config: TeacherFitConfig, ranks: Ranks) -> Tensor:
    """Of each colour with each shape, such as "a red square", over all templates: (colours, shapes, D), of length 1."""
    found = _text_features(clip, prompt_tokens(clip.context_length), config, ranks)
    means = found.unflatten(0, (len(COLOURS), len(SHAPES), len(TEMPLATES))).mean(2)
    return F.normalize(means, dim=-1)


def prompt_tokens(context_length: int) -> Tensor:
    """The prompts of all pairs, int32 (colours * shapes * T, L); ConfigError where `context_length` is too short."""
    texts = [
        template.replace("{}", f"{colour} {shape}") for colour in COLOURS for shape in SHAPES for template in TEMPLATES
    ]
    return torch.from_numpy(tokenize(texts, context_length, "the prompts of the zero-shot check"))


def _text_features(clip: Any, tokens_NL: Tensor, config: TeacherFitConfig, ranks: Ranks) -> Tensor:
    """Features of length 1, float32 (N, D)."""
    found = []
    for part_BL in tokens_NL.split(TEXTS_AT_A_TIME):
        with _autocast(config, ranks):
            found.append(clip.encode_text(part_BL.long().to(ranks.device), normalize=True).float())
    return torch.cat(found)


def _image_features(
    clip: Any, test: TestSet, config: TeacherFitConfig, ranks: Ranks, stopped: Callable[[], bool]
) -> tuple[Tensor, Tensor] | None:
    """Features of length 1, float32 (N, D), and which images decoded, bool (N); on all ranks. None where stopped."""
    size = min(config.train.batch_size // config.train.accumulate, len(test.index))
    plan = CentrePlan(
        test.index,
        batch_size=-(-size // ranks.world) * ranks.world,
        image_size=config.data.image_size,
        patch_size=int(clip.visual.patch_size[0]),
        share=1.0,
        rank=ranks.rank,
        world=ranks.world,
    )
    pixels, broken_off = Normaliser(MEAN, STD).to(ranks.device), False
    image_ND = torch.zeros(len(test.index), int(clip.visual.output_dim), device=ranks.device)
    with closing(passage(plan, config.data, ranks.device, local_ranks=ranks.local_world)) as crops:
        for images_BHWC, sample_B in crops:
            if broken_off := stopped():
                break
            with _autocast(config, ranks):
                feature_BD = clip.encode_image(pixels(images_BHWC), normalize=True).float()
            image_ND[torch.from_numpy(sample_B).to(ranks.device)] = feature_BD
    if ranks.agree(int(broken_off)):
        return None
    image_ND = ranks.sum(image_ND)
    return image_ND, image_ND.any(1)


def _autocast(config: TeacherFitConfig, ranks: Ranks) -> torch.autocast:
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def _named(test: TestSet, figures: Figures) -> Figures:
    return {f"{test.name}_{name}": value for name, value in figures.items()}
