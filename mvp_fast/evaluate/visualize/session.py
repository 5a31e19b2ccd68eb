"""`mvp-fast visualize` from its settings to its files.

Shape legend: B images, H and W pixels, C colours, M patches, D channels, T texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mvp_fast.config.schema import DataConfig, TrainConfig
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.results import write_results
from mvp_fast.evaluate.visualize import sheets, truth
from mvp_fast.evaluate.visualize.attention import block_number, look, patch_attention
from mvp_fast.evaluate.visualize.draw import Sheet, draw_sheet, save
from mvp_fast.evaluate.visualize.images import BATCH, Shown, choose, from_files, from_index
from mvp_fast.evaluate.visualize.pca import colours
from mvp_fast.evaluate.visualize.similarity import Patch, find_patch, similarity, usual_patches
from mvp_fast.evaluate.visualize.text import TextSide, check_run, load_text_side, student_map, teacher_map
from mvp_fast.samples.index import Index
from mvp_fast.samples.probe import EXTENSIONS
from mvp_fast.train.checkpoint import find_checkpoint, read_state
from mvp_fast.train.distributed import choose_device

PICTURES = ("attention", "pca", "similarity", "text")
RESULTS = "results.json"
MapMaker = Callable[[TextSide, Tensor], Tensor]
"""Images on the device to a map (B, T, M)."""


@dataclass(frozen=True)
class Settings:
    """What is to be drawn; `mvp_fast.cli.visualize` says what each is."""

    source: BackboneSource
    data: tuple[str, ...]
    out: Path
    images: int = 8
    seed: int = 0
    texts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    clip_weights: Path | None = None
    with_teacher: bool = False
    score_images: int = 0
    patches: tuple[str, ...] = ()
    block: int = -1
    foreground: float | None = None
    pictures: tuple[str, ...] = PICTURES
    crop_share: float = 1.0
    loader: str = "auto"
    threads: int = 0
    device: str = "auto"


@dataclass
class Drawn:
    """What came of it.

    Attributes:
        paths: of the pictures, in their order.
        results: as in results.json.
        remarks: for people: what was left out, and why.
    """

    paths: list[Path] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """What all pictures are made from."""

    settings: Settings
    backbone: Backbone
    block: int
    shown: Shown
    index: Index | None
    canvas: sheets.Canvas
    device: torch.device


def visualize(settings: Settings) -> Drawn:
    """Draw the pictures and write results.json beside them.

    Raises:
        ConfigError, DataError, EnvironmentProblem: as the network, the images and the CLIP do.
    """
    _check(settings)
    device = choose_device(TrainConfig(device=settings.device))  # type: ignore[arg-type]
    backbone = load_backbone(settings.source)
    if settings.texts:
        check_run(backbone.step is not None, settings.source.name)
    block = block_number(settings.block, backbone.depth)
    places = [find_patch(words, backbone.grid, backbone.patch_size) for words in settings.patches]
    shown, index = _images(settings, backbone, device)
    side = None
    if settings.texts:
        side = load_text_side(settings.source, settings.texts, settings.templates, settings.clip_weights, device)

    canvas = sheets.Canvas.of(shown, backbone.grid, backbone.words)
    job = _Job(settings, backbone.to(device), block, shown, index, canvas, device)
    drawn = Drawn(results=_about(job))
    if lost := drawn.results["data"]["not_decoded"]:
        drawn.remarks.append(f"{lost} of the chosen images did not decode and are left out")
    _draw_features(job, drawn, places or usual_patches(backbone.grid))
    if side is not None:
        _draw_texts(job, drawn, side)
    drawn.results["pictures"] = [path.name for path in drawn.paths]
    write_results(settings.out / RESULTS, "visualize", drawn.results)
    return drawn


def plain(tokens_BMD: Tensor) -> Tensor:
    """Tokens of a block, each scaled to mean 0 and variance 1 over its channels: the final norm without its weights.

    Without it a few loud tokens, which trained transformers have, decide the components alone.
    """
    return F.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:])


def _check(settings: Settings) -> None:
    if settings.images < 1:
        raise ConfigError(f"{settings.images} images can't be shown", where="--images", fix="Ask for 1 or more")
    if settings.score_images < 0:
        raise ConfigError(f"{settings.score_images} is no number of images", where="--score-images")
    if settings.foreground is not None and not 0 < settings.foreground < 1:
        raise ConfigError(
            f"The threshold of the foreground is {settings.foreground}, but must be in (0, 1)", where="--foreground"
        )
    for text in settings.texts:
        if not text.strip():
            raise ConfigError("A text is empty", where="--text", fix='Give words, such as --text "a red square"')
    if not settings.texts and (settings.with_teacher or settings.score_images or settings.pictures == ("text",)):
        raise ConfigError(
            "Maps and figures of texts are asked for, and no text",
            where="--with-teacher, --score-images, --pictures text",
            fix='Give one, such as --text "a red square"',
        )
    if settings.texts and not settings.templates:
        raise ConfigError("There is no sentence to put the texts into", where="--template", fix="Leave it out")


def _images(settings: Settings, backbone: Backbone, device: torch.device) -> tuple[Shown, Index | None]:
    """What is shown, and the index it is from."""
    data = settings.data
    if not data and backbone.step is not None:
        state = read_state(find_checkpoint(Path(settings.source.name).expanduser(), settings.source.checkpoint))
        data = (str(state["config"]["data"]["index"]),)
    files = [Path(name).expanduser() for name in data]
    if not files or not data[0]:
        raise ConfigError("There is nothing to look at", where="--data", fix="Give an index, or image files")
    if len(files) == 1 and (files[0].is_dir() or files[0].suffix.lower() not in EXTENSIONS):
        index = Index.open(files[0])
        return _some_of(settings, index, settings.images, backbone, device), index
    if folder := next((str(file) for file in files if file.is_dir()), ""):
        raise ConfigError(
            "One index or image files can be shown, not a folder among others",
            where=f"--data {folder}",
            fix="Give one index, or files",
        )
    return from_files(data, backbone.image_size, settings.crop_share), None


def _some_of(settings: Settings, index: Index, images: int, backbone: Backbone, device: torch.device) -> Shown:
    """Some images of an index."""
    if index.is_synthetic:
        raise DataError("A synthetic index has no images", where="--data")
    data = DataConfig(
        loader=settings.loader,  # type: ignore[arg-type]
        image_size=backbone.image_size,
        threads=settings.threads,
        bad_sample_budget=1.0,  # they are left out, and told
    )
    rows = choose(index, images, settings.seed)
    return from_index(index, rows, data, backbone.patch_size, settings.crop_share, device)


def _about(job: _Job) -> dict[str, Any]:
    """The part of results.json that says what was looked at."""
    settings, backbone, index, names = job.settings, job.backbone, job.index, job.shown.names
    return {
        "backbone": {"words": backbone.words, "fingerprint": backbone.fingerprint, "step": backbone.step},
        "data": {
            "index": None if index is None else {"fingerprint": index.fingerprint(), "images": len(index)},
            "images": names,
            "not_decoded": 0 if index is None else min(settings.images, len(index)) - len(names),
        },
        "settings": {
            "seed": settings.seed,
            "block": job.block,
            "depth": backbone.depth,
            "grid": list(backbone.grid),
            "image_size": backbone.image_size,
            "crop_share": settings.crop_share,
            "foreground": settings.foreground,
        },
    }


def _draw_features(job: _Job, drawn: Drawn, places: list[Patch]) -> None:
    """The pictures that need no text."""
    wanted, grid, depth = job.settings.pictures, job.backbone.grid, job.backbone.depth
    if not set(wanted) - {"text"}:
        return
    features_BMD, attention_BHM = _seen(job, "attention" in wanted)
    if attention_BHM is not None:
        _put(job, drawn, "attention", sheets.attention_sheet(job.canvas, attention_BHM, job.block, depth))
        on_patches = float(attention_BHM.sum(-1).mean())
        drawn.results["attention"] = {"heads": attention_BHM.shape[1], "on_patches": on_patches}
    elif "attention" in wanted:
        drawn.remarks.append("no attention.png: the network has no CLS token")
    if "pca" in wanted:
        found = colours(features_BMD, grid, job.settings.foreground)
        _put(job, drawn, "pca", sheets.pca_sheet(job.canvas, found, job.block, depth))
        shown = float(found.foreground_BM.double().mean())
        drawn.results["pca"] = {"explained": found.explained_K.tolist(), "foreground": shown}
    if "similarity" in wanted:
        map_BKM = similarity(features_BMD, places, grid)
        _put(job, drawn, "similarity", sheets.similarity_sheet(job.canvas, map_BKM, places, job.block, depth))
        drawn.results["similarity"] = {"patches": [list(place) for place in places], "least": float(map_BKM.min())}


@torch.no_grad()
def _seen(job: _Job, attention: bool) -> tuple[Tensor, Tensor | None]:
    """The features of the block, `plain`, and the attention of its CLS to the patches, of all images: on the CPU."""
    features, weights = [], []
    for images_BHWC in _batches(job.shown, job.device, "features"):
        seen = look(job.backbone, images_BHWC, job.block, attention)
        patches_BMD = seen.tokens[job.block].patches_BND
        features.append(plain(patches_BMD).cpu())
        if seen.attention_BHN is not None:
            weights.append(patch_attention(seen.attention_BHN, patches_BMD.shape[1]).cpu())
    return torch.cat(features), torch.cat(weights) if weights else None


def _draw_texts(job: _Job, drawn: Drawn, side: TextSide) -> None:
    """The pictures of texts, and the figures where there are masks."""
    settings, texts = job.settings, list(job.settings.texts)
    makers: dict[str, tuple[str, MapMaker]] = {"text": ("predicted by the student", student_map)}
    if settings.with_teacher:
        makers["text-teacher"] = ("of the teacher", teacher_map)
    words = {} if job.index is None else truth.legend(job.index)
    scored = job.shown
    if words and job.index is not None and settings.score_images:
        scored = _some_of(settings, job.index, settings.score_images, job.backbone, job.device)
    found: dict[str, Any] = {
        "teacher_fingerprint": side.teacher.fingerprint,
        "weights": str(side.weights),
        "target_norm": side.target_norm,
        "templates": list(settings.templates),
    }
    for name, (whose, maker) in makers.items():
        map_BTM = _map(job, side, job.shown, maker)
        if "text" in settings.pictures:
            _put(job, drawn, name, sheets.text_sheet(job.canvas, map_BTM, texts, whose))
        ranges = [
            {"text": text, "low": float(map_BM.min()), "mean": float(map_BM.mean()), "high": float(map_BM.max())}
            for text, map_BM in zip(texts, map_BTM.unbind(1), strict=True)
        ]
        if words and scored is not job.shown:
            map_BTM = _map(job, side, scored, maker)
        found[name] = {"texts": ranges, "figures": truth.figures(map_BTM, scored, texts, words) if words else []}
    drawn.results["text"] = found
    if not words:
        drawn.remarks.append("no figures of the texts: the images have no masks with a legend (data scenes draws such)")


def _map(job: _Job, side: TextSide, shown: Shown, maker: MapMaker) -> Tensor:
    """A map of all images, on the CPU: (B, T, M)."""
    return torch.cat([maker(side, images_BHWC).cpu() for images_BHWC in _batches(shown, job.device, "texts")])


def _batches(shown: Shown, device: torch.device, words: str) -> Iterator[Tensor]:
    """The images in batches on the device, with a bar and the time left on a terminal."""
    console = Console(file=sys.stderr)
    parts = shown.images_BHWC.split(BATCH)
    for part in track(parts, words, console=console, disable=not console.is_terminal, transient=True):
        yield part.to(device)


def _put(job: _Job, drawn: Drawn, name: str, sheet: Sheet) -> None:
    path = job.settings.out / f"{name}.png"
    save(draw_sheet(sheet), path)
    drawn.paths.append(path)
