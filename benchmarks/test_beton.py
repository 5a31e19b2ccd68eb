"""Images a second from a .beton to uint8 crops: our plan on FFCV's C functions against FFCV's own loader.

Both read the same file from the page cache, use all cores, and resize with the same filter of the same library. Rounds
are timed in the steady state (see test_loaders.py). Before anything is timed, ours must have the pixels of an area
filter on the plan's boxes, and FFCV's crops the same colours and sharpness on average.

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Session, compare
from peers.commands import write_beton
from PIL import Image
from recorder import cores
from test_loaders import BATCH, CHECKED, ROUNDS, WARM_UP, Steady, check_peer, crops, rate

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan

pytestmark = [
    pytest.mark.timeout(900),  # also on a busy machine
    # numba's, when the code that FFCV's loader compiled is thrown away
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def stored(index: Index, sample: int) -> np.ndarray:
    """The pixels of a sample as they lie in the beton, a JPEG decoded by Pillow: uint8 (H, W, 3)."""
    width, height, offset = (int(column[sample]) for column in (index.width, index.height, index.offset))
    with open(index.file(sample), "rb") as file:
        file.seek(offset)
        data = file.read(int(index.length[sample]))
    if len(data) == 3 * width * height:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check_ours(loader: Any, plan: SamplePlan) -> None:
    """The plan's samples, and the pixels of an area filter on its boxes."""
    import cv2

    batches = loader.batches(plan, 5)
    batch = next(batches)
    batches.close()
    rows, size = batch.rows, (plan.image_size, plan.image_size)
    np.testing.assert_array_equal(rows.sample_B, plan.step(5).sample_B)
    for i, sample in enumerate(rows.sample_B.tolist()):
        x, y, width, height = (int(column[i]) for column in (rows.x_B, rows.y_B, rows.width_B, rows.height_B))
        box_HWC = np.ascontiguousarray(stored(plan.index, sample)[y : y + height, x : x + width])
        expected_HWC = cv2.resize(box_HWC, size, interpolation=cv2.INTER_AREA)
        expected_HWC = expected_HWC[:, ::-1] if rows.flip_B[i] else expected_HWC
        assert np.abs(batch.images_BHWC[i].numpy().astype(int) - expected_HWC).mean() < 2, f"row {i}'s pixels"


@pytest.mark.parametrize(("mode", "side"), [("raw", 256), ("jpeg", 500)])
def test_images_a_second_and_core_from_a_beton(
    benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path, mode: str, side: int
) -> None:
    """A beton (raw 256 px, JPEG 500 px) to crops of 224 px, area filter, all cores."""
    pytest.importorskip("ffcv", reason="FFCV is not installed: make install says why", exc_type=ImportError)
    index, data = Index.open(write_beton(imagenet_scenes, tmp_path, mode, side)), DataConfig(interpolation="area")
    a_core = {"raw": 64, "jpeg": 8}[mode]
    count, warm_up = (2, 1) if session.quick else (a_core * cores(), WARM_UP)
    plan = SamplePlan(index, seed=0, batch_size=BATCH, data=data, mask=MaskConfig())
    loader = make_loader("ffcv", data)
    ours = Steady(lambda: loader.batches(plan, 0), lambda passage: passage.close(), count)
    peers = {}
    if not session.turns:
        from peers.ffcv_loader import FfcvPassages

        longest = max(warm_up + count, CHECKED // BATCH)
        passages = FfcvPassages(index.file(0), len(index), data, batch_size=BATCH, batches=longest, workers=cores())
        peers = {"FFCV's loader": Steady(passages.start, passages.end, count).variant(warm_up)}

    def check() -> None:
        check_ours(loader, plan)
        if peers:
            passage = ours.start()
            ours_BHWC = crops(passage, BATCH, lambda batch: batch.images_BHWC)
            ours.stop(passage)
            theirs = passages.start()
            # FFCV writes over a batch when the next but a few is made
            check_peer("FFCV's loader", crops(theirs, BATCH, lambda images_BHWC: images_BHWC.clone()), ours_BHWC)
            passages.end(theirs)

    compare(
        benchmark,
        session,
        ours=ours.variant(warm_up),
        peers=peers,
        check=check,
        items=count * BATCH,
        unit="images a core",
        rounds=ROUNDS,
        per=cores(),
        extra=lambda: {
            "images_a_cpu_second": {stage: rate(loader.stats(), stage) for stage in ("decode", "transform")}
        },
    )
    loader.close()
