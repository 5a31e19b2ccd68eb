"""Checkpoints: written in the background beside their place, then renamed; read without unpickling anything.

    RUN/checkpoints/
        step-00001000/
            state.json                  step, plan, configuration, teacher: what must fit when a run goes on
            student/*.safetensors       one folder a named part, timm's names inside
            optimizer/*.safetensors
            ema/*.safetensors           only with train.ema_decay
            progress/*.safetensors      losses since the last metric line
        .step-00002000.partial/         being written, or left by a crash; never read, removed at the next start
        superseded-step-00003000/       of a course that the run left when it went on from an earlier step

The tensors go through torch.distributed.checkpoint with its safetensors storage. They are whole, whatever
train.sharding is, and rank 0 alone writes them: so any number of ranks can go on, sharded or not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_fast.config.load import config_from_dict
from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.student import Student
from mvp_fast.train.parts import Parts, read_part, sync, write_part
from mvp_fast.train.sharding import shard_like

STATE_VERSION = 1
STATE_KEYS = frozenset({"step", "config", "plan", "total_steps", "skipped"})
PRETRAIN_KEYS = frozenset({"teacher", "target_width"})
_NAME = re.compile(r"step-\d{8,}")


class Checkpointer:
    """Writes checkpoints of one run, one at a time, in a background thread.

    Args:
        folder: RUN/checkpoints; made where missing.
        keep: newest checkpoints kept; 0 keeps all.
        active: False on the ranks that write nothing; every call is then free.
        start_step: the step that the run goes on from. Later checkpoints are of a course that it has left: they are set
            aside, so that they neither stand in the way of its own nor count as the newest.

    Attributes:
        superseded: checkpoints that were set aside, under their new names.

    Raises:
        EnvironmentProblem: the folder can't be made or written.
    """

    def __init__(self, folder: Path, keep: int, active: bool = True, start_step: int | None = None) -> None:
        self.folder, self.keep, self.active = folder, keep, active
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.superseded: list[Path] = []
        if active:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if start_step is not None:
                    self.superseded = _set_aside(folder, start_step)
            except OSError as error:
                raise _cannot_write(folder, error) from error
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, parts: Parts, state: dict[str, Any]) -> None:
        """Copy the tensors to the host now and write them in the background.

        Waits for the checkpoint before, and raises what went wrong with it.

        Raises:
            EnvironmentProblem: the checkpoint before this one could not be written.
        """
        self.wait()
        if not self.active or (self.folder / checkpoint_name(step)).exists():
            return
        staged = {
            part: {name: _host_copy(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()
        }
        self._pending = self._thread.submit(
            self._write, step, staged, {**state, "version": STATE_VERSION, "step": step}
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            EnvironmentProblem: it could not be written; the ones before it are whole.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait and give back the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, parts: Parts, state: dict[str, Any]) -> None:
        final = self.folder / checkpoint_name(step)
        partial = self.folder / f".{final.name}.partial"
        try:
            for part, tensors in parts.items():
                write_part(partial / part, tensors)
            with (partial / "state.json").open("w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
            sync(self.folder)
            self._drop_old()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _cannot_write(final, error) from error

    def _drop_old(self) -> None:
        if self.keep:
            for old in list_checkpoints(self.folder)[: -self.keep]:
                # Renamed first: a half-removed folder must not look like a checkpoint.
                trash = old.with_name(f".{old.name}.trash")
                os.replace(old, trash)
                shutil.rmtree(trash, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in RUN/checkpoints, oldest first."""
    return [path for path in _step_folders(folder) if (path / "state.json").is_file()]


