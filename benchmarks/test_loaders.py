"""Images a second from JPEG files to uint8 crops: our loaders against PyTorch's usual ways, DALI's own random crop and
SPDL's pipeline.

The peers are `peers.image_loaders` and `peers.endless`. All read the same ImageNet-shaped files from the page cache,
use all cores, and resize with the same filter (bicubic, antialiased). A round is timed in the steady state: batches are
under way when it begins, and as many when it ends; whatever else is under way is stopped or drained before another's
turn.

Before anything is timed, ours must have the pixels that Pillow makes of the plan's boxes. The peers draw other boxes:
theirs are held to the same colours and the same sharpness, on average over many crops.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from harness import Session, Variant, compare
from peers import endless
from peers.image_loaders import Passages, RandomCropPipeline, take
from recorder import cores
from torch import Tensor

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.base import Batch, Loader, StageStats
from mvp_fast.loaders.prefetch import Prefetcher
from mvp_fast.loaders.registry import make_loader
from mvp_fast.loaders.torchvision import carry_out
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan

pytestmark = pytest.mark.timeout(900)  # also on a busy machine
BATCH, GPU_BATCH, WARM_UP, ROUNDS = 32, 64, 4, 9
COLOURS, SHARPNESS = 6.0, 0.05  # the means of a peer's crops: levels of 255, and relative
CHECKED = 256  # crops


class Steady:
    """A round in the steady state: `start` gives an iterator, and `stop` ends its passage."""

    def __init__(
        self,
        start: Callable[[], Iterator[Any]],
        stop: Callable[[Iterator[Any]], None],
        batches: int,
        use: Callable[[Any], Any] = lambda batch: None,
    ) -> None:
        self.start, self.stop, self.batches, self.use = start, stop, batches, use

    def variant(self, warm_up: int) -> Variant:
        def before() -> None:
            self.passage = self.start()
            take(self.passage, warm_up, self.use)

        def after() -> None:
            self.stop(self.passage)
            del self.passage

        return Variant(lambda: take(self.passage, self.batches, self.use), before, after)


def check_ours(loader: Loader, plan: SamplePlan, interpolation: str) -> None:
    """The right shape, and the pixels that Pillow makes of the plan's boxes."""
    batches = loader.batches(plan, 5)
    batch: Batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert batch.images_BHWC.shape == (len(batch.rows), plan.image_size, plan.image_size, 3)
    assert batch.images_BHWC.dtype == torch.uint8
    np.testing.assert_array_equal(batch.rows.sample_B, plan.step(5).sample_B)
    for i in range(len(batch.rows)):
        expected = carry_out(plan.index, batch.rows.slice(i, i + 1), plan.image_size, interpolation).image_HWC
        assert np.abs(batch.images_BHWC[i].numpy().astype(int) - expected).mean() < 0.5, f"row {i}'s pixels"


def looks(images_BHWC: Tensor) -> tuple[Tensor, float]:
    """The mean of each colour, and the mean difference of neighbours, which tells filters apart."""
    pixels = images_BHWC.float()
    return pixels.mean((0, 1, 2)), float(pixels.diff(dim=1).abs().mean() + pixels.diff(dim=2).abs().mean())


def check_peer(name: str, images_BHWC: Tensor, ours_BHWC: Tensor) -> None:
    assert images_BHWC.shape[1:] == ours_BHWC.shape[1:], f"{name}: {tuple(images_BHWC.shape)}"
    assert images_BHWC.dtype == ours_BHWC.dtype, f"{name}: {images_BHWC.dtype}"
    (colours, sharpness), (our_colours, our_sharpness) = looks(images_BHWC), looks(ours_BHWC)
    assert (colours - our_colours).abs().max() < COLOURS, f"{name}: mean colours {colours}, ours {our_colours}"
    assert abs(sharpness / our_sharpness - 1) < SHARPNESS, f"{name}: sharpness {sharpness}, ours {our_sharpness}"


