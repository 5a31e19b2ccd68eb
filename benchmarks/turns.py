"""Two revisions take turns: the line between a benchmark process and the one that gives the turns.

One message is one line of JSON over a Unix socket.

    process -> giver   {"hello": {...}}                         once: what this process measures
    process -> giver   {"ready": name, "facts": {...}}          a benchmark is set up, checked and warm
    giver -> process   {"go": true}                             run a round
    process -> giver   {"seconds": s, "calibration": {...}}
    giver -> process   {"go": false}                            the benchmark is over
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any


class Line:
    """Messages, a line of JSON each, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.stream = connection, connection.makefile("rw", encoding="utf-8")

    def send(self, message: Mapping[str, Any]) -> None:
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other side is gone."""
        try:
            line = self.stream.readline()
        except ConnectionError:
            return None
        return dict(json.loads(line)) if line.endswith("\n") else None

    def close(self) -> None:
        self.stream.close()
        self.connection.close()


class Turns:
    """A benchmark process's side.

    Args:
        path: of the giver's socket.
        hello: what this process measures.
    """

    def __init__(self, path: str, hello: Mapping[str, Any]) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        self.line = Line(connection)
        self.line.send({"hello": dict(hello)})

    def of(self, name: str, facts: Mapping[str, Any]) -> Iterator[Turn]:
        """The turns that a benchmark is given, as long as there are any; each must be `done` before the next."""
        self.line.send({"ready": name, "facts": dict(facts)})
        while (answer := self.line.receive()) is not None and answer["go"]:
            yield Turn(self.line)


class Turn:
    """One round's permission to run."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def done(self, seconds: float, calibration: Mapping[str, float]) -> None:
        """Hand in what the round took, and so the turn."""
        self.line.send({"seconds": seconds, "calibration": dict(calibration)})
