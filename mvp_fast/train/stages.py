"""The stages of a training step, by name: where the step says what it is doing, for those who measure it.

`load` is a batch being made, on the loader's thread; `host` is what the others leave over of a step's time.

A recorder is called with a stage's name and returns a context manager around it; `unrecorded` costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

Stage = Literal[
    "load",
    "data wait",
    "copy",
    "patchify",
    "teacher",
    "student forward",
    "loss",
    "backward",
    "clip",
    "optimizer",
    "host",
]
STAGES: tuple[Stage, ...] = get_args(Stage)
StageRecorder = Callable[[Stage], AbstractContextManager[None]]

_NOTHING: AbstractContextManager[None] = nullcontext()


def unrecorded(stage: Stage) -> AbstractContextManager[None]:
    """Record nothing."""
    return _NOTHING
