"""Which implementation of an operation runs: chosen by name, never silently replaced, and recorded.

    auto        the fastest registered implementation that is meant for the tensor's device (the default)
    triton      the Triton kernel, or KernelUnavailable
    reference   plain torch

The choice is the `impl` argument; where that is auto, the environment variable MVP_KERNELS; where that is unset, auto.
An implementation is added by one call of `register`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IMPLEMENTATIONS = ("triton", "reference")  # fastest first: the order in which `auto` tries them
CHOICES = ("auto", *IMPLEMENTATIONS)
ENVIRONMENT = "MVP_KERNELS"


class KernelUnavailable(RuntimeError):
    """The implementation that was asked for by name does not exist or does not work here."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        load: returns the operation; called once, when it is first chosen, so that what it imports is loaded late.
        obstacle: maps a device type ("cuda", "cpu") to what keeps it from running there; "" where nothing does.
        automatic: maps a device type to whether `auto` may take it there.
    """

    load: Callable[[], Callable[..., Any]]
    obstacle: Callable[[str], str]
    automatic: Callable[[str], bool]


_registered: dict[str, dict[str, Implementation]] = {}
_loaded: dict[tuple[str, str], Callable[..., Any]] = {}
_last_used: dict[str, str] = {}


def register(
    op: str,
    impl: str,
    load: Callable[[], Callable[..., Any]],
    obstacle: Callable[[str], str] = lambda device_type: "",
    automatic: Callable[[str], bool] = lambda device_type: True,
) -> None:
    """Add an implementation; one registered before under the same names is replaced.

    Args:
        op: the operation's name.
        impl: one of IMPLEMENTATIONS.
        load: returns the function, which takes the arguments of the operation in `mvp_kernels.dispatch`, checked and
            without `impl`.
        obstacle, automatic: see `Implementation`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, not one of {', '.join(IMPLEMENTATIONS)}")
    _registered.setdefault(op, {})[impl] = Implementation(load, obstacle, automatic)
    _loaded.pop((op, impl), None)


def requested(impl: str = "auto") -> str:
    """What is asked for: `impl`, or MVP_KERNELS where that is auto.

    Raises:
        ValueError: `impl` is not one of CHOICES.
        KernelUnavailable: MVP_KERNELS is not one of them.
    """
    if impl not in CHOICES:
        raise ValueError(f"impl is {impl!r}, not one of {', '.join(CHOICES)}")
    if impl != "auto":
        return impl
    value = os.environ.get(ENVIRONMENT) or "auto"
    if value not in CHOICES:
        raise KernelUnavailable(f"{ENVIRONMENT} is {value!r}, not one of {', '.join(CHOICES)}")
    return value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(op: str, impl: str, device_type: str) -> str:
    """The name of the implementation that runs `op` on this kind of device; it is loaded.

    torch.compile takes the answer as a constant, so MVP_KERNELS counts as it is when a function is compiled.

    Raises:
        KernelUnavailable: the request names an implementation that can't run.
    """
    name = _choose(op, impl, device_type)
    if (op, name) not in _loaded:
        _loaded[op, name] = _registered[op][name].load()
    return name


def _choose(op: str, impl: str, device_type: str) -> str:
    asked = requested(impl)
    found = _registered[op]
    if asked == "auto":
        return next(
            name
            for name in IMPLEMENTATIONS
            if name in found and found[name].automatic(device_type) and not found[name].obstacle(device_type)
        )
    if asked not in found:
        raise KernelUnavailable(f"there is no {asked} implementation of {op}: ask for auto or {', '.join(found)}")
    obstacle = found[asked].obstacle(device_type)
    if obstacle:
        raise KernelUnavailable(f"the {asked} implementation of {op} can't run on {device_type}: {obstacle}")
    return asked


def run(op: str, impl: str, device: torch.device, *args: Any) -> Any:
    """Run `op` by the implementation that `choose` names, and record it."""
    name = choose(op, impl, device.type)
    _last_used[op] = name
    return _loaded[op, name](*args)


def last_used(op: str) -> str | None:
    """The implementation that ran `op` last in this process; None where it has not run."""
    return _last_used.get(op)


def record() -> dict[str, str]:
    """operation -> the implementation that ran it last; a copy."""
    return dict(_last_used)


def reset_record() -> None:
    """Forget what ran."""
    _last_used.clear()


def resolve(impl: str = "auto", device_type: str | None = None) -> str:
    """What would run, in words for a log: one name, or `reference (patchify triton)` where operations differ.

    Args:
        impl: one of CHOICES.
        device_type: "cuda", "cpu", ...; None for "cuda" where there is such a device.

    Raises:
        KernelUnavailable: the request can't be met for one of the operations.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {op: _choose(op, impl, device_type) for op in sorted(_registered)}
    names = list(chosen.values())
    usual = max(IMPLEMENTATIONS, key=names.count)
    others = [f"{op} {name}" for op, name in chosen.items() if name != usual]
    return f"{usual} ({', '.join(others)})" if others else usual
