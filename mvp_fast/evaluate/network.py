"""A network's shape in words that a checkpoint can hold, from which timm builds it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mvp_fast.config.load import config_from_dict
from mvp_fast.errors import DataError
from mvp_fast.export.write import CONFIG
from mvp_fast.models.student import beit_overrides
from mvp_fast.train.checkpoint import find_checkpoint, read_state

HEAD_STD = 0.02  # BEiT's, before its scale


@dataclass(frozen=True)
class Network:
    """What timm.create_model has to be told to build a network without a head, and its colour statistics.

    Attributes:
        architecture: timm's name.
        arguments: JSON-able.
        mean, std: of values in [0, 1].
    """

    architecture: str
    arguments: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Network:
        """What `to_dict` gave."""
        mean, std = (tuple(values[name]) for name in ("mean", "std"))
        return cls(values["architecture"], dict(values["arguments"]), mean, std)

    def sized(self, image_size: int) -> Network:
        """The same for images of another size."""
        return Network(self.architecture, {**self.arguments, "img_size": image_size}, self.mean, self.std)

    def build(self, seed: int = 0) -> Any:
        """timm's model, on the CPU, with fresh weights from `seed`; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(self.architecture, pretrained=False, num_classes=0, **self.arguments)
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": self.mean, "std": self.std}
        return model


def give_head(model: Any, classes: int, scale: float, seed: int) -> None:
    """Put a new linear head on a timm model: weights truncated normal with deviation 0.02, times `scale`; biases 0."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model.reset_classifier(classes)
        head = model.get_classifier()
        for linear in head if isinstance(head, tuple) else (head,):
            nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
            nn.init.zeros_(linear.bias)
            with torch.no_grad():
                linear.weight.mul_(scale)


def describe_folder(path: Path, checkpoint: str = "latest") -> Network:
    """The network of a run (its weights are not read), or of a folder that `mvp-fast export` wrote.

    Raises:
        DataError: the run has no such checkpoint, or files are damaged.
    """
    if is_export(path):
        return _of_export(path)
    found = find_checkpoint(path, checkpoint)
    state = read_state(found)
    task = state.get("task", "pretrain")
    if task == "pretrain":
        config = config_from_dict(state["config"], source=str(found / "state.json"))
        student, size = config.student, config.data.image_size
        arguments = {**beit_overrides(student, size), "img_size": size, "init_values": student.layer_scale or 1.0}
        statistics = timm.get_pretrained_cfg(student.name)
        return Network(student.name, arguments, tuple(statistics.mean), tuple(statistics.std))
    if "network" not in state:
        raise DataError(
            f"The run has no backbone that could be taken: its task is {task}",
            where=str(found),
            fix="Name a run of `mvp-fast train` or `mvp-fast finetune`",
        )
    return Network.from_dict(state["network"])


def is_export(path: Path) -> bool:
    """Whether a folder holds a model in timm's format, and no run."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").is_dir()


def _of_export(path: Path) -> Network:
    try:
        about = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        statistics = about["pretrained_cfg"]
        arguments = {key: value for key, value in (about.get("model_args") or {}).items() if key != "num_classes"}
        return Network(about["architecture"], arguments, tuple(statistics["mean"]), tuple(statistics["std"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"This is no description of a timm model: {error!r}",
            where=str(path / CONFIG),
            fix="Write it anew with `mvp-fast export RUN --format timm`",
        ) from error
