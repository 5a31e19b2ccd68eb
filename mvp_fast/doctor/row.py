"""What `mvp-fast doctor` finds: a row a part. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

LONGEST = 240  # characters of a package's error message that are shown


class State(StrEnum):
    """How a part is."""

    OK = "ok"
    NOTE = "note"  # it works, and something about it costs speed or safety
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True)
class Row:
    """One part.

    Attributes:
        part: its name.
        state: how it is.
        found: what was found, in words.
        loses: what one loses as it is; empty where nothing.
        fix: the command that brings or mends it, or what to do; empty where there is nothing to do.
        needed: training with the default settings needs it here; set once all parts are known.
        facts: figures and names, for programs.
    """

    part: str
    state: State
    found: str
    loses: str = ""
    fix: str = ""
    needed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether the part can be used."""
        return self.state in (State.OK, State.NOTE)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `as_dict` gave."""
        return cls(**{**values, "state": State(values["state"])})


def told(error: BaseException) -> str:
    """An exception in one line: its type and the first of what it says."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def installed(package: str) -> str:
    """A package's version; "" where its metadata are not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def importable(module: str) -> bool:
    """Whether there is such a module; it is not imported, but the packages above it are.

    Raises:
        Exception: what a package above it raises.
    """
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: it stands in sys.modules as not there
        return False


def install(package: str, *options: str) -> str:
    """The command that installs `package`, with the version that this project asks for, into this Python."""
    asked = package
    try:
        texts = importlib.metadata.requires("mvp-fast") or []
    except importlib.metadata.PackageNotFoundError:
        texts = []
    for text in texts:
        named = re.match(r"[\w.-]+", text)
        if named and re.sub(r"[-_.]+", "-", named[0]).lower() == re.sub(r"[-_.]+", "-", package).lower():
            asked = text.partition(";")[0].strip()
            break
    here = sys.executable
    command = [here, "-m pip install"] if importlib.util.find_spec("pip") else ["uv pip install --python", here]
    return " ".join([*command, *options, f"'{asked}'"])


def package(part: str, name: str, loses: str, try_it: Callable[[], Row], module: str | None = None) -> Row:
    """The row of a package: missing, broken with the exception's words, or what `try_it` says.

    Args:
        part: the row's name.
        name: as it is installed.
        loses: what one loses without it.
        try_it: imports it and tries it out.
        module: as it is imported; `name` where None.
    """
    try:
        if not importable(module or name):
            return Row(part, State.MISSING, "not installed", loses, install(name))
        return try_it()
    except (Exception, SystemExit) as error:  # whatever another project's code raises
        version = installed(name)
        words = f"{version}, does not work: {told(error)}" if version else f"does not work: {told(error)}"
        return Row(part, State.BROKEN, words, loses, install(name, "--force-reinstall"))
