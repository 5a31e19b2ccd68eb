"""One passage over a labelled or unlabelled set: batches of centre crops on the device, each sample once.

Shape legend: B images, H and W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mvp_fast.config.schema import DataConfig
from mvp_fast.loaders.prefetch import Prefetcher
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.centre import CentrePlan


class Crops(NamedTuple):
    """A batch without what does not count.

    Attributes:
        images_BHWC: uint8, on the device.
        sample_B: int64, rows of the plan's index; ascending over a passage. A sample that did not decode is left out.
    """

    images_BHWC: Tensor
    sample_B: npt.NDArray[np.int64]


def passage(
    plan: CentrePlan,
    data: DataConfig,
    device: torch.device,
    *,
    start_step: int = 0,
    local_ranks: int = 1,
    ledger: Path | None = None,
) -> Generator[Crops, None, None]:
    """Yield the centre crops of the plan's samples from batch `start_step` on, by the loader that `data` names.

    Args:
        data: loader, decode, threads, prefetch, interpolation and the budget for bad samples are used.
        ledger: JSON-lines file for samples that did not decode.

    Raises:
        DataError: more samples were bad than the budget allows, or the files no longer fit the index.
    """
    loader = make_loader(data.loader, data, local_ranks=local_ranks, ledger=ledger, device=device)
    with closing(loader), Prefetcher(loader, plan, start_step, device, data.prefetch) as prefetcher:
        for batch in prefetcher:
            counted_B = plan.counted(batch.rows)
            images_BHWC = batch.images_BHWC
            if not counted_B.all():
                images_BHWC = images_BHWC[torch.from_numpy(np.flatnonzero(counted_B)).to(device)]
            if counted_B.any():
                yield Crops(images_BHWC, batch.rows.sample_B[counted_B])
            if batch.step + 1 >= plan.steps:
                return
