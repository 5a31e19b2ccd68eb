"""timm's mixup, CutMix and random erasing on the device, drawn from (seed, step) and (seed, epoch, position).

timm's parts draw from Python's, numpy's and torch's global states. Each call sets the states it reads and puts them
back, so that a run that goes on, on any number of ranks, draws what the run from the start did.

Shape legend: B images, C colours, H and W pixels, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mvp_fast.config.finetune import AugmentationConfig
from mvp_fast.samples.plan import PlanRows
from mvp_fast.samples.random import Stream, draws


def pair_order(size: int, repeat: int = 1) -> npt.NDArray[np.int64]:
    """The order of a batch in which timm's Mixup, which pairs row i with row size - 1 - i, pairs neighbours.

    So pairs are the same however a batch is divided among ranks and micro-batches. Neighbours are rows 2 i and 2 i + 1;
    with `repeat` crops of each sample in a row, the crops of samples 2 i and 2 i + 1.

    Args:
        size: a multiple of 2 * repeat.

    Returns:
        int64 (size,).
    """
    rows = np.arange(size).reshape(-1, 2, repeat)
    return np.concatenate([rows[:, 0].ravel(), rows[:, 1].ravel()[::-1]])


@contextmanager
def numpy_seeded(words: npt.NDArray[np.uint32]) -> Iterator[None]:
    """numpy's global state from these words inside, and what it was afterwards."""
    state = np.random.get_state()  # noqa: NPY002 (timm draws from it)
    np.random.seed(words)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


class Mixing:
    """Mixup or CutMix of neighbours: one draw for the whole global batch.

    Args:
        config: alphas, probabilities, label smoothing; one of the alphas is above 0.
        classes: K.
        seed: of the run.
        repeat: data.repeat.
    """

    def __init__(self, config: AugmentationConfig, classes: int, seed: int, repeat: int = 1) -> None:
        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.switch_prob,
            mode="batch",
            label_smoothing=config.label_smoothing,
            num_classes=classes,
        )
        self._seed, self._repeat = seed, repeat
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, images_BCHW: Tensor, label_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images, in their order, and their targets: float32 (B, K).

        Args:
            images_BCHW: normalised; may be written to.
            label_B: int64, on the same device.
            step: of the plan.
        """
        order_B, back_B = self._order(len(label_B), label_B.device)
        with numpy_seeded(draws(self._seed, Stream.MIXUP, 0, step, 0)[0]):
            images_BCHW, target_BK = self._mixup(images_BCHW[order_B], label_B[order_B])
        return images_BCHW[back_B], target_BK[back_B]

    def _order(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if size not in self._orders:
            order = pair_order(size, self._repeat)
            order_B, back_B = (torch.from_numpy(each).to(device) for each in (order, np.argsort(order)))
            self._orders[size] = order_B, back_B
        return self._orders[size]


class Erasing:
    """Random erasing of each image by itself.

    Args:
        probability: that an image has a box erased.
        mode: pixel, rand or const.
        seed: of the run.
        device: where the images are.
    """

    def __init__(self, probability: float, mode: str, seed: int, device: torch.device) -> None:
        self._erase = RandomErasing(probability, mode=mode, device=device)
        self._seed, self._device = seed, device

    def __call__(self, images_BCHW: Tensor, rows: PlanRows) -> Tensor:
        """Erase in place; returns the images.

        Args:
            images_BCHW: normalised.
            rows: theirs.
        """
        words_B4 = draws(self._seed, Stream.ERASING, rows.epoch_B, rows.position_B, 0).astype(np.uint64)
        seeds_B = (words_B4[:, 0] | words_B4[:, 1] << np.uint64(32)).tolist()
        noise_B = (words_B4[:, 2] | words_B4[:, 3] << np.uint64(32)).tolist()
        gpus = [self._device] if self._device.type == "cuda" else []
        generator = torch.cuda.default_generators[self._device.index] if gpus else torch.default_generator
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices=gpus):
                for image_CHW, seed, noise in zip(images_BCHW, seeds_B, noise_B, strict=True):
                    random.seed(seed)
                    generator.manual_seed(noise)
                    self._erase(image_CHW)
        finally:
            random.setstate(state)
        return images_BCHW
