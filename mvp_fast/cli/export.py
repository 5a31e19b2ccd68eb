"""`mvp-fast export`: write a run's student in a format that other tools load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Write a run's student in a format that other tools load.

    timm: model.safetensors and config.json, for timm.create_model. The mask token and the predictor are left out, the
    shared relative position table is copied into every block, and the final norm becomes fc_norm, after the mean of the
    patch tokens.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    format: Literal["timm"] = "timm"
    """The format to write."""
    out: Path | None = None
    """The folder to write to; RUN/export/FORMAT where not given."""
    checkpoint: str = "latest"
    """`latest`, a step number, or the path of a checkpoint."""
    ema: bool = False
    """Take the averaged weights (the run must have had train.ema-decay)."""
    num_classes: int = 0
    """Outputs of a fresh, untrained head. 0 writes none, for timm.create_model(..., num_classes=0). timm loads a
    checkpoint_path strictly, so a tool that creates a model of K classes wants a file with a head of K classes."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "export")
    if options.num_classes < 0:
        raise ConfigError(f"--num-classes is {options.num_classes}, but must be 0 or more")

    from mvp_fast.export.timm_format import WEIGHTS, create_arguments, write_timm
    from mvp_fast.train.checkpoint import load_student

    student, _, step = load_student(options.run, options.checkpoint, options.ema)
    out = (options.out or options.run / "export" / options.format).resolve()
    write_timm(student, out, num_classes=options.num_classes)
    arguments = "".join(f", {key}={value}" for key, value in create_arguments(student, options.num_classes).items())
    size = (out / WEIGHTS).stat().st_size / 1e6
    print(f"export   {out}: step {step}{', averaged weights' if options.ema else ''}, {size:.1f} MB")
    print("load it with\n")
    print("    import timm")
    print(f'    model = timm.create_model("{student.config.name}"{arguments}, checkpoint_path="{out / WEIGHTS}")')
    print(f'\nor, shape and statistics from config.json: timm.create_model("local-dir:{out}", pretrained=True)')
    return 0
