"""A fine-tuned classifier in timm's own format: the network with its head, and the names of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mvp_fast import __version__
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.network import Network
from mvp_fast.evaluate.results import read_results
from mvp_fast.export.provenance import without_places
from mvp_fast.export.timm_format import PROVENANCE
from mvp_fast.export.write import CARD, replacing
from mvp_fast.train.checkpoint import load_weights, read_state

CODE = """\
```python
import timm
import torch
from PIL import Image

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.inference_mode():
    chances = model(image).softmax(-1)[0]  # {classes} classes
print(model.pretrained_cfg["label_names"][chances.argmax()])
```
"""


def load_classifier(checkpoint: Path, ema: bool = False) -> tuple[Any, Network, dict[str, Any]]:
    """The network of a checkpoint of `mvp-fast finetune` with its head, on the CPU; its shape; the checkpoint's state.

    Raises:
        ConfigError: averaged weights are asked for, and there are none.
        DataError: the checkpoint is damaged.
    """
    state = read_state(checkpoint)
    if ema and not (checkpoint / "ema").is_dir():
        raise ConfigError("The run kept no averaged weights", where=str(checkpoint), fix="Leave --ema out")
    network = Network.from_dict(state["network"])
    model = network.build()
    model.reset_classifier(len(state["classes"]))
    load_weights(model, checkpoint, "ema" if ema else "model")
    return model.eval(), network, state


def write_classifier(checkpoint: Path, out: Path, *, ema: bool = False, license: str = "", repo_id: str = "") -> Any:
    """Write `out`/model.safetensors, `out`/config.json and `out`/README.md: timm's hub format, with the head.

    Args:
        checkpoint: of `mvp-fast finetune`, in its run's folder.
        out: a folder, made where missing.
        ema: the averaged weights.
        license: for the card's metadata; left out where empty.
        repo_id: OWNER/NAME on a hub that the card's code loads from; empty for the folder that the card is in.

    Returns:
        the model.

    Raises:
        UserError: see `load_classifier`, and `replacing`.
    """
    from timm.models import save_for_hf

    model, network, state = load_classifier(checkpoint, ema)
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in PROVENANCE}
    names = {"label_names": list(state["classes"])}
    with replacing(out) as partial:
        save_for_hf(
            model, str(partial), model_config=names, model_args=dict(network.arguments), safe_serialization=True
        )
        card = _card(state, network, _results(checkpoint.parents[1]), ema, license, repo_id)
        (partial / CARD).write_text(card, encoding="utf-8")
    return model


def _results(run: Path) -> dict[str, Any]:
    """results.json of the run; empty where it has none that can be read."""
    with suppress(DataError):
        return read_results(run / "results.json")
    return {}


def _card(
    state: Mapping[str, Any], network: Network, results: Mapping[str, Any], ema: bool, license: str, repo_id: str
) -> str:
    """README.md: what it is, code that loads it, its result, its settings."""
    head: dict[str, Any] = {"license": license} if license else {}
    head |= {"library_name": "timm", "pipeline_tag": "image-classification", "tags": ["timm", "mvp-fast"]}
    settings = yaml.safe_dump(without_places(state["config"]), sort_keys=False).strip()
    found = results.get("ema" if ema else "test")
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo_id.rpartition('/')[2] or network.architecture}",
        f"`{network.architecture}` fine-tuned to tell {len(state['classes'])} classes apart, {state['step']:,} of"
        f" {state['total_steps']:,} steps{', averaged weights' if ema else ''}, by mvp_fast {__version__}.",
        CODE.format(source=f"hf-hub:{repo_id}" if repo_id else "local-dir:.", classes=len(state["classes"])).strip(),
    ]
    if isinstance(found, Mapping) and results.get("step", state["step"]) == state["step"]:
        lines.append(f"Top-1 accuracy {100 * found['accuracy']:.2f} % on its test set of {found['images']:,} images.")
    lines.append(f"<details><summary>All settings</summary>\n\n```yaml\n{settings}\n```\n\n</details>")
    return "\n\n".join(lines) + "\n"
