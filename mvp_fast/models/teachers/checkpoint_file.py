"""Reading a teacher's checkpoint file without running anything that it may contain."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mvp_fast.errors import DataError

RANDOM = "random"  # in place of a file
FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read_checkpoint(path: Path) -> Any:
    """What a safetensors file, or one of torch.save that holds tensors alone, contains.

    Raises:
        DataError: it can't be read, or would have to run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"teacher.pretrained {path}"
    if _is_torchscript(path):
        raise DataError(
            "The checkpoint is a TorchScript archive, a program rather than weights, and is not loaded",
            where=where,
            fix='Where you trust it, write its weights to a file of their own once: python -c "import torch;'
            f" torch.save(dict(torch.jit.load('{path}', map_location='cpu').state_dict()), '{path.stem}-weights.pt')\","
            " and give that file (OpenAI's weights with a teacher.name that ends in -quickgelu)",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            "The checkpoint is damaged, or holds objects that would run code when loaded, and is not loaded",
            where=where,
            fix="Save its state_dict alone, or give a safetensors file",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise DataError(
            f"The checkpoint can't be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=where,
            fix="Copy or download it again",
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in archive.namelist())
