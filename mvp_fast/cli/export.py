"""`mvp-fast export`: write a run's student in a format that other tools load, and upload it where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvp_fast.cli.parse import parse
from mvp_fast.errors import ConfigError

if TYPE_CHECKING:
    from mvp_fast.models.student import Student


@dataclass(frozen=True)
class Options:
    """Write a run's student in a format that other tools load, with a model card.

    timm: model.safetensors and config.json, for timm.create_model. The mask token and the predictor are left out, the
    shared relative position table is copied into every block, and the final norm becomes fc_norm, after the mean of the
    patch tokens.

    hf: model.safetensors, config.json and preprocessor_config.json, for transformers' BeitModel and AutoImageProcessor.
    The mask token and the predictor are left out, the relative position table stays one for all blocks, and the final
    norm becomes the pooler's: pooler_output is normed, last_hidden_state is not.

    A run of `mvp-fast finetune` is written with its head and the names of its classes, in timm's format alone.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    format: Literal["timm", "hf"] = "timm"
    """The format to write."""
    out: Path | None = None
    """The folder to write to; RUN/export/FORMAT where not given."""
    checkpoint: str = "latest"
    """`latest`, a step number, or the path of a checkpoint."""
    ema: bool = False
    """Take the averaged weights (the run must have had train.ema-decay)."""
    num_classes: int = 0
    """Outputs of a fresh, untrained head. 0 writes none, for timm.create_model(..., num_classes=0) and BeitModel. timm
    loads a checkpoint_path strictly, so a tool that creates a model of K classes wants a file with a head of K
    classes; transformers adds a head by itself."""
    license: str = ""
    """The licence that the model card names, as a hub knows it (apache-2.0, cc-by-nc-4.0, ...); empty for none."""
    push: str = ""
    """OWNER/NAME: upload the files that were written to this repository on the Hugging Face hub (or at HF_ENDPOINT),
    with the token of `hf auth login` or HF_TOKEN. Nothing is ever uploaded without this."""
    private: bool = False
    """With --push: a new repository is private, and one that is public is refused."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit code."""
    options = parse(Options, argv, "export")
    if options.num_classes < 0:
        raise ConfigError(f"--num-classes is {options.num_classes}, but must be 0 or more")
    if options.private and not options.push:
        raise ConfigError("--private is for --push, which is not there", fix="Add --push OWNER/NAME")
    if options.push:
        from mvp_fast.export.hub import check_target

        check_target(options.push)

    from mvp_fast.train.checkpoint import find_checkpoint, read_state

    checkpoint = find_checkpoint(options.run, options.checkpoint)
    state = read_state(checkpoint)
    task = state.get("task", "pretrain")
    out = (options.out or options.run / "export" / options.format).resolve()
    if task == "finetune":
        return _export_classifier(options, checkpoint, out)
    if task != "pretrain":
        raise ConfigError(
            f"What can be exported is a run of `mvp-fast train` or `finetune`; this run's task is {task}",
            where=str(options.run),
        )
    return _export_student(options, checkpoint, state, out)


def _export_student(options: Options, checkpoint: Path, state: Mapping[str, Any], out: Path) -> int:
    from mvp_fast.export.card import model_card
    from mvp_fast.export.hf_format import PREPROCESSOR, write_hf
    from mvp_fast.export.provenance import read_provenance
    from mvp_fast.export.timm_format import timm_fingerprint, timm_model, write_timm
    from mvp_fast.export.write import CARD, CONFIG, WEIGHTS
    from mvp_fast.train.checkpoint import load_student

    student, _, step = load_student(options.run, str(checkpoint), options.ema)
    fingerprint = timm_fingerprint(timm_model(student))
    facts = read_provenance(options.run, state, averaged=options.ema, fingerprint=fingerprint)
    card = model_card(student, facts, form=options.format, license=options.license, repo_id=options.push)
    write, names = {
        "timm": (write_timm, (WEIGHTS, CONFIG, CARD)),
        "hf": (write_hf, (WEIGHTS, CONFIG, PREPROCESSOR, CARD)),
    }[options.format]
    write(student, out, num_classes=options.num_classes, card=card)
    size = (out / WEIGHTS).stat().st_size / 1e6
    print(f"export   {out}: step {step}{', averaged weights' if options.ema else ''}, {size:.1f} MB")
    _push(options, out, names, f"{student.config.name}, step {step:,}, {options.format} format")
    print("load it with\n")
    if options.format == "timm":
        _show_timm(student, out, out / WEIGHTS, options.num_classes)
    else:
        _show_hf(out, options.num_classes)
    return 0


def _export_classifier(options: Options, checkpoint: Path, out: Path) -> int:
    from mvp_fast.evaluate.finetune.export import write_classifier
    from mvp_fast.export.write import CARD, CONFIG, WEIGHTS

    if options.format != "timm" or options.num_classes:
        asked = f"--format {options.format}" if options.format != "timm" else f"--num-classes {options.num_classes}"
        raise ConfigError(
            f"A fine-tuned run is exported with its own head and in timm's format, but {asked} was asked for",
            where=str(options.run),
            fix="Leave it out",
        )
    model = write_classifier(checkpoint, out, ema=options.ema, license=options.license, repo_id=options.push)
    size = (out / WEIGHTS).stat().st_size / 1e6
    print(f"export   {out}: {model.num_classes} classes{', averaged weights' if options.ema else ''}, {size:.1f} MB")
    _push(options, out, (WEIGHTS, CONFIG, CARD), f"{checkpoint.name}, {model.num_classes} classes, timm format")
    print(f'load it with\n\n    import timm\n    model = timm.create_model("local-dir:{out}", pretrained=True)')
    return 0


def _push(options: Options, out: Path, names: tuple[str, ...], what: str) -> None:
    if options.push:
        from mvp_fast.export.hub import push

        address = push(out, names, options.push, private=options.private, message=f"mvp-fast export: {what}")
        print(f"pushed   {address}: {', '.join(names)}")


def _show_timm(student: Student, out: Path, weights: Path, num_classes: int) -> None:
    from mvp_fast.export.timm_format import create_arguments

    arguments = "".join(f", {key}={value}" for key, value in create_arguments(student, num_classes).items())
    print("    import timm")
    print(f'    model = timm.create_model("{student.config.name}"{arguments}, checkpoint_path="{weights}")')
    print(f'\nor, shape and statistics from config.json: timm.create_model("local-dir:{out}", pretrained=True)')


def _show_hf(out: Path, num_classes: int) -> None:
    name = "BeitForImageClassification" if num_classes else "BeitModel"
    print(f"    from transformers import AutoImageProcessor, {name}")
    print(f'    model = {name}.from_pretrained("{out}")')
    print(f'    processor = AutoImageProcessor.from_pretrained("{out}")')
