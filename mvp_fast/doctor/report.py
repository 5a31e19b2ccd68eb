"""All checks, which of their findings training needs here, and what it comes to in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mvp_fast.doctor.isolate import Check, look
from mvp_fast.doctor.row import Row, State

_MAKE = "make install, in a checkout of mvp_fast"
CHECKS = [
    Check("GPU", "mvp_fast.doctor.gpu", "gpu_rows"),
    Check("torch", "mvp_fast.doctor.packages", "torch_row", _MAKE),
    Check("torchvision", "mvp_fast.doctor.packages", "torchvision_row", _MAKE),
    Check("Triton", "mvp_fast.doctor.packages", "triton_row", _MAKE),
    Check("DALI", "mvp_fast.doctor.decoders", "dali_row", _MAKE),
    Check("nvImageCodec", "mvp_fast.doctor.decoders", "nvimgcodec_rows", _MAKE),
    Check("timm", "mvp_fast.doctor.packages", "timm_row", _MAKE),
    Check("open_clip", "mvp_fast.doctor.packages", "open_clip_row", _MAKE),
    Check("libraries", "mvp_fast.doctor.packages", "library_row", _MAKE),
    Check("FFCV", "mvp_fast.doctor.packages", "ffcv_row", _MAKE),
    Check("apex", "mvp_fast.doctor.packages", "apex_row"),
    Check("wandb", "mvp_fast.doctor.packages", "wandb_row"),
    Check("machine", "mvp_fast.doctor.machine", "machine_rows"),
    Check("data", "mvp_fast.doctor.disk", "disk_rows"),
]
NEEDED = frozenset({"torch", "torchvision", "timm", "open_clip", "libraries", "data"})
"""Parts that training needs everywhere; the data only where one asks about them."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        can_train: whether `mvp-fast train` with its default settings can run here.
        verdict: what this machine can do, or what keeps it from it.
    """

    rows: list[Row]
    can_train: bool
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [row.as_dict() for row in self.rows]
        return {"can_train": self.can_train, "verdict": self.verdict, "rows": rows}


def examine(data: str, runs: str, began: Callable[[str], None] = lambda part: None) -> Report:
    """Look at everything.

    Args:
        data: an index or a folder of images whose disk is measured; "" for none.
        runs: where runs go.
        began: told of each part as its check begins.
    """
    return judge([row for rows in look(CHECKS, {"data": data, "runs": runs}, began) for row in rows])


def judge(rows: list[Row]) -> Report:
    """Mark the rows that training needs here, and say what it comes to."""
    found = {row.part: row for row in rows}
    needed = NEEDED | _needed_here(found)
    rows = [replace(row, needed=row.part in needed) for row in rows]
    lacking = [row for row in rows if row.needed and not row.works]
    if not lacking:
        return Report(rows, True, f"This machine can train: {_abilities(found)}.")
    faults = ", ".join(f"{row.part} is {row.state}" for row in lacking)
    return Report(rows, False, f"This machine can't train with the default settings: {faults}.{_way_round(lacking)}")


def _needed_here(found: dict[str, Row]) -> set[str]:
    """A GPU that torch can't use is a fault; `auto` takes DALI and Triton on a GPU, nvImageCodec elsewhere."""
    needed: set[str] = {part for part in ("GPU", "driver") if part in found and found[part].state is State.BROKEN}
    torch = found.get("torch")
    if torch is None or not torch.works:
        return needed
    return needed | ({"DALI", "Triton"} if torch.facts["device"] == "cuda" else {"nvImageCodec"})


def _abilities(found: dict[str, Row]) -> str:
    facts = found["torch"].facts
    gpu = found["GPU"]
    device = f"on {gpu.facts['count']} x {gpu.facts['name']}" if facts["device"] == "cuda" else "on the CPU"
    optimizers = "adamw fused by torch"
    apex = found.get("apex")
    if apex is not None and apex.state is State.OK and facts["device"] == "cuda":
        optimizers += ", fusedadamw and fusedlamb by apex"
    words = [f"{device}", f"loader {facts['loader']}", f"{facts['kernels']} kernels", f"optimizers {optimizers}"]
    if found.get("FFCV") is not None and found["FFCV"].works:
        words.append("betons by FFCV")
    return "; ".join(words)


def _way_round(lacking: list[Row]) -> str:
    """What can run meanwhile, where only parts that `auto` chooses are lacking."""
    parts = {row.part for row in lacking}
    if not parts <= {"DALI", "nvImageCodec", "Triton"}:
        return ""
    loader = "" if parts == {"Triton"} else " --data.loader torchvision"
    kernels = " --kernels.impl reference" if "Triton" in parts else ""
    return f" Until then: mvp-fast train{loader}{kernels}."
