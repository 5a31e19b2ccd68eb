"""The model card: README.md of an export, with what model hubs read of it, what was trained, and how to load it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import yaml

from mvp_fast import __version__
from mvp_fast.export.provenance import Evaluation, Provenance
from mvp_fast.models.student import Student

LIBRARIES = {"timm": "timm", "hf": "transformers"}
MOST_FIGURES = 40  # of one evaluation; the others are in its results.json
SHARES = ("accuracy", "top1", "top5", "iou", "acc")  # ends of figures' names whose values are shares in [0, 1]

TIMM_CODE = """\
import timm
import torch
from PIL import Image

model = timm.create_model("{source}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.inference_mode():
    tokens = model.forward_features(image)  # (1, {tokens}, {width}): CLS and the patches, before the final norm
    features = model.forward_head(tokens, pre_logits=True)  # (1, {width}): mean of the patches, normed by fc_norm
"""
HF_CODE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, BeitModel

processor = AutoImageProcessor.from_pretrained("{source}")
model = BeitModel.from_pretrained("{source}").eval()
inputs = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
    tokens = output.last_hidden_state  # (1, {tokens}, {width}): CLS and the patches, before the final norm
    features = output.pooler_output  # (1, {width}): mean of the patches, normed
    normed = model.pooler.layernorm(tokens)  # (1, {tokens}, {width}): what pre-training predicted features from
"""


def model_card(student: Student, facts: Provenance, *, form: str, license: str = "", repo_id: str = "") -> str:
    """README.md of an export.

    Args:
        student: that is exported.
        facts: where its weights come from.
        form: timm or hf.
        license: for the metadata; left out where empty.
        repo_id: OWNER/NAME on a hub that the code loads from; empty for the folder that the card is in.
    """
    blocks = [
        _metadata(form, license),
        f"# {repo_id.rpartition('/')[2] or student.config.name}",
        _summary(student, facts),
        "## How to load it",
        loading_code(student, form, repo_id),
        "## What was trained",
        _table(_recipe(student, facts)),
        _settings(facts),
        "## Data",
        _data(facts),
        "## Teacher",
        _teacher(facts),
        "## Results",
        *_results(facts),
        "## Versions",
        _versions(facts),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def loading_code(student: Student, form: str, repo_id: str = "") -> str:
    """A fenced block of Python that loads the export and takes an image's features."""
    source = {"timm": f"hf-hub:{repo_id}" if repo_id else "local-dir:.", "hf": repo_id or "."}[form]
    code = {"timm": TIMM_CODE, "hf": HF_CODE}[form].format(
        source=source, width=student.width, tokens=1 + student.grid[0] * student.grid[1]
    )
    where = "" if repo_id else "In the folder of these files:\n\n"
    return f"{where}```python\n{code}```"


def _metadata(form: str, license: str) -> str:
    """The YAML at the head. The licence is for those to say whom the weights belong to."""
    library = LIBRARIES[form]
    values: dict[str, Any] = {"license": license} if license else {}
    values |= {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": [library, "beit", "masked-image-modeling", "mvp", "mvp-fast"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _summary(student: Student, facts: Provenance) -> str:
    side = student.image_size
    weights = " (averaged weights)" if facts.averaged else ""
    return (
        f"A BEiT (`{student.config.name}`: {len(student.blocks)} blocks, {student.width} channels, {side} x {side} px, "
        f"patches of {student.patch_size} px) pre-trained by masked image modelling: for the masked patches of an "
        f"image it predicts the features that the frozen teacher `{facts.config['teacher']['name']}` has of them "
        f"(MVP, [arXiv 2203.05175](https://arxiv.org/abs/2203.05175)). After {facts.step:,} of {facts.total_steps:,} "
        f"steps{weights}, by mvp_fast. It has features and no classes: what predicted the teacher's features and the "
        "mask token are left out."
    )


def _recipe(student: Student, facts: Provenance) -> dict[str, str]:
    config = facts.config
    objective, optim, train = config["objective"], config["optim"], config["train"]
    patches = student.grid[0] * student.grid[1]
    rate = optim["lr"] * train["batch_size"] / optim["reference_batch_size"]
    rows = {
        "steps": f"{facts.step:,} of {facts.total_steps:,}",
        "images seen": f"{facts.images_seen:,} (batch {train['batch_size']:,})",
        "loss": f"{objective['loss']}, targets normalised by {objective['target_norm']}",
        "tokens in the loss": f"{objective['tokens']} patches{', CLS' if objective['cls'] else ''}",
        "masked": f"{config['mask']['patches']} of {patches} patches, block-wise",
        "optimizer": f"{optim['name']}, peak learning rate {rate:.3g}, weight decay {optim['weight_decay']:g}",
        "precision": train["precision"],
        "weights": f"averaged, decay {train['ema_decay']:g}" if facts.averaged else "of the last step, not averaged",
        "skipped updates": f"{facts.skipped:,}" if facts.skipped else "",
        "training loss": "" if facts.loss is None else f"{facts.loss:.4f}",
        "device": facts.device,
        "fingerprint": f"`{facts.fingerprint}`",
    }
    return {name: value for name, value in rows.items() if value}


def _settings(facts: Provenance) -> str:
    text = yaml.safe_dump(facts.config, sort_keys=False).strip()
    return f"<details><summary>All settings</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _data(facts: Provenance) -> str:
    if facts.config["data"].get("loader") == "synthetic":
        return "None: random pixels, one batch again and again, to measure speed. These weights are of no use."
    size = f"{facts.images:,} images" if facts.images else "An unknown number of images"
    index = f" (fingerprint of the index `{facts.index}`)" if facts.index else ""
    return f"{size}{index}. Names and rights of the data set are for those to say who trained on it."


def _teacher(facts: Provenance) -> str:
    settings = dict(facts.config["teacher"])
    name, pretrained = settings.pop("name"), settings.pop("pretrained", None)
    weights = f", weights `{pretrained}`" if pretrained is not None else ""
    control = " Its weights are random: this is a control." if pretrained == "random" else ""
    return (
        f"`{name}`{weights}, {facts.target_width} channels, frozen.{control} Fingerprint over its weights and "
        f"pre-processing: `{facts.teacher}`."
    )


def _results(facts: Provenance) -> list[str]:
    blocks = [_evaluation(each) for each in facts.evaluations if each.same_weights and each.figures]
    others = sorted({each.verb for each in facts.evaluations if not each.same_weights})
    if not blocks:
        blocks.append("No evaluation of these weights was found with the run.")
    if others:
        blocks.append(f"Results of other weights of this run are left out: {', '.join(others)}.")
    return blocks


def _evaluation(each: Evaluation) -> str:
    shown = dict(list(each.figures.items())[:MOST_FIGURES])
    lines = [f"### {each.verb}", "", _table({name: _figure(name, value) for name, value in shown.items()})]
    if len(shown) < len(each.figures):
        lines += ["", f"and {len(each.figures) - len(shown):,} more figures."]
    for title, values in (("Data", each.data), ("Settings", each.settings)):
        if values:
            told = ", ".join(f"{name} {_figure(name, value)}" for name, value in values.items())
            lines += ["", f"{title}: {told}."]
    return "\n".join(lines)


def _figure(name: str, value: Any) -> str:
    """A value for people; a share as a percentage."""
    if isinstance(value, list):
        return " ".join(_figure(name, each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        share = name.rpartition(".")[2].lower().endswith(SHARES) and 0 <= value <= 1
        return f"{100 * value:.1f} %" if share else f"{value:.4g}"
    return str(value)


def _versions(facts: Provenance) -> str:
    trained = {name: version for name, version in facts.versions.items() if version and version != "not installed"}
    exported = {"mvp_fast": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "timm")}}
    lines = [f"Exported with {_listed(exported)}."]
    if trained:
        lines.insert(0, f"Trained with {_listed(trained)}.")
    return "\n".join(lines)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(rows: Mapping[str, str]) -> str:
    body = (f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *body])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
