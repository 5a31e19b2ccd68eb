"""Batches made ahead by a thread and, for a GPU, copied there while earlier steps compute.

The thread pins each batch and copies it on a stream of its own; an event marks the end of the copy. The loader runs
under that stream too: a batch that it makes on the device itself, in that stream's order, is passed on as it is, and
the same event says when it is there. The consumer's stream waits for that event on the device, so the host never waits
for a copy. `record_stream` tells the allocator that the consumer's stream uses the memory, which came from the copying
stream's pool; pinned memory is kept by torch's host allocator until the copy that reads it is over.

Shape legend: as in `loaders.base`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Literal

import torch

from mvp_fast.loaders.base import Batch, Loader
from mvp_fast.samples.plan import SamplePlan

THREAD = "mvp-prefetch"  # the thread's name
# Told what the thread does, as it begins and ends: a batch is made, a batch is copied.
Recorder = Callable[[Literal["load", "copy"]], AbstractContextManager[None]]

_NOTHING: AbstractContextManager[None] = nullcontext()


class Prefetcher:
    """Iterates over `loader.batches(plan, start_step)`, at most `depth` batches ahead, with tensors on `device`.

    Use it as a context manager, or call `close`. What the loader raises is raised by `next`, with its traceback,
    after the batches made before it.

    Args:
        loader: makes the batches; only this object's thread iterates over it.
        plan: what to carry out.
        start_step: first step.
        device: where the consumer wants the tensors.
        depth: batches ready and waiting, at most; one more may be in the thread's hands.
        stage: told of each batch's making and copy, in the thread that does it.

    Attributes:
        wait_seconds: wall time that the consumer has spent waiting in `next` so far.
    """

    def __init__(
        self,
        loader: Loader,
        plan: SamplePlan,
        start_step: int,
        device: torch.device | str,
        depth: int = 2,
        stage: Recorder = lambda stage: _NOTHING,
    ) -> None:
        self.wait_seconds, self._stage = 0.0, stage
        self._loader, self._device, self._depth = loader, torch.device(device), max(1, depth)
        self._ready: deque[tuple[Batch, torch.cuda.Event | None]] = deque()
        self._changed = threading.Condition()
        self._stopped = self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(plan, start_step), name=THREAD, daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._stopped)
            self.wait_seconds += time.perf_counter() - start
            if self._stopped or not self._ready:
                if self._error is not None and not self._stopped:
                    raise self._error
                raise StopIteration
            batch, copied = self._ready.popleft()
            self._changed.notify_all()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in (batch.images_BHWC, batch.masked_BM, batch.target):
                if tensor is not None:
                    tensor.record_stream(stream)
        return batch

    def peek(self) -> Batch | None:
        """The batch that `next` will return, where it is all there already; never waits, on host or device.

        The current stream may read it at once; a stream that goes on reading it later says so by `record_stream`.
        """
        with self._changed:
            if self._stopped or not self._ready:
                return None
            batch, copied = self._ready[0]
        return batch if copied is None or copied.query() else None

    def close(self) -> None:
        """Stop the thread, wait for it and drop what it made; the loader's threads of this passage end too."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, plan: SamplePlan, start_step: int) -> None:
        """The thread: make, move, hand over, until stopped or out of batches."""
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            batches = self._loader.batches(plan, start_step)
            try:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    for batch in self._made(batches):
                        if not self._hand_over(*((batch, None) if stream is None else self._to_device(batch, stream))):
                            return
            finally:  # in this thread: a generator cannot be closed by another while it runs
                if isinstance(batches, Generator):
                    batches.close()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _made(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with a stage around the making of each."""
        while True:
            with self._stage("load"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _hand_over(self, batch: Batch, copied: torch.cuda.Event | None) -> bool:
        """Wait for room and leave the batch there; False where the consumer wants no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            if not self._stopped:
                self._ready.append((batch, copied))
                self._changed.notify_all()
            return not self._stopped

    def _to_device(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
        """The batch on the device, and the event after which it is all there."""
        start = time.perf_counter()
        with torch.cuda.stream(stream), self._stage("copy"):
            images_BHWC, masked_BM = (self._copy(tensor) for tensor in (batch.images_BHWC, batch.masked_BM))
            target = None if batch.target is None else self._copy(batch.target)
            copied = torch.cuda.Event()
            copied.record(stream)
        self._loader.stats().add("copy", time.perf_counter() - start, len(batch.rows))
        return replace(batch, images_BHWC=images_BHWC, masked_BM=masked_BM, target=target), copied

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device: queued on the current stream, through pinned memory; as it is if it is there."""
        if tensor.device.type == self._device.type:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
