"""Timing single operations for `harness.compare`: cold caches, and clocks that tell the device's time from the host's.

A GPU finishes most kernels of this project sooner than the host launches them, and its L2 cache would hold all that a
small one reads. So inputs are rotated over several times the cache, and there are two clocks:

    DeviceClock   what the device takes: events on its stream, with all launches queued before the first kernel starts
    WallClock     what the caller waits for, launches included

On a CPU both are `time.perf_counter`, so that the same path runs there.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from harness import Variant
from torch import Tensor

TIMES_CACHE = 4  # caches that a rotation reads before it comes back to its first entry
CALLS = 8  # timed together; with eager's dozens of launches each, still within a stream's queue
FIRST_SLEEP, ATTEMPTS = 1 << 19, 11  # cycles; doubled at each attempt: from under a millisecond to some 0.3 s
CPU_CACHE = 1 << 20  # bytes, where the system does not say

# Of a value; float32 has sums in another order, the others one rounding that may fall to the other side.
AGREE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
AGREE_LARGEST = 1e-5  # of the largest value, where a difference of near equals is all that is left


def cache_bytes(device: torch.device) -> int:
    """The GPU's L2 cache; on a CPU a core's own L2, for what cores share beyond it is too large to rotate over."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), CPU_CACHE)
    except (ValueError, OSError):
        return CPU_CACHE


def working_set(device: torch.device) -> int:
    """Bytes of which the cache can hold but a part."""
    return TIMES_CACHE * cache_bytes(device)


def copies_to_cover(read: int, device: torch.device) -> int:
    """Copies of inputs, of which a call reads `read` bytes, that make up the working set; two at least."""
    return max(2, math.ceil(working_set(device) / read))


class Clock(Protocol):
    """Runs the work once: the seconds it took, or None where the time can't be told and it is to be run again."""

    def __call__(self, work: Callable[[], None]) -> float | None: ...


class DeviceClock:
    """Seconds of the device alone.

    The device sleeps while the host launches the work with an event before and after it. If the first event is still
    to come when all is launched, no kernel waited for the host. If it has passed, the time would hold launches: there
    is none, and the next sleep is twice as long. Work for which the host waits in between never gets a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cycles = device, FIRST_SLEEP

    def __call__(self, work: Callable[[], None]) -> float | None:
        if self.device.type != "cuda":
            return WallClock(self.device)(work)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(self.cycles)
        start.record()
        work()
        end.record()
        ahead = not start.query()
        end.synchronize()
        if not ahead:
            self.cycles *= 2
            return None
        return float(start.elapsed_time(end)) / 1e3


class WallClock:
    """Seconds until the device is done, from when it was idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Inputs(NamedTuple):
    """What an operation takes, which of it wants a gradient, and the gradient of its result."""

    given: tuple[Any, ...]
    leaf: Tensor | None = None
    upstream: Tensor | None = None


class Entry(NamedTuple):
    """Of a rotation: an operation's inputs, and what the copy beside it moves."""

    inputs: Inputs
    source: Tensor
    destination: Tensor


class Contender(NamedTuple):
    """One way to do the work.

    Attributes:
        work: what is timed, of what `prepare` returned; it returns what it wrote.
        prepare: what must be there before, from an entry of the rotation; not timed.
    """

    work: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda entry: entry


def contender(function: Callable[..., Any], passed: str) -> Contender:
    """A pass of a differentiable function: forward, backward, or both one after the other."""

    def forward(entry: Entry) -> Any:
        return function(*entry.inputs.given)

    def gradient(entry: Entry, out: Any) -> Any:
        return torch.autograd.grad(out, entry.inputs.leaf, entry.inputs.upstream)

    def both(entry: Entry) -> Any:
        out = forward(entry)
        return out, gradient(entry, out)

    if passed == "backward":
        return Contender(lambda state: gradient(*state), lambda entry: (entry, forward(entry)))
    return Contender({"forward": forward, "both": both}[passed])


def copying() -> Contender:
    """The device's own copy of what an entry holds for it."""
    return Contender(lambda entry: entry.destination.copy_(entry.source))


