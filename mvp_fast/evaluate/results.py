"""results.json: what an evaluation found, with all that is needed to know what was evaluated."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from mvp_fast import __version__
from mvp_fast.errors import DataError
from mvp_fast.samples.files import replacing

SCHEMA = 1


def write_results(path: Path, verb: str, content: Mapping[str, Any]) -> None:
    """Write `path`: beside, then renamed, so that no reader sees half a file.

    Args:
        path: the file; its folder is made where missing.
        verb: of mvp-fast: probe, finetune, ...
        content: JSON-able. By custom: `backbone` (words, fingerprint, step), `data` (each set's index fingerprint and
            number of images), `settings`, and the figures. Accuracies are shares in [0, 1].

    Raises:
        EnvironmentProblem: it can't be written.
    """
    about = {
        "schema": SCHEMA,
        "verb": verb,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "versions": {"mvp_fast": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    with replacing(path) as file:
        file.write((json.dumps({**about, **content}, indent=1) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        DataError: it is missing, damaged, or of another schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"These are no results of an evaluation: {error}", where=str(path)) from error
    if schema != SCHEMA:
        raise DataError(f"The results have schema {schema}, this program reads {SCHEMA}", where=str(path))
    return content
