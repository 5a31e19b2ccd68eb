"""`mvp-fast study`: pre-train students on different targets and compare what they are worth."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvp_fast.config.load import config_to_dict, config_to_yaml, load_settings, override
from mvp_fast.config.study import StudyConfig, check_study
from mvp_fast.errors import ConfigError

if TYPE_CHECKING:
    from mvp_fast.evaluate.study.steps import Step

TABLES = "tables.md"
ON_GPU, ON_CPU = "configs/mini/study-gpu.yaml", "configs/mini/study-cpu.yaml"
DESCRIPTION = """Pre-train students on different targets and compare what they are worth.

Draws scenes, trains a small CLIP on them and their captions, pre-trains students of one size on what each target says,
and tries each of them: linear probe, k-NN, fine-tuning on parts of the labels, segmentation. Every step is a command of
its own (--dry-run prints them all); what is done stays done, so the same command goes on after a stop.
FOLDER/results.json has all figures, FOLDER/tables.md and FOLDER/plots show them.
--config FILE reads a YAML file; without it configs/mini/study-gpu.yaml where there is a GPU, else
configs/mini/study-cpu.yaml. --page FILE.md writes the tables into a Markdown page, and results and pictures into a
folder of the page's name beside it. Every other option overrides one setting."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast study", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--page", default="")
    own, rest = parser.parse_known_args(argv)
    if "-h" in rest or "--help" in rest:
        override(StudyConfig(), rest, "mvp-fast study", DESCRIPTION)
    path = own.config or _form()
    config = override(load_settings(StudyConfig, path), rest, "mvp-fast study", DESCRIPTION)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    check_study(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("A study is one process that starts others itself", fix="Start it without torchrun")

    from mvp_fast.evaluate.study.steps import build_steps

    config = replace(config, folder=config.folder.rstrip("/"))
    processes, threads = _shares(config)
    steps = build_steps(config, threads)
    if own.dry_run:
        for step in steps:
            print(shlex.join(["mvp-fast", *step.argv]))
        return 0
    form = Path(path).stem.removeprefix("study-")
    if own.page:
        from mvp_fast.evaluate.study.tables import check_page

        check_page(Path(own.page), form)
    _study(config, steps, processes, threads, form, own.page)
    return 0


def _form() -> str:
    """The settings for this machine."""
    import torch

    return ON_GPU if torch.cuda.is_available() else ON_CPU


def _shares(config: StudyConfig) -> tuple[int, int]:
    """How many steps at a time, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0))
    processes = config.processes or (1 if torch.cuda.is_available() else cores)
    return processes, max(1, cores // processes)


def _study(config: StudyConfig, steps: list[Step], processes: int, threads: int, form: str, page: str) -> None:
    from mvp_fast.cli.study.pool import ready_folder, run_steps
    from mvp_fast.evaluate.results import write_results
    from mvp_fast.evaluate.study.figures import figure_names, gather
    from mvp_fast.evaluate.study.plots import draw_plots
    from mvp_fast.evaluate.study.steps import RESULTS
    from mvp_fast.evaluate.study.tables import tables
    from mvp_fast.samples.workers import alone

    folder = Path(config.folder)
    ready_folder(folder)
    with alone(folder, folder / ".lock", "runs a study in this folder"):
        notes = run_steps(steps, folder, processes, threads)
        every = {step.name: note for step in steps if (note := notes.read(step)) is not None}
        took = {name: note.seconds for name, note in every.items()}
        content: dict[str, Any] = {
            "form": form,
            "commits": sorted({note.commit for note in every.values() if note.commit}),
            "dirty": any(note.dirty for note in every.values()),
            "environment": _environment(),
            "processes": processes,
            "threads": threads,
            "seconds": round(sum(took.values()), 1),
            "settings": config_to_dict(config),
            "names": figure_names(config),
            **gather(config, took),
        }
        write_results(folder / RESULTS, "study", content)
        plots = draw_plots(content, folder / "plots")
        text = tables(content, RESULTS)
        (folder / TABLES).write_text(text, encoding="utf-8")
        print(text, end="")
        print(f"results  {folder / RESULTS}")
        print(f"plots    {', '.join(str(path) for path in plots)}")
        if page:
            pictures = sorted((folder / "students" / "clip-0" / "visualize").glob("*.png"))
            _publish(content, plots, pictures, Path(page))


def _publish(content: Mapping[str, Any], plots: list[Path], pictures: list[Path], page: Path) -> None:
    """The tables into the page, and figures and pictures beside it, without any place on this machine."""
    from PIL import Image

    from mvp_fast.evaluate.study.steps import RESULTS
    from mvp_fast.evaluate.study.tables import write_page
    from mvp_fast.samples.files import replacing

    beside = page.with_suffix("") / content["form"]
    beside.mkdir(parents=True, exist_ok=True)
    for old in [*beside.glob("*.png"), *beside.glob("*.jpg")]:
        old.unlink()
    for path in plots:
        shutil.copyfile(path, beside / path.name)
    for path in pictures:  # of photographs: a tenth of the size for a repository that keeps them for good
        Image.open(path).convert("RGB").save(beside / f"{path.stem}.jpg", quality=85, optimize=True)
    settings = {name: value for name, value in content["settings"].items() if name != "folder"}
    with replacing(beside / RESULTS, "--page") as file:
        file.write((json.dumps({**content, "settings": settings}, indent=1) + "\n").encode())
    write_page(page, content["form"], beside / RESULTS)
    print(f"page     {page}, and {beside}")


def _environment() -> dict[str, str]:
    """What the figures were made on."""
    import platform

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = gpu or f"{len(os.sched_getaffinity(0))} CPU cores"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}
