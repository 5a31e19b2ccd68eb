"""Errors meant for users: one paragraph each (what happened, where, what to do) and one exit code a kind.

0  done
2  usage or configuration      ConfigError
3  data                        DataError
4  environment                 EnvironmentProblem
5  training diverged           TrainingDiverged
75 preempted, checkpoint written, try again    Preempted
"""

from __future__ import annotations


class UserError(Exception):
    """An error a user can act on. `mvp-fast` prints it as one paragraph and exits with `exit_code`.

    Args:
        what: what happened, a sentence without its full stop.
        where: the file, field or step it happened at; may be empty.
        fix: what to do about it, a sentence without its full stop; may be empty.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.paragraph())

    def paragraph(self) -> str:
        """The message as one paragraph: what, where, what to do."""
        what = f"{self.what.rstrip('.')} ({self.where})" if self.where else self.what
        sentences = [text if text.endswith((".", "?", "!")) else f"{text}." for text in (what, self.fix) if text]
        return " ".join(" ".join(sentences).split())


class ConfigError(UserError):
    """A wrong command line, config file or combination of fields."""

    exit_code = 2
    kind = "configuration error"


class DataError(UserError):
    """Images, index files or checkpoints that are missing, broken or do not fit."""

    exit_code = 3
    kind = "data error"


class EnvironmentProblem(UserError):
    """The machine lacks something: a package, a GPU, disk space, a right."""

    exit_code = 4
    kind = "environment error"


class TrainingDiverged(UserError):
    """The loss or a gradient stayed non-finite for longer than the budget allows."""

    exit_code = 5
    kind = "training diverged"


class Preempted(UserError):
    """The run was asked to stop and wrote a checkpoint; the same command goes on from there."""

    exit_code = 75
    kind = "preempted"