def _step_folders(folder: Path) -> list[Path]:
    """The folders named as checkpoints are, whole or not, oldest first; `step-00000002-mine` is not one of them."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(run: Path, which: str = "latest") -> Path:
    """A run's checkpoint: `latest`, a step number, or a path.

    Raises:
        DataError: there is none such.
    """
    found = list_checkpoints(run / "checkpoints")
    if which == "latest":
        if found:
            return found[-1]
        raise DataError(
            "The run has no checkpoint",
            where=str(run),
            fix="Check the folder's name; train.checkpoint-every says how often a run writes one",
        )
    path = run / "checkpoints" / checkpoint_name(int(which)) if which.isdigit() else Path(which)
    if not (path / "state.json").is_file():
        have = ", ".join(str(step_of(p)) for p in found) or "none"
        raise DataError(f"There is no checkpoint {which}", where=str(path), fix=f"Steps with one in {run}: {have}")
    return path


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = state["version"]
        wanted = STATE_KEYS | (PRETRAIN_KEYS if state.get("task", "pretrain") == "pretrain" else frozenset())
        missing = sorted(wanted - state.keys()) if version == STATE_VERSION else []
        if missing:
            raise KeyError(*missing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"state.json lacks {', '.join(error.args)}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"This is no whole checkpoint: {reason}", where=str(path), fix="Name another checkpoint"
        ) from error
    if version != STATE_VERSION:
        raise DataError(
            f"The checkpoint has format version {version}, this program reads {STATE_VERSION}",
            where=str(path),
            fix="Use the version of mvp_fast that wrote it",
        )
    return dict(state)


def load_weights(model: torch.nn.Module, path: Path, part: str) -> None:
    """Load a part into `model`, name by name; a sharded one takes its part of each tensor.

    Raises:
        DataError: the checkpoint is of another model; says which weights differ.
    """
    tensors, own = read_part(path, part), model.state_dict()
    wrong = [
        f"{name} {tuple(tensors[name].shape) if name in tensors else 'missing'}"
        f" (model: {tuple(own[name].shape) if name in own else 'none'})"
        for name in sorted(own.keys() | tensors.keys())
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise DataError(
            f"The checkpoint is of another model: {len(wrong)} weights differ, first {'; '.join(wrong[:3])}",
            where=str(path / part),
            fix="Give the student.* settings that the checkpoint was trained with, or another checkpoint",
        )
    model.load_state_dict({name: shard_like(tensors[name], tensor) for name, tensor in own.items()})


def load_student(run: Path, checkpoint: str = "latest", ema: bool = False) -> tuple[Student, Config, int]:
    """The student of a run, its configuration, and the step it had reached.

    Args:
        run: the run's folder.
        checkpoint: `latest`, a step number, or a checkpoint's path.
        ema: take the averaged weights.

    Raises:
        DataError: there is no such checkpoint, or it is damaged.
        ConfigError: averaged weights were asked for and the run kept none.
    """
    path = find_checkpoint(run, checkpoint)
    state = read_state(path)
    if state.get("task", "pretrain") != "pretrain":
        raise DataError(
            f"The checkpoint is of no pre-trained student, but of a run of the task {state['task']}",
            where=str(path),
            fix="Name the run of `mvp-fast train` that it began with",
        )
    config = config_from_dict(state["config"], source=str(path / "state.json"))
    if ema and not (path / "ema").is_dir():
        raise ConfigError("The run kept no averaged weights", where=str(path), fix="Leave --ema out")
    student = Student(
        config.student,
        target_width=state["target_width"],
        image_size=config.data.image_size,
        seed=config.seed,
    )
    load_weights(student, path, "ema" if ema else "student")
    return student, config, int(state["step"])


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy that later updates don't touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _set_aside(folder: Path, start_step: int) -> list[Path]:
    """Rename what is later than `start_step`, whole or not; an earlier one set aside under that name makes room."""
    aside = []
    for path in _step_folders(folder):
        if step_of(path) > start_step:
            aside.append(path.with_name(f"superseded-{path.name}"))
            shutil.rmtree(aside[-1], ignore_errors=True)
            os.replace(path, aside[-1])
    return aside


def _cannot_write(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"The checkpoint could not be written: {error.strerror or error}",
        where=str(path),
        fix="Free some space or mend the folder's rights and give the same command with --resume auto: "
        "earlier checkpoints are whole",
    )
