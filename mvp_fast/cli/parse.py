"""Command-line parsing shared by the verbs: a dataclass with docstrings in, an instance out (tyro)."""

from __future__ import annotations

from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parse(options: type[Options], argv: list[str], verb: str) -> Options:
    """Parse `argv` into `options`; a wrong command line prints what is wrong and exits with 2."""
    return tyro.cli(options, args=argv, prog=f"mvp-fast {verb}", config=(tyro.conf.AvoidSubcommands,))
