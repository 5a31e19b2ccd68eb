"""`mvp-fast study`: pre-train students on different targets and compare what they are worth."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvp_fast.config.load import config_to_dict, config_to_yaml, load_settings, override
from mvp_fast.config.study import StudyConfig, check_study

if TYPE_CHECKING:
    from mvp_fast.evaluate.study.steps import Step

RESULTS, TABLES = "results.json", "tables.md"
ON_GPU, ON_CPU = "configs/mini/study-gpu.yaml", "configs/mini/study-cpu.yaml"
DESCRIPTION = """Pre-train students on different targets and compare what they are worth.

Draws scenes, trains a small CLIP on them and their captions, pre-trains students of one size on what each target says,
and tries each of them: linear probe, k-NN, fine-tuning on parts of the labels, segmentation. Every step is a command of
its own (--dry-run prints them all); what is done stays done, so the same command goes on after a stop.
FOLDER/results.json has all figures, FOLDER/tables.md and FOLDER/plots show them.
--config FILE reads a YAML file; without it configs/mini/study-gpu.yaml where there is a GPU, else
configs/mini/study-cpu.yaml. --page FILE writes the tables into a Markdown page, and results and pictures into a folder
of the page's name beside it. Every other option overrides one setting."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    parser = argparse.ArgumentParser("mvp-fast study", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--page", default="")
    own, rest = parser.parse_known_args(argv)
    asks_for_help = "-h" in rest or "--help" in rest
    base = StudyConfig() if asks_for_help else load_settings(StudyConfig, own.config or _form())
    config = override(base, rest, "mvp-fast study", DESCRIPTION)
    if own.print_config:
        print(config_to_yaml(config), end="")
        return 0
    check_study(config)
    config = replace(config, folder=config.folder.rstrip("/"))

    from mvp_fast.evaluate.study.steps import build_steps

    processes, threads = _shares(config)
    steps = build_steps(config, threads)
    if own.dry_run:
        for step in steps:
            print(shlex.join(["mvp-fast", *step.argv]))
        return 0
    _study(config, steps, processes, threads, Path(own.config or _form()).stem.removeprefix("study-"), own.page)
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
    from mvp_fast.cli.study.pool import run_steps
    from mvp_fast.evaluate.results import read_results, write_results
    from mvp_fast.evaluate.study.figures import figure_names, gather
    from mvp_fast.evaluate.study.plots import draw_plots
    from mvp_fast.evaluate.study.tables import tables, write_page

    folder = Path(config.folder)
    took = run_steps(steps, folder, processes, threads)
    content: dict[str, Any] = {
        "form": form,
        **_place(),
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
        read_results(folder / RESULTS)
        beside = Path(page).with_suffix("") / form
        beside.mkdir(parents=True, exist_ok=True)
        pictures = sorted((folder / "students" / "clip-0" / "visualize").glob("*.png"))
        for path in (folder / RESULTS, *plots, *pictures):
            shutil.copyfile(path, beside / path.name)
        write_page(Path(page), form, beside / RESULTS)
        print(f"page     {page}, and {beside}")


def _place() -> dict[str, Any]:
    """Which sources made the figures, and on what."""
    import platform
    import subprocess

    import torch

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = gpu or f"{len(os.sched_getaffinity(0))} CPU cores"
    environment = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "environment": environment,
    }
