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

LOADERS = ("dali", "cpu", "torchvision", "ffcv", "synthetic")


def resolve(name: str, config: DataConfig, device: torch.device | str) -> str:
    """The backend that `name` stands for in a run on `device`: itself, or what `auto` chooses."""
    if name != "auto":
        return name
    return "dali" if decodes_on_gpu(config, device) else "cpu"


def decodes_on_gpu(config: DataConfig, device: torch.device | str) -> bool:
    """Whether `dali` decodes on the GPU in a run on `device`.

    Raises:
        EnvironmentProblem: it is asked to, and there is no GPU.
        ConfigError: it is asked to, in a run on the CPU.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    if config.decode == "gpu" and not on_gpu:
        where, fix = "data.decode gpu", "Set data.decode to auto or cpu"
        if not torch.cuda.is_available():
            raise EnvironmentProblem("Images can't be decoded on a GPU: there is no CUDA device", where=where, fix=fix)
        raise ConfigError("Images can't be decoded on a GPU in a run on the CPU", where=where, fix=fix)
    return on_gpu and config.decode != "cpu"


def describe(config: DataConfig, device: torch.device | str) -> str:
    """The backend of a run on `device` in a few words, for its header."""
    name = resolve(config.loader, config, device)
    words = name
    if name == "dali":
        on_gpu = decodes_on_gpu(config, device)
        words += f" on the GPU (hardware decoder load {config.hw_decoder_load:g})" if on_gpu else " on the CPU"
    return f"{words}, chosen by auto" if config.loader == "auto" else words


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
        name: auto, dali, cpu, torchvision, ffcv or synthetic.
        config: interpolation, threads and the budget for bad samples; the rest of it is in the plan.
        seed: decides the pixels of `synthetic`; the other backends draw nothing.
        local_ranks: ranks on this machine, among which its cores are divided where config.threads is 0.
        ledger: JSON-lines file for bad samples; None keeps them in memory alone.
        device: the run's. `synthetic` keeps its batch there, and `dali` makes it there where it decodes on the GPU; the
            other backends' batches are on the CPU.

    Raises:
        ConfigError: there is no such loader, or it does not have the filter.
        EnvironmentProblem: its package is not installed, or there is no GPU for it.
    """
    name = resolve(name, config, device)
    if name in LOADERS:
        check_interpolation(name, config.interpolation)
    if name == "synthetic":
        from mvp_fast.loaders.synthetic import SyntheticLoader

        return SyntheticLoader(seed=seed, device=device)
    if name == "torchvision":
        from mvp_fast.loaders.torchvision import TorchvisionLoader

        return TorchvisionLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    if name == "dali":
        _need("nvidia.dali", "dali", "NVIDIA DALI", "nvidia-dali-cuda130")
        from mvp_fast.loaders.dali import DaliLoader

        gpu = device if decodes_on_gpu(config, device) else None
        return DaliLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger), gpu=gpu)
    if name == "cpu":
        _need("nvidia.nvimgcodec", "cpu", "NVIDIA nvImageCodec", "nvidia-nvimgcodec-cu13")
        from mvp_fast.loaders.cpu import CpuLoader

        return CpuLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    if name == "ffcv":
        from mvp_fast.loaders.ffcv_library import need_ffcv

        need_ffcv("data.loader ffcv")
        from mvp_fast.loaders.ffcv import FfcvLoader

        return FfcvLoader(config, local_ranks=local_ranks, failures=BadSamples(config, ledger))
    near = difflib.get_close_matches(name, LOADERS, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else "Choose one of auto, " + ", ".join(LOADERS)
    raise ConfigError(f"There is no loader `{name}`", where="data.loader", fix=hint)


def _need(module: str, loader: str, product: str, package: str) -> None:
    """EnvironmentProblem where the module cannot be imported."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the parent package
        found = False
    if not found:
        raise EnvironmentProblem(
            f"The loader `{loader}` needs {product}, which is not installed",
            where="data.loader",
            fix=f"Install the package {package} (Linux), or take the slower --data.loader torchvision",
        )
