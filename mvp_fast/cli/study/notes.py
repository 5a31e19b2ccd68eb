"""What is known of a study's steps: which are begun, which are done, with which settings, and by which sources.

A step is done once. Its figures stand for its settings as long as what it left behind is there, and nothing that it was
made from was made anew; where that is not so, nothing old is passed off as new: the study says what to remove.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.study.steps import Step
from mvp_fast.samples.files import replacing

SURROUNDINGS = ("--data.threads", "--threads")
"""Options that change no figure: their values may differ from call to call."""


@dataclass(frozen=True)
class Note:
    """Of one step.

    Attributes:
        digest: of the command, of the settings file that it names, and of all that it is made from.
        seconds: that it took, over all its starts.
        done: one of its own each time the step was finished; empty where it was begun alone.
        made_from: step -> its `done`, of those that this one needs.
        commit: of the sources that began it; empty where they are in no repository.
        dirty: whether they differed from that commit.
    """

    digest: str
    seconds: float = 0.0
    done: str = ""
    made_from: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    dirty: bool = False


class Notes:
    """The notes of a study, a small file a step.

    Args:
        folder: for the files.
        steps: of the study, each after those that it needs.
    """

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder, self.digests, self.steps = folder, digests(steps), {step.name: step for step in steps}
        folder.mkdir(parents=True, exist_ok=True)
        self.commit, self.dirty = sources()

    def path(self, step: Step) -> Path:
        """Where the step's note is."""
        return self.folder / f"{step.name.replace('/', '.')}.json"

    def read(self, step: Step) -> Note | None:
        """The step's note; None where there is none.

        Raises:
            DataError: it is damaged.
        """
        path = self.path(step)
        with suppress(FileNotFoundError):
            try:
                return Note(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"The note of a step can't be read: {error}",
                    where=str(path),
                    fix=f"Remove it and {step.output}: the step is then done anew",
                ) from error
        return None

    def is_done(self, step: Step) -> bool:
        """Whether the step is done, by these settings and by what is there now of all that it needs.

        Raises:
            ConfigError: it was begun with other settings, or what it was made from was made anew since.
        """
        note = self.read(step)
        if note is None or not step.output.exists():
            return False
        remove = f"Give another --folder, or remove {step.output} to have it made anew"
        if note.digest != self.digests[step.name]:
            raise ConfigError(
                f"The step {step.name} was begun with other settings, of its own or of what it is made from",
                where=str(self.path(step)),
                fix=remove,
            )
        newer = [need for need, done in self._made_from(step).items() if note.made_from.get(need) != done]
        if newer:
            raise ConfigError(
                f"The step {step.name} was made from an earlier {newer[0]}", where=str(step.output), fix=remove
            )
        return bool(note.done) and (step.output / step.proof).exists()

    def check_before(self, left: Sequence[Step]) -> None:
        """Look through what is to be done, before any of it is begun.

        Args:
            left: the steps that are not done.

        Raises:
            ConfigError: what is there of a step does not belong to what is to be made.
        """
        names = {step.name for step in left}
        for step in left:
            self.is_done(step)
            remade = [need for need in step.needs if need in names]
            if remade and self.read(step) is not None and step.output.exists():
                raise ConfigError(
                    f"The step {remade[0]} is to be done anew, but {step.name} was made from the earlier one",
                    where=str(step.output),
                    fix="Remove it too, or give another --folder",
                )

    def begin(self, step: Step) -> None:
        """Say that it is begun; what it needs is done."""
        note = self.read(step)
        earlier = note.seconds if note is not None and step.output.exists() else 0.0
        self._write(step, earlier, "")

    def finish(self, step: Step, seconds: float, *, done: bool) -> float:
        """Add the seconds of a start; returns those of all of them."""
        note = self.read(step)
        total = (0.0 if note is None else note.seconds) + seconds
        self._write(step, total, uuid.uuid4().hex if done else "")
        return total

    def _made_from(self, step: Step) -> dict[str, str]:
        found = {}
        for need in step.needs:
            note = self.read(self.steps[need])
            found[need] = "" if note is None else note.done
        return found

    def _write(self, step: Step, seconds: float, done: str) -> None:
        digest = self.digests[step.name]
        note = Note(digest, round(seconds, 2), done, self._made_from(step), self.commit, self.dirty)
        with replacing(self.path(step), "--folder") as file:
            file.write((json.dumps(asdict(note)) + "\n").encode())


def digests(steps: Sequence[Step]) -> dict[str, str]:
    """Of each step: what decides its figures, as a hash."""
    found: dict[str, str] = {}
    for step in steps:
        words = list(_without(step.argv, SURROUNDINGS))
        if "--config" in words:
            text = Path(words[words.index("--config") + 1]).read_text(encoding="utf-8")
            words.append(json.dumps(yaml.safe_load(text), sort_keys=True))  # a comment changes nothing
        words += [found[need] for need in step.needs]
        found[step.name] = hashlib.sha256("\0".join(words).encode()).hexdigest()
    return found


def _without(argv: Sequence[str], names: Iterable[str]) -> Iterable[str]:
    """The words but these options and their values."""
    skip = False
    for word in argv:
        if not skip and word not in names:
            yield word
        skip = not skip and word in names


def sources() -> tuple[str, bool]:
    """The commit that this program is of, and whether its sources differ from it; ("", False) outside a repository."""

    def git(*words: str) -> str:
        here = Path(__file__).parents[2]
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=here)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    root = git("rev-parse", "--show-toplevel")
    changed = git("-C", root, "status", "--porcelain", "--", "mvp_fast", "kernels", "configs") if root else ""
    return git("rev-parse", "HEAD"), bool(changed)