class Rotation:
    """Entries in turn: each call, whoever's, gets the one that was touched longest ago.

    Results are kept until as many others were written as there are entries: the allocator then has no warm memory to
    hand out.

    Args:
        entries: see `copies_to_cover`.
        device: where the work runs.
        clock: makes a clock; each contender has its own, because the host needs another head start for each.
        calls: timed together.
    """

    def __init__(
        self,
        entries: Sequence[Any],
        device: torch.device,
        clock: Callable[[torch.device], Clock] = DeviceClock,
        calls: int = CALLS,
    ) -> None:
        self.entries, self.device, self.clock, self.calls = entries, device, clock, calls
        self._kept: deque[Any] = deque(maxlen=len(entries))
        self._at = 0
        self._elsewhere_F = torch.zeros(working_set(device) // 4, device=device)

    def variant(self, contender: Contender) -> Variant:
        """For the harness: a round is a batch of calls, its seconds are those of one."""
        clock, warm = self.clock(self.device), False

        def seconds() -> float:
            nonlocal warm
            if not warm:
                self.warm_up(contender)
                warm = True
            return self.seconds(contender, clock)

        return Variant(run=seconds, seconds=seconds)

    def warm_up(self, contender: Contender) -> None:
        """Every entry once: what is not compiled is, and the allocator gets its blocks."""
        for entry in self.entries:
            self._kept.append(contender.work(contender.prepare(entry)))

    def seconds(self, contender: Contender, clock: Clock) -> float:
        """Seconds a call, over a batch.

        Raises:
            RuntimeError: the clock found no time, however often it was asked.
        """
        for _ in range(ATTEMPTS):
            states = [contender.prepare(self._next()) for _ in range(self.calls)]
            self._elsewhere_F.sum()  # out of the cache with what was prepared; a read, for what is written comes back
            seconds = clock(lambda states=states: self._work(contender, states))
            if seconds is not None:
                return seconds / self.calls
        raise RuntimeError(
            f"the host did not get ahead of the device in {ATTEMPTS} attempts: the work waits for the device, or has"
            " more launches than a stream's queue takes"
        )

    def _work(self, contender: Contender, states: list[Any]) -> None:
        for state in states:
            self._kept.append(contender.work(state))

    def _next(self) -> Any:
        entry = self.entries[self._at]
        self._at = (self._at + 1) % len(self.entries)
        return entry


def check_agreement(ways: Mapping[str, Callable[..., Any]], inputs: Inputs) -> None:
    """All ways give the first one's values and gradients, within AGREE."""
    (first, function), *others = ways.items()
    expected = _values(function, inputs)
    for name, function in others:
        for what, actual in _values(function, inputs).items():
            wanted = expected[what]
            assert actual.dtype == wanted.dtype, f"{name} gives a {what} of {actual.dtype}, {first} of {wanted.dtype}"
            atol, rtol = AGREE_LARGEST * float(wanted.abs().max()), AGREE[wanted.dtype]
            named = f"{name} and {first} differ in the {what}"
            torch.testing.assert_close(
                actual.float(), wanted.float(), atol=atol, rtol=rtol, msg=lambda text, named=named: f"{named}: {text}"
            )


def _values(function: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    out = function(*inputs.given)
    if inputs.leaf is not None:
        return {"value": out.detach(), "gradient": torch.autograd.grad(out, inputs.leaf, inputs.upstream)[0]}
    return {f"result {number}": each for number, each in enumerate(out)}


class Target(NamedTuple):
    """What is wanted: `times` as fast as `than`, or faster; in `words` for the reader."""

    than: str
    times: float
    words: str


def judge(target: Target, times: float) -> dict[str, Any]:
    """How what was measured compares with a target, for the record; `by` is relative, negative where it is missed."""
    by = times / target.times - 1
    return {"target": target.words, "than": target.than, "wanted": target.times, "got": times, "met": by >= 0, "by": by}


def judged_in_words(judged: Mapping[str, Any]) -> str:
    """What `judge` found, for a line of text."""
    return f"{judged['target']}: {'met' if judged['met'] else 'MISSED'} by {100 * abs(judged['by']):.1f} %"
