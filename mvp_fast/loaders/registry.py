"""From a backend's name to a loader."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mvp_fast.config.check import check_interpolation
from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.loaders.base import Loader
from mvp_fast.loaders.failures import BadSamples

if TYPE_CHECKING:
    import torch

LOADERS = ("dali", "torchvision", "ffcv", "synthetic")


def make_loader(
    name: str,
    config: DataConfig,
    *,
    seed: int = 0,
    local_ranks: int = 1,
    ledger: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Loader:
    """Make the loader called `name`.

    Args:
        name: dali, torchvision, ffcv or synthetic.
        config: interpolation, threads and the budget for bad samples; the rest of it is in the plan.
        seed: decides the pixels of `synthetic`; the other backends draw nothing.
        local_ranks: ranks on this machine, among which its cores are divided where config.threads is 0.
        ledger: JSON-lines file for bad samples; None keeps them in memory alone.
        device: where `synthetic` keeps its batch; the other backends' batches are on the CPU.

    Raises:
        ConfigError: there is no such loader, or it does not have the filter.
        EnvironmentProblem: its package is not installed.
    """
    if name in LOADERS:
        check_interpolation(name, config.interpolation)
    if name == "synthetic":
        from mvp_fast.loaders.synthetic import SyntheticLoader

        return SyntheticLoader(seed=seed, device=device)
    if name == "torchvision":
        from mvp_fast.loaders.torchvision import TorchvisionLoader

        return TorchvisionLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    if name == "dali":
        _need_dali()
        from mvp_fast.loaders.dali import DaliLoader

        return DaliLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    if name == "ffcv":
        from mvp_fast.loaders.ffcv_library import need_ffcv

        need_ffcv("data.loader ffcv")
        from mvp_fast.loaders.ffcv import FfcvLoader

        return FfcvLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    near = difflib.get_close_matches(name, LOADERS, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else "Choose one of " + ", ".join(LOADERS)
    raise ConfigError(f"There is no loader `{name}`", where="data.loader", fix=hint)


def _need_dali() -> None:
    """EnvironmentProblem where nvidia.dali cannot be imported."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the parent package
        found = False
    if not found:
        raise EnvironmentProblem(
            "The loader `dali` needs NVIDIA DALI, which is not installed",
            where="data.loader",
            fix="Install the package nvidia-dali-cuda130 (Linux), or take the slower --data.loader torchvision",
        )
