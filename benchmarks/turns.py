"""Two revisions take turns: the line between a benchmark process (a side) and the one that gives the turns.

One message is one line of JSON over a Unix socket.

    side -> giver   {"hello": {...}}                         where its packages were found; more than once
    side -> giver   {"benchmarks": {...}, "refused": {...}, "machine": {...}}    once, before the first benchmark
    side -> giver   {"ready": name, "facts": {...}}          a benchmark is set up, checked and warm
    giver -> side   {"go": true}                             run a round
    side -> giver   {"seconds": s, "calibration": {...}}
    giver -> side   {"go": false}                            the benchmark is over
    side -> giver   {"over": name, "outcome": ..., "why": ...}    what became of it, also of one that was never ready

`side.py` speaks for the process as a whole, `Turns` for the benchmark that runs. The other end is `side_process.py`,
which `giver.py` uses.
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

PIECE = 1 << 16


class Gone(ConnectionError):
    """The process at the other end of the line has ended."""


class Line:
    """Messages, a line of JSON each, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rest = connection, b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message.

        Raises:
            Gone: nobody is there to read it.
        """
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError as error:
            raise Gone from error

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            Gone: there is none, and nobody to send one.
            TimeoutError: none within the connection's timeout, where it has one; asking again is safe.
        """
        while b"\n" not in self.rest:
            try:
                piece = self.connection.recv(PIECE)
            except ConnectionError as error:
                raise Gone from error
            if not piece:
                raise Gone
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\n")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the line; the other side notices."""
        self.connection.close()


@functools.cache
def connect(address: str) -> Line:
    """The line to the giver, one a process: `address` is a socket's path, or an inherited one's descriptor."""
    if address.isdecimal():
        connection = socket.socket(fileno=int(address))
        connection.set_inheritable(False)  # a process that this one starts has no part in it
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    return Line(connection)


class Turns:
    """A benchmark process's side.

    Args:
        address: of the giver; see `connect`.
        hello: what this process measures.
    """

    def __init__(self, address: str, hello: Mapping[str, Any]) -> None:
        self.line = connect(address)
        self.line.send({"hello": dict(hello)})

    def of(self, name: str, facts: Mapping[str, Any]) -> Iterator[Turn]:
        """The turns that a benchmark is given, as long as there are any; each must be `done` before the next.

        Raises:
            Gone: the giver has ended.
        """
        self.line.send({"ready": name, "facts": dict(facts)})
        while self.line.receive()["go"]:
            yield Turn(self.line)


class Turn:
    """One round's permission to run."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def done(self, seconds: float, calibration: Mapping[str, float]) -> None:
        """Hand in what the round took, and so the turn."""
        self.line.send({"seconds": seconds, "calibration": dict(calibration)})
