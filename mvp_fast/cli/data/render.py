"""`mvp-fast data render INDEX`: one batch of the plan as the student sees it, to look at and to compute with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.config.schema import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from mvp_fast.loaders.base import Batch
    from mvp_fast.samples.plan import SamplePlan

CAPTION_HEIGHT = 14
GAP = 4
SHADE, GREY = 0.25, 40
"""The share of its own colour that a masked patch keeps on the sheet, and the dark grey that makes up the rest."""


@dataclass(frozen=True)
class RenderOptions:
    """Carry out one step of the plan and write it as sheet.png (a contact sheet; masked patches are shaded) and
    batch.npz (images, keys, boxes, flips and masks)."""

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """The Parquet index, or the folder that holds it as index.parquet."""
    out: str
    """Folder to write to; made where it is missing."""
    loader: Literal["dali", "cpu", "torchvision", "ffcv", "synthetic"] = "torchvision"
    """The backend that carries it out."""
    step: int = 0
    """Step of the plan."""
    batch_size: int = 16
    """Global batch size of the plan."""
    seed: int | None = None
    """In place of the configuration's seed (0 by default)."""
    config: str = ""
    """A YAML configuration, for its crops, masks, filter and seed; the defaults where this is empty."""


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit code."""
    options = parse(RenderOptions, argv, "data render")
    render(options)
    return 0


def render(options: RenderOptions) -> tuple[Path, Path]:
    """Write sheet.png and batch.npz and say so.

    Returns:
        Their paths.

    Raises:
        ConfigError, DataError, EnvironmentProblem: as the index, the plan and the loader do.
    """
    from mvp_fast.errors import ConfigError, EnvironmentProblem

    if options.step < 0:
        raise ConfigError("Steps count from 0", where=f"--step {options.step}")
    config = _config(options)
    plan, batch = _carry_out(options, config)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        sheet, arrays = out / "sheet.png", out / "batch.npz"
        contact_sheet(plan, batch).save(sheet)
        _save_arrays(arrays, plan, batch)
    except OSError as error:
        raise EnvironmentProblem(
            f"The batch cannot be written: {error.strerror}", where=str(out), fix="Choose another --out"
        ) from error
    print(f"step {options.step}, {len(batch.rows)} images by {options.loader}: {sheet} and {arrays}")
    return sheet, arrays


def _config(options: RenderOptions) -> Config:
    from mvp_fast.config.load import load_config

    config = load_config(options.config) if options.config else Config()
    return config if options.seed is None else replace(config, seed=options.seed)


def _carry_out(options: RenderOptions, config: Config) -> tuple[SamplePlan, Batch]:
    """The plan and the batch that the loader makes of its step."""
    from mvp_fast.loaders.registry import make_loader
    from mvp_fast.samples.index import Index
    from mvp_fast.samples.plan import SamplePlan

    plan = SamplePlan(
        Index.open(options.index),
        seed=config.seed,
        batch_size=options.batch_size,
        data=config.data,
        mask=config.mask,
    )
    loader = make_loader(options.loader, config.data, seed=config.seed)
    try:
        batch = next(iter(loader.batches(plan, options.step)))
    finally:
        loader.close()
    if loader.bad_samples:
        print(f"bad samples met and replaced: {loader.bad_samples}; batch.npz has the keys of their stand-ins")
    return plan, batch


def _save_arrays(path: Path, plan: SamplePlan, batch: Batch) -> None:
    """batch.npz: images (B, H, W, 3) uint8, keys (B,), box (B, 4) x y width height, flip (B,), mask (B, N), labels."""
    import numpy as np

    rows = batch.rows
    np.savez_compressed(
        path,
        images=batch.images_BHWC.numpy(),
        keys=np.array(keys_of(plan, batch)),
        sample=rows.sample_B,
        label=plan.index.label[rows.sample_B],
        box=np.stack([rows.x_B, rows.y_B, rows.width_B, rows.height_B], axis=1),
        flip=rows.flip_B,
        mask=rows.mask_BN,
        epoch=rows.epoch_B,
        position=rows.position_B,
        attempt=rows.attempt_B,
    )


def keys_of(plan: SamplePlan, batch: Batch) -> list[str]:
    """The keys of a batch's samples, stand-ins included."""
    return [plan.index.key(int(sample)) for sample in batch.rows.sample_B]


def shade(images_BHWC: NDArray[np.uint8], mask_BN: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The images with their masked patches darkened; the others stay as they are."""
    import numpy as np

    rows, columns = grid
    _, height, width, _ = images_BHWC.shape
    mask_Bhw = mask_BN.reshape(-1, rows, columns)
    mask_BHW1 = mask_Bhw.repeat(height // rows, axis=1).repeat(width // columns, axis=2)[..., None]
    shaded_BHWC = (images_BHWC * SHADE + GREY * (1 - SHADE)).astype(np.uint8)
    return np.where(mask_BHW1, shaded_BHWC, images_BHWC)


def contact_sheet(plan: SamplePlan, batch: Batch) -> Image.Image:
    """All images of a batch in a near-square grid, each with its key under it."""
    from PIL import Image, ImageDraw, ImageFont

    images_BHWC = shade(batch.images_BHWC.numpy(), batch.rows.mask_BN, plan.grid)
    count, side = len(images_BHWC), plan.image_size
    columns = int(count**0.5 + 0.999)
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, lines * (side + CAPTION_HEIGHT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, key in enumerate(keys_of(plan, batch)):
        x, y = tile_corner(i, columns, side)
        sheet.paste(Image.fromarray(images_BHWC[i]), (x, y))
        draw.text((x, y + side + 1), _fit(key, side, font), fill="black", font=font)
    return sheet


def tile_corner(i: int, columns: int, side: int) -> tuple[int, int]:
    """Where image `i` of the sheet begins: x, y."""
    return GAP + i % columns * (side + GAP), GAP + i // columns * (side + CAPTION_HEIGHT + GAP)


def _fit(key: str, width: int, font: Any) -> str:
    """The end of a key, as much as fits into `width` pixels: names differ at their ends."""
    text = key
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text
