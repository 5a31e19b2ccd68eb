"""NVIDIA's apex: which `apex` is installed here, and how its fused optimizers are stepped.

Two projects have that name. NVIDIA's is built from source, its kernels as the module `amp_C`; without them its
optimizers refuse to be made. `apex` on the package index is a toolkit for web applications. Importing either can fail,
so they are told apart by their files first.

apex's FusedAdam asks a gradient scaler whether to skip and by how much to divide; `update` answers in its place, so
that the whole update is decided on the device. Its other optimizers have no such question, and the host waits.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvp_fast.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install -v --no-build-isolation ."
)
"""How its authors have it built; it needs the CUDA toolkit (nvcc) of torch's CUDA version."""


class ApexKind(StrEnum):
    """What answers to the name `apex`."""

    COMPILED = "NVIDIA's, with its compiled part"
    PYTHON_ONLY = "NVIDIA's, without its compiled part"
    BROKEN = "NVIDIA's, but it does not load"
    OTHER = "another project of that name, not NVIDIA's"
    MISSING = "not installed"


@dataclass(frozen=True)
class Apex:
    """What was found.

    Attributes:
        version: as its metadata say; empty where they don't.
        folder: the package's; None where there is none.
        reason: why it does not load; empty where it does.
    """

    kind: ApexKind
    version: str = ""
    folder: Path | None = None
    reason: str = ""


def find_apex() -> Apex:
    """Which `apex` this is. NVIDIA's is imported, to see that it loads; the other project is not."""
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):  # ValueError: it stands in sys.modules as not there
        spec = None
    if spec is None or spec.origin is None:  # no origin: some folder of that name on Python's path, without a package
        return Apex(ApexKind.MISSING)
    folder = Path(spec.origin).parent
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not (folder / "optimizers" / "fused_adam.py").is_file():
        return Apex(ApexKind.OTHER, version, folder)
    try:
        importlib.import_module("torch")  # amp_C is linked against its libraries
        importlib.import_module("amp_C")
        optimizers = importlib.import_module("apex.optimizers")
        missing = [name for name in ("FusedAdam", "FusedLAMB") if not hasattr(optimizers, name)]
    except ModuleNotFoundError as error:
        if error.name == "amp_C":
            return Apex(ApexKind.PYTHON_ONLY, version, folder)
        return Apex(ApexKind.BROKEN, version, folder, str(error))
    except (Exception, SystemExit) as error:  # whatever another project's code raises
        return Apex(ApexKind.BROKEN, version, folder, f"{type(error).__name__}: {error}")
    if missing:
        return Apex(ApexKind.BROKEN, version, folder, f"apex.optimizers has no {' and no '.join(missing)}")
    return Apex(ApexKind.COMPILED, version, folder)


def settings_of(kind: str, name: str, device: torch.device) -> dict[str, Any]:
    """What one of apex's optimizers is told beyond learning rate, betas and weight decay.

    Args:
        kind: its class, such as apex.optimizers.FusedAdam.
        name: as optim.name has it, for messages.
        device: the parameters'.

    Raises:
        EnvironmentProblem: there is no NVIDIA apex with its compiled part, or no GPU.
        ConfigError: it is FusedNovoGrad.
    """
    if kind.endswith(".FusedNovoGrad"):  # it keeps its second moments in the groups, as one tensor for all parameters
        raise ConfigError(
            f"The optimizer `{name}` keeps a part of its state where checkpoints don't reach",
            where="optim.name",
            fix="Take fusedlamb, fusedadamw or adamw",
        )
    found = find_apex()
    if found.kind is not ApexKind.COMPILED:
        raise EnvironmentProblem(
            f"The optimizer `{name}` needs NVIDIA's apex. Here apex is {describe(found)}",
            where=f"optim.name {name}",
            fix=f"{remedy(found)} Or take adamw, which is fused as well and needs nothing else",
        )
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"The optimizer `{name}` is NVIDIA apex's, which runs on GPUs alone; this run's device is {device.type}",
            where=f"optim.name {name}",
            fix="Take adamw, which is fused on both, or set train.device to cuda",
        )
    if kind.endswith(".FusedAdam"):
        make = importlib.import_module("apex.optimizers").FusedAdam
        return {"capturable": True} if "capturable" in inspect.signature(make).parameters else {}
    if kind.endswith(".FusedLAMB"):
        return {"max_grad_norm": math.inf}  # optim.clip_grad clips; its own default is 1
    return {}


def describe(found: Apex) -> str:
    """What was found in words, with its version, place and fault."""
    words = str(found.kind)
    if found.kind is ApexKind.BROKEN:
        words += f" ({found.reason})"
    if found.folder is not None:
        words += f", {found.version} in {found.folder}" if found.version else f", in {found.folder}"
    return words


def remedy(found: Apex) -> str:
    """What brings NVIDIA's, as sentences."""
    if found.kind is ApexKind.OTHER:
        return (
            "`apex` on the package index is a toolkit for web applications: take it away (pip uninstall apex) and build"
            f" NVIDIA's from source: {BUILD}"
        )
    if found.kind is ApexKind.MISSING:
        return f"Build it from source ({BUILD}); what the package index has as `apex` is another project."
    return f"Build it anew with its compiled part: {BUILD}"


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Begin FusedAdam's counters at 0: left to itself, it counts a first update that is skipped."""
    if decides_on_device(optimizer):
        import torch

        for group in optimizer.param_groups:
            group["step"] = torch.zeros(1, dtype=torch.int, device=group["params"][0].device)


def decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is apex's FusedAdam in the form that `update` steps."""
    return getattr(optimizer, "capturable", False) is True and hasattr(optimizer, "_dummy_overflow_buf")


def update(optimizer: Any, finite: Tensor, grad_scale: Tensor | None) -> None:
    """Step apex's FusedAdam: divide the gradients by `grad_scale`, skip everything where `finite` does not hold.

    Args:
        optimizer: one for which `decides_on_device` holds.
        finite: bool ().
        grad_scale: float32 (); None for 1.
    """
    import torch

    skip_1 = (~finite).to(optimizer._dummy_overflow_buf.dtype).reshape(1)
    # It counts a group's step before it looks at this step's answer, by the flag as the group or step before left it:
    # with the answer put there first, all groups count the steps that are taken, and nothing must outlast a checkpoint.
    optimizer._dummy_overflow_buf.copy_(skip_1)
    scale_1 = torch.ones(1, device=finite.device) if grad_scale is None else grad_scale.reshape(1)
    optimizer.step(grad_scaler=_Answers(skip_1, scale_1))


class _Answers:
    """What apex asks of torch's GradScaler, by the names under which it asks."""

    def __init__(self, skip_1: Tensor, scale_1: Tensor) -> None:
        self._skip_1, self._scale_1 = skip_1, scale_1

    def _check_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor]:
        return {self._skip_1.device: self._skip_1}

    def _get_scale_async(self) -> Tensor:
        return self._scale_1
