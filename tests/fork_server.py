"""Runs `mvp-fast` in processes forked from one that has done the imports: a start takes a second rather than ten.

What is forked is a process of its own in every other respect: signals, exit code, standard streams, death. Requests and
answers are JSON, one a line, on standard input and output (conftest's Launcher speaks them):

    {"argv": [...], "environment": {...}, "out": path, "err": path}    {"pid": n}
    {"poll": pid}                                                      {"code": exit code, -signal, or null}

At the end of its input the server kills what still runs and ends. It stays single-threaded, or forking would be unsafe.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

from mvp_fast.cli.main import main

AHEAD = (
    "mvp_fast.cli.finetune",
    "mvp_fast.cli.train",
    "mvp_fast.evaluate.finetune.build",
    "mvp_fast.evaluate.segment.finish",
    "mvp_fast.loaders.dali",
    "mvp_fast.loaders.torchvision",
    "mvp_fast.train.loop",
    "nvidia.dali.fn",
    "open_clip",
    "torch.distributed.checkpoint.hf_storage",
    "tyro",
)


def fork(request: dict[str, Any]) -> int:
    """Start one process; returns its number. In that process it does not return."""
    pid = os.fork()
    if pid:
        return pid
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.setsid()
    os.environ.update(request["environment"])
    sys.argv = ["mvp-fast", *request["argv"]]
    sys.exit(main(request["argv"]))


def serve() -> None:
    """Answer requests until there are no more."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            answer = {"pid": fork(request)}
            running.add(answer["pid"])
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for module in AHEAD:
        importlib.import_module(module)
    serve()
