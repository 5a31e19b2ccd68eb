"""The parts of a checkpoint: named tensors in safetensors files, through torch.distributed.checkpoint's storage."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

from torch import Tensor

from mvp_fast.errors import DataError

INDEX = "model.safetensors.index.json"  # tensor -> file; the storage writer's name for it
# One process writes on purpose, see checkpoint.py.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
Parts = dict[str, dict[str, Tensor]]


def write_part(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write one part into `folder`, and all of it to the disk.

    Raises:
        OSError: it could not be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.mkdir(parents=True, exist_ok=True)
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise (cause if isinstance(cause, OSError) else OSError(errno.EIO, str(cause))) from error
    for path in (*folder.iterdir(), folder):
        sync(path)


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """One named part of a checkpoint as host tensors.

    Raises:
        DataError: the part is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    older = "Go on from an older one with --resume PATH"
    if not (path / part).is_dir():
        raise DataError(f"The checkpoint has no part `{part}`", where=str(path), fix=older)
    tensors: dict[str, Tensor] = {}
    file = path / part / INDEX
    try:
        # A part may be empty: an optimizer before its first update has no state.
        files = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        for file in sorted({path / part / name for name in files.values()}):
            tensors.update(load_file(file))
        if lost := sorted(files.keys() - tensors.keys()):
            raise KeyError(f"{', '.join(lost[:3])} not found")
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise DataError(f"The checkpoint is damaged: {reason}", where=str(file), fix=older) from error
    return tensors


def sync(path: Path) -> None:
    """Make a file's content, or renames and new files in a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
