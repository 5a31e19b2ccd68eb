"""What every loader promises: the `Loader` protocol, the `Batch` it yields and the `StageStats` it keeps.

Shape legend: B images of this rank's batch, H and W pixels, C channels, N patches, M masked patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mvp_fast.samples.plan import PlanRows, SamplePlan


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: what the plan asked for, carried out.

    Attributes:
        step: the step of the plan that this batch carries out.
        images_BHWC: uint8 RGB crops, channels last, on the loader's output device.
        masked_BM: int64 patch numbers in the mask, ascending, row-major over the patch grid, without the CLS token.
        rows: the plan's rows as carried out; where a sample was bad, its stand-in's row.
        target: what a loader around another adds for its task, such as the classes of the pixels; first dimension B.
    """

    step: int
    images_BHWC: torch.Tensor
    masked_BM: torch.Tensor
    rows: PlanRows
    target: torch.Tensor | None = None


@dataclass
class StageStats:
    """Seconds spent and items handled in each stage since the loader was made.

    - read: waiting for the bytes of a sample, wall time; several threads read at once.
    - decode, transform: processor time, summed over the loader's threads, so that items / seconds is a rate a core.
    - copy: pinning a batch and handing it to the device's copy engine, wall time; none where it stays in place.

    A backend that cannot tell two stages apart books both under the first of them, and no items under the second.
    Booked by the thread that iterates; read it from there or for orientation.
    """

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "decode", "transform", "copy"), 0.0)
    )
    items: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "transform", "copy"), 0))

    def add(self, stage: str, seconds: float, items: int) -> None:
        """Book `items` handled in `seconds` under `stage`."""
        self.seconds[stage] += seconds
        self.items[stage] += items


class Loader(Protocol):
    """Carries out a plan. Stateless but for its position: the same plan and step give the same batches."""

    @property
    def bad_samples(self) -> int:
        """How many samples were bad so far; each was replaced by a stand-in."""
        ...

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step, start_step + 1, ... without end.

        Closing the generator early (or `close`) gives back its threads and memory.

        Raises:
            DataError: more samples were bad than the budget allows, or the files no longer fit the index.
        """
        ...

    def stats(self) -> StageStats:
        """Where the time went so far."""
        ...

    def close(self) -> None:
        """Give back threads, graphs and memory; may be called twice, and after an early break."""
        ...