def crops(passage: Iterator[Any], batch_size: int, images_of: Callable[[Any], Tensor]) -> Tensor:
    """CHECKED crops, (B, H, W, C) on the CPU."""
    return torch.cat([images_of(batch).cpu() for batch in islice(passage, CHECKED // batch_size)])


def channels_last(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.permute(0, 2, 3, 1)


class Peers:
    """All of them, with their checks; SPDL where it is installed.

    Attributes:
        checked: the devices for which their crops were looked at in this session.
    """

    checked: ClassVar[set[str]] = set()

    def __init__(self, index: Index, data: DataConfig, batch_size: int, batches: int, device: str = "cpu") -> None:
        self.dali = partial(RandomCropPipeline, index, batch_size, data, cores(), "cpu" if device == "cpu" else "mixed")
        self.opened: RandomCropPipeline | None = None
        self.spdl = partial(endless.spdl, index, data, batch_size, cores())
        self.spdl_opened: endless.Passage | None = None
        self.batches, self.batch_size, self.device = batches, batch_size, device
        longest = max(WARM_UP + batches, CHECKED // batch_size)
        self.passages = {
            name: Passages(
                index,
                data,
                tensors=tensors,
                batch_size=batch_size,
                batches=longest,
                workers=cores(),
                pinned=device == "cuda",
            )
            for name, tensors in (("DataLoader, Pillow", False), ("DataLoader, tensors", True))
        }

    def _open(self) -> Iterator[Tensor]:
        self.opened = self.dali()
        return iter(self.opened)

    def _close(self, passage: Iterator[Tensor]) -> None:
        passage.close()  # type: ignore[attr-defined]
        assert self.opened is not None
        self.opened.close()

    def _open_spdl(self) -> Iterator[Tensor]:
        self.spdl_opened = self.spdl()
        return self.spdl_opened.batches

    def _close_spdl(self, passage: Iterator[Tensor]) -> None:
        assert self.spdl_opened is not None
        self.spdl_opened.close()

    def check(self, ours_BHWC: Tensor) -> None:
        """Once for each device: it takes longer than a round, and they are the same in both benchmarks."""
        if self.device in self.checked:
            return
        for name, passages in self.passages.items():
            passage = passages.start()
            check_peer(name, crops(passage, self.batch_size, channels_last), ours_BHWC)
            passages.end(passage)
        passage = self._open()
        check_peer("DALI random crop", crops(passage, self.batch_size, lambda images: images), ours_BHWC)
        self._close(passage)
        if endless.has_spdl():
            passage = self._open_spdl()
            check_peer("SPDL, tensors", crops(passage, self.batch_size, channels_last), ours_BHWC)
            self._close_spdl(passage)
        self.checked.add(self.device)

    def variants(self, warm_up: int) -> dict[str, Variant]:
        def to_device(images: Tensor) -> Any:
            return images if self.device == "cpu" else images.to(self.device, non_blocking=True)

        steady = {
            name: Steady(passages.start, passages.end, self.batches, to_device)
            for name, passages in self.passages.items()
        }
        steady["DALI random crop"] = Steady(self._open, self._close, self.batches)
        if endless.has_spdl():
            steady["SPDL, tensors"] = Steady(self._open_spdl, self._close_spdl, self.batches, to_device)
        return {name: each.variant(warm_up) for name, each in steady.items()}


def measure(benchmark: Any, session: Session, folder: Path, name: str, batch_size: int, device: str) -> None:
    count, warm_up = (2, 1) if session.quick else (max(8, (4 if device == "cpu" else 2) * cores()), WARM_UP)
    index, data = Index.open(folder), DataConfig()
    plan = SamplePlan(index, seed=0, batch_size=batch_size, data=data, mask=MaskConfig())
    loader = make_loader(name, data)
    if device == "cuda":
        ours = Steady(lambda: iter(Prefetcher(loader, plan, 0, device)), lambda passage: passage.close(), count)
    else:
        ours = Steady(lambda: loader.batches(plan, 0), lambda passage: passage.close(), count)
    peers = None if session.turns else Peers(index, data, batch_size, count, device)

    def check() -> None:
        check_ours(loader, plan, data.interpolation)
        if peers is not None:
            passage = ours.start()
            peers.check(crops(passage, batch_size, lambda batch: batch.images_BHWC))
            ours.stop(passage)

    compare(
        benchmark,
        session,
        ours=ours.variant(warm_up),
        peers=None if peers is None else peers.variants(warm_up),
        check=check,
        items=count * batch_size,
        unit="images a core" if device == "cpu" else "images",
        device=device,
        rounds=ROUNDS,
        per=cores() if device == "cpu" else 1,
        extra=lambda: {
            "images_a_cpu_second": {stage: rate(loader.stats(), stage) for stage in ("decode", "transform")}
        },
    )
    loader.close()


@pytest.mark.parametrize("name", ["torchvision", "dali", "cpu"])
def test_images_a_second_and_core(benchmark: Any, session: Session, imagenet_scenes: Path, name: str) -> None:
    """ImageNet-shaped JPEG files to crops of 224 px, bicubic, antialiased, all cores."""
    measure(benchmark, session, imagenet_scenes, name, BATCH, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torchvision", "dali", "cpu"])
def test_images_onto_the_gpu(benchmark: Any, session: Session, imagenet_scenes: Path, name: str) -> None:
    """ImageNet-shaped JPEG files to crops of 224 px on the GPU, bicubic, antialiased; DALI's own decodes there."""
    measure(benchmark, session, imagenet_scenes, name, GPU_BATCH, "cuda")


def rate(stats: StageStats, stage: str) -> float | None:
    return stats.items[stage] / stats.seconds[stage] if stats.seconds[stage] else None
