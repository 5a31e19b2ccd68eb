"""The evaluation at a run's end: figures into results.json, pictures into predictions/; it goes on after a kill.

    RUN/results.json               figures, settings, backbone
    RUN/predictions/<image>.png    image, truth and prediction side by side
    RUN/evaluation/*.npz           counts so far, one file a rank; gone when results.json is there

Shape legend: C classes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.segment import window_stride
from mvp_fast.errors import DataError, Preempted
from mvp_fast.evaluate.progress import progress
from mvp_fast.evaluate.results import read_results, write_results
from mvp_fast.evaluate.segment.judge import Sample
from mvp_fast.evaluate.segment.pictures import Painter
from mvp_fast.evaluate.segment.run import SegmentRun
from mvp_fast.evaluate.segment.scores import Confusion, Figures
from mvp_fast.models.teachers.base import fingerprint
from mvp_fast.train.sinks import open_sinks

RESULTS, PREDICTIONS, COUNTS = "results.json", "predictions", "evaluation"
KEPT_EVERY = 20.0
"""Seconds between counts that are kept."""


def finish(run: SegmentRun, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Judge a finished run's model on the whole set, going on where an earlier call was killed. Every rank calls this.

    Returns:
        The content of results.json, that of an earlier call where nothing has changed since.

    Raises:
        Preempted: it was stopped; what was counted so far is kept.
        DataError: an image or a mask can't be used.
    """
    run.agree_on_statistics()
    folder = Path(run.config.run.dir)
    identity = _identity(run)
    earlier = _earlier(folder / RESULTS, identity)
    if earlier is not None:
        return earlier
    confusion = Confusion(len(run.judged.legend), run.ranks.device)
    kept = _Kept(folder / COUNTS / f"rank{run.ranks.rank}-of-{run.ranks.world}.npz", identity)
    share, done = run.share(), kept.load(confusion)
    painter = Painter(run.judged, folder / PREDICTIONS, run.config.segment.predictions)
    if run.ranks.is_main:
        gone_on = f", {done:,} of them counted before" if done else ""
        print(f"judging   {len(share):,} images{gone_on}", flush=True)

    with progress("judging", len(share), done, console=Console(stderr=True, quiet=not run.ranks.is_main)) as tell:

        def seen(sample: Sample, predicted_HW: Tensor) -> None:
            nonlocal done
            painter.paint(sample, predicted_HW)
            done += 1
            kept.keep(confusion, done)
            tell(done)

        whole = run.judge()(run.trained, share[done:], confusion, stopped, seen)
    kept.keep(confusion, done, now=True)
    if run.ranks.agree(int(not whole)):
        raise Preempted(
            f"A signal came; the run is complete, and {done:,} of {len(share):,} images are judged",
            where=str(folder),
            fix="The same command with --resume auto goes on from there",
        )
    confusion.counts_CC = run.ranks.sum(confusion.counts_CC)
    content = _content(run, confusion.figures(), identity)
    if run.ranks.is_main:
        write_results(folder / RESULTS, "segment", content)
        _into_metrics(run, folder, content)
    run.ranks.barrier()
    if run.ranks.is_main:
        shutil.rmtree(folder / COUNTS, ignore_errors=True)
    return content


class _Kept:
    """Counts that outlive the process: beside, then renamed. Those of another model or set are not taken up."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity, self._last = path, identity, time.monotonic()

    def load(self, confusion: Confusion) -> int:
        """Put the counts that were kept into `confusion`; how many images they are of."""
        try:
            with np.load(self._path, allow_pickle=False) as found:
                counts_CC, done, identity = found["counts"], int(found["done"]), str(found["identity"])
        except (OSError, ValueError, KeyError, EOFError):  # none, or damaged: they can be had again
            return 0
        if identity != self._identity or counts_CC.shape != tuple(confusion.counts_CC.shape):
            return 0
        confusion.counts_CC = torch.from_numpy(counts_CC).to(confusion.counts_CC.device)
        return done

    def keep(self, confusion: Confusion, done: int, now: bool = False) -> None:
        """Write the counts, where the last time was a while ago, or `now`."""
        if not now and time.monotonic() - self._last < KEPT_EVERY:
            return
        self._last = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, counts=confusion.counts_CC.cpu().numpy(), done=done, identity=self._identity)
        os.replace(temporary, self._path)


def _identity(run: SegmentRun) -> str:
    """What decides the figures: every weight, the images, and how they are judged."""
    config = run.config
    how = {
        "step": run.steps_done,
        "judged": run.judged.index.fingerprint(),
        "classes": [list(run.judged.legend.names), list(run.judged.legend.value_of)],
        "masks": str(run.judged.masks),
        "stride": window_stride(config),
        "size": config.data.image_size,
        "shorter_side": config.segment.shorter_side,
        "interpolation": config.data.interpolation,
        "precision": config.train.precision,
    }
    return fingerprint(how, run.trained.state_dict())


def _earlier(path: Path, identity: str) -> dict[str, Any] | None:
    """What results.json says, where it is of the same model and judged alike."""
    try:
        found = read_results(path)
    except DataError:
        return None
    return found if found.get("identity") == identity else None


def _content(run: SegmentRun, figures: Figures, identity: str) -> dict[str, Any]:
    names = run.judged.legend.names
    sets = {"train": run.training, "val": run.judged}
    per_class = {
        name: {"iou": iou, "accuracy": accuracy, "pixels": pixels}
        for name, iou, accuracy, pixels in zip(names, figures.iou, figures.accuracy, figures.pixels, strict=True)
    }
    return {
        "identity": identity,
        "backbone": run.origin._asdict(),
        "data": {
            name: {"index": each.index.fingerprint(), "images": len(each), "folder": str(each.index.root)}
            for name, each in sets.items()
        },
        "steps": run.steps_done,
        "averaged": run.ema is not None,
        "miou": figures.miou,
        "pixel_accuracy": figures.pixel_accuracy,
        "mean_accuracy": figures.mean_accuracy,
        "classes_counted": sum(value is not None for value in asdict(figures)["iou"]),
        "per_class": per_class,
        "settings": config_to_dict(run.config),
    }


def _into_metrics(run: SegmentRun, folder: Path, content: dict[str, Any]) -> None:
    """The figures as the last line of the metrics."""
    for sink in open_sinks(run.config, folder, run.steps_done):
        sink.write({"step": run.steps_done, **{name: content[name] for name in FIGURES}})
        sink.close()


FIGURES = ("miou", "pixel_accuracy", "mean_accuracy")
