"""From maps to sheets: what stands in each row and column of a picture.

Shape legend: B images, H and W pixels, C colours, H heads (behind B alone), K chosen patches, T texts, M patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mvp_fast.evaluate.visualize.draw import (
    Picture,
    Scale,
    Sheet,
    Tile,
    cells,
    colour,
    enlarge,
    label_colour,
    lay_over,
    mark,
    tile_side,
)
from mvp_fast.evaluate.visualize.images import Shown
from mvp_fast.evaluate.visualize.pca import Components
from mvp_fast.evaluate.visualize.similarity import Patch

Map = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Canvas:
    """The images at the size they are shown.

    Attributes:
        tiles_BHWC: uint8.
        names: captions of the images.
        grid: patches down and across.
        about: the network, for the second line.
    """

    tiles_BHWC: list[Picture]
    names: list[str]
    grid: tuple[int, int]
    about: str

    @classmethod
    def of(cls, shown: Shown, grid: tuple[int, int], about: str) -> Canvas:
        """The canvas of some images."""
        tiles = [enlarge(image_HWC, tile_side(grid)) for image_HWC in shown.images_BHWC.numpy()]
        return cls(tiles, [str(PurePath(name).with_suffix("")) for name in shown.names], grid, about)

    def image(self, number: int) -> Tile:
        """The image itself."""
        return Tile(self.tiles_BHWC[number], self.names[number])

    def over(self, number: int, value_M: Map, name: str) -> Picture:
        """A map, values in [0, 1], over an image."""
        return lay_over(self.tiles_BHWC[number], colour(value_M.reshape(self.grid), name))


def attention_sheet(canvas: Canvas, attention_BHM: Tensor, block: int, depth: int) -> Sheet:
    """CLS's attention to the patches: mean over heads, then each head; every tile from 0 to its own maximum."""
    attention = attention_BHM.double().cpu().numpy()
    rows = []
    for number, heads_HM in enumerate(attention):
        maps = [heads_HM.mean(0), *heads_HM]
        tiles = [
            Tile(
                canvas.over(number, one_M / max(float(one_M.max()), 1e-12), "inferno"),
                f"to {one_M.max():.3f}, sum {one_M.sum():.2f}",
            )
            for one_M in maps
        ]
        rows.append([canvas.image(number), *tiles])
    heads = [f"head {number}" for number in range(attention.shape[1])]
    title = f"Attention of CLS to the patches, block {block} of 0 to {depth - 1}"
    even = 1 / attention.shape[2]
    about = (
        f"{canvas.about}. Each tile goes from 0 (black) to its own maximum, below it beside the patches' sum;"
        f" spread evenly, each patch had {even:.3f}."
    )
    return Sheet(title, about, ["image", "mean of heads", *heads], rows)


def pca_sheet(canvas: Canvas, found: Components, block: int, depth: int) -> Sheet:
    """The components as colours, beside each component alone."""
    colours_BM3 = found.colour_BM3.cpu().numpy()
    side = tile_side(canvas.grid)
    rows = []
    for number, (colours_M3, front_M) in enumerate(zip(colours_BM3, found.foreground_BM.cpu().numpy(), strict=True)):
        front_YX1 = front_M.reshape(*canvas.grid, 1)
        together_YXC = np.rint(255 * colours_M3).astype(np.uint8).reshape(*canvas.grid, 3)
        alone = [
            Tile(cells(colour(colours_M3[:, k].reshape(canvas.grid), "viridis") * front_YX1, side))
            for k in range(colours_M3.shape[1])
        ]
        rows.append([canvas.image(number), Tile(cells(together_YXC, side)), *alone])
    shares = [100 * float(share) for share in found.explained_K]
    heads = [f"component {k + 1} ({share:.0f} %)" for k, share in enumerate(shares)]
    title = f"Principal components of patch features, block {block} of 0 to {depth - 1}"
    words = "Fitted on all images together; per cent of the variance in brackets."
    if not bool(found.foreground_BM.all()):
        words = "Fitted on the foreground of all images together; per cent of its variance in brackets."
    return Sheet(title, f"{canvas.about}. {words}", ["image", "as red, green, blue", *heads], rows)


def similarity_sheet(canvas: Canvas, map_BKM: Tensor, patches: list[Patch], block: int, depth: int) -> Sheet:
    """Cosines with the chosen patches, one scale for all."""
    cosine_BKM = map_BKM.cpu().numpy()
    low = float(cosine_BKM.min())
    rows = []
    for number, maps_KM in enumerate(cosine_BKM):
        tiles = [canvas.image(number)]
        for patch, map_M in zip(patches, maps_KM, strict=True):
            over = canvas.over(number, (map_M - low) / max(1 - low, 1e-12), "viridis")
            mean = np.delete(map_M, patch.row * canvas.grid[1] + patch.column).mean() if len(map_M) > 1 else 1.0
            tiles.append(Tile(mark(over, *patch, canvas.grid), f"mean of the others {mean:.2f}"))
        rows.append(tiles)
    heads = [f"to row {patch.row}, column {patch.column}" for patch in patches]
    title = f"Similarity of the framed patch to all patches, block {block} of 0 to {depth - 1}"
    scale = Scale("viridis", low, 1.0, "cosine of features")
    return Sheet(title, canvas.about, ["image", *heads], rows, scale)


def text_sheet(canvas: Canvas, map_BTM: Tensor, texts: list[str], whose: str) -> Sheet:
    """Cosines with the texts, one scale for all; with several texts also which is nearest to each patch.

    Args:
        whose: feature it is: "predicted by the student" or "of the teacher".
    """
    cosine_BTM = map_BTM.double().cpu().numpy()
    low, high = float(cosine_BTM.min()), float(cosine_BTM.max())
    labels = [(label_colour(number), text) for number, text in enumerate(texts)] if len(texts) > 1 else []
    rows = []
    for number, maps_TM in enumerate(cosine_BTM):
        tiles = [canvas.image(number)]
        for map_M in maps_TM:
            over = canvas.over(number, (map_M - low) / max(high - low, 1e-12), "viridis")
            tiles.append(Tile(over, f"{map_M.min():.3f} to {map_M.max():.3f}"))
        if labels:
            nearest_M = maps_TM.argmax(0)
            table = np.array([ink for ink, _ in labels], dtype=np.uint8)
            over = lay_over(canvas.tiles_BHWC[number], table[nearest_M].reshape(*canvas.grid, 3))
            tiles.append(Tile(over, _commonest(nearest_M, texts)))
        rows.append(tiles)
    heads = ["image", *(f"“{text}”" for text in texts), *(["nearest text"] if labels else [])]
    scale = Scale("viridis", low, high, "cosine with the text")
    return Sheet(f"Patches near to a text: features {whose}", canvas.about, heads, rows, scale, labels)


def _commonest(nearest_M: npt.NDArray[np.int64], texts: list[str]) -> str:
    count_T = np.bincount(nearest_M, minlength=len(texts))
    return f"{100 * count_T.max() / count_T.sum():.0f} % {texts[int(count_T.argmax())]}"
