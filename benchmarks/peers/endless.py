"""The peers of `image_loaders` as passages without end, which stand still between turns, and SPDL's pipeline.

A passage that nobody takes from fills its queues and stops. Whoever takes its turn with others takes `ahead` batches
before it times any.

- `SPDL, tensors`: spdl.pipeline, a thread a core, over the same functions on tensors as `DataLoader, tensors`: its
  authors' way from processes to threads. SPDL's own decoder (spdl.io) needs FFmpeg's libraries and resizes by another
  filter.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peers.image_loaders import PREFETCH_FACTOR, Crops, RandomCropPipeline
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from mvp_fast.config.schema import DataConfig
from mvp_fast.samples.index import Index

MANY = 10**9  # samples: no passage comes to its end


@dataclass
class Passage:
    """A passage under way.

    Attributes:
        batches: image tensors, (B, C, H, W) or (B, H, W, C).
        ahead: how many may lie ready.
        close: ends it.
    """

    batches: Iterator[Tensor]
    ahead: int
    close: Callable[[], None]


def data_loader(index: Index, data: DataConfig, batch_size: int, workers: int, *, tensors: bool) -> Passage:
    """PyTorch's DataLoader with a process a core, in random order."""
    crops = Crops(index, MANY, data, tensors)
    sampler = RandomSampler(crops, replacement=True, num_samples=MANY)  # draws as it goes
    loader: DataLoader[Tensor] = DataLoader(
        crops, batch_size, sampler=sampler, num_workers=workers, prefetch_factor=PREFETCH_FACTOR
    )
    batches: Any = iter(loader)
    return Passage(batches, PREFETCH_FACTOR * workers, batches._shutdown_workers)


def dali(index: Index, data: DataConfig, batch_size: int, threads: int, device: str = "cpu") -> Passage:
    """DALI's own random crop."""
    pipeline = RandomCropPipeline(index, batch_size, data, threads, "cpu" if device == "cpu" else "mixed")
    return Passage(iter(pipeline), 4, pipeline.close)


def has_spdl() -> bool:
    """Whether SPDL's pipeline is installed."""
    try:
        return importlib.util.find_spec("spdl.pipeline") is not None
    except ModuleNotFoundError:
        return False


def spdl(index: Index, data: DataConfig, batch_size: int, threads: int) -> Passage:
    """SPDL's pipeline: a thread a core reads, decodes and transforms an image at a time; batches are stacked beside."""
    from spdl.pipeline import PipelineBuilder

    crops = Crops(index, MANY, data, tensors=True)
    order = iter(RandomSampler(crops, replacement=True, num_samples=MANY))
    builder = (
        PipelineBuilder()
        .add_source(order)
        .pipe(crops.__getitem__, concurrency=threads)
        .aggregate(batch_size)
        .pipe(torch.stack)
        .add_sink(2)
    )
    pipeline: Any = builder.build(num_threads=threads + 1)
    pipeline.start()
    return Passage(iter(pipeline), 10, pipeline.stop)  # each stage has a queue of its own


def all_passages(
    index: Index, data: DataConfig, batch_size: int, threads: int, device: str = "cpu"
) -> dict[str, Callable[[], Passage]]:
    """By name, how to start each peer; SPDL where it is installed."""
    found: dict[str, Callable[[], Passage]] = {
        "DataLoader, Pillow": lambda: data_loader(index, data, batch_size, threads, tensors=False),
        "DataLoader, tensors": lambda: data_loader(index, data, batch_size, threads, tensors=True),
        "DALI random crop": lambda: dali(index, data, batch_size, threads, device),
    }
    if has_spdl():
        found["SPDL, tensors"] = lambda: spdl(index, data, batch_size, threads)
    return found
