"""One judgement of image files: what `data index --verify` passes the loaders accept, and the reverse."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.encoded_image import BrokenImageError, judge
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan


def encode(kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    noise_HWC = np.random.default_rng(4).integers(0, 256, (14, 18, 3), dtype=np.uint8)
    image = Image.fromarray(noise_HWC).resize((90, 70), Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


BASELINE = encode(quality=90)
PROGRESSIVE = encode(quality=90, progressive=True)
THUMBNAIL = encode(quality=30)
# An EXIF thumbnail is a JPEG with an end-of-image marker of its own, before the scan.
WITH_THUMBNAIL = BASELINE[:2] + b"\xff\xe1" + (len(THUMBNAIL) + 2).to_bytes(2, "big") + THUMBNAIL + BASELINE[2:]


def sixteen_bit_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray((np.arange(90 * 70, dtype=np.uint16) * 10).reshape(70, 90)).save(stream, "PNG")
    return stream.getvalue()


GOOD: dict[str, bytes] = {
    "baseline.jpg": BASELINE,
    "progressive.jpg": PROGRESSIVE,
    "trailing garbage.jpg": BASELINE + bytes(range(256)) * 9,
    "trailing zeros.jpg": BASELINE + bytes(3000),
    "thumbnail.jpg": WITH_THUMBNAIL,
    "cmyk.jpg": encode(mode="CMYK"),
    "grey.jpg": encode(mode="L"),
    "png named.jpg": encode("PNG"),
    "jpeg named.png": BASELINE,
    "alpha.png": encode("PNG", mode="RGBA"),
    "palette.png": encode("PNG", mode="P"),
    "sixteen bits.png": sixteen_bit_png(),
    "whole.webp": encode("WEBP"),
    "whole.gif": encode("GIF", mode="P"),
    "whole.bmp": encode("BMP"),
}
BAD: dict[str, bytes] = {
    "text.jpg": b"lorem ipsum " * 40,
    "zeros.jpg": bytes(4000),
    "empty.jpg": b"",
    "two bytes.jpg": b"\xff\xd8",
    "cut thumbnail.jpg": WITH_THUMBNAIL[:-400],
    "padded thumbnail.jpg": WITH_THUMBNAIL[:-400] + bytes(400),
    "cut named.jpg": encode("PNG")[:-900],
    "damaged tables.jpg": BASELINE[: BASELINE.index(b"\xff\xc4") + 5] + b"\xff" * 16 + BASELINE[600:],
    **{
        f"{name} {pad} {cut}.jpg": (data[: int(len(data) * cut)]).ljust(len(data), b"\0") if pad else data[:end]
        for name, data in (("baseline", BASELINE), ("progressive", PROGRESSIVE))
        for pad in ("", "padded")
        for cut in (0.1, 0.35, 0.5, 0.75, 0.99)
        for end in (int(len(data) * cut),)
    },
    **{f"no end {n}.jpg": BASELINE[:-n] + bytes(n) for n in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, data in {**GOOD, **BAD}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def passed(corpus: Path) -> set[str]:
    """What --verify lets through; its index lies elsewhere."""
    out = corpus.parent / f"{corpus.name}-verified" / "index.parquet"
    out.parent.mkdir()
    build_index(corpus, out, verify=True, workers=1)
    index = Index.open(out)
    return {index.key(i) for i in range(len(index))}


def test_verify_tells_good_from_bad(passed: set[str]) -> None:
    assert passed == set(GOOD)


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_loaders_accept_what_verify_passes_and_nothing_else(
    corpus: Path, passed: set[str], tmp_path: Path, name: str
) -> None:
    report = build_index(corpus, tmp_path / "index.parquet", workers=1)
    index = Index.open(report.path)
    met = {index.key(i) for i in range(len(index))}
    assert passed < met, "headers alone hide some of the damage"
    assert {entry.path for entry in report.bad} <= set(BAD)
    data = DataConfig(image_size=48, threads=2, bad_sample_budget=1.0)
    plan = SamplePlan(index, seed=1, batch_size=4, data=data, mask=MaskConfig(patches=3, min_block=1))
    loader: Any = make_loader(name, data)
    try:
        for batch in islice(loader.batches(plan, 0), -(-len(index) // 4)):
            assert {index.key(int(sample)) for sample in batch.rows.sample_B} <= passed
        assert set(loader.failures.failures) == met - passed
    finally:
        loader.close()


def test_every_prefix_of_a_jpeg_is_cut_short() -> None:
    for data in (BASELINE, PROGRESSIVE):
        assert judge(data) == (90, 70)
        for end in range(2, len(data) - 1, 37):
            for cut in (data[:end], data[:end].ljust(len(data), b"\0")):
                with pytest.raises(BrokenImageError, match="cut short"):
                    judge(cut)
