"""One operator, two ways in: a `torch.library` op for compilers, and an autograd function for eager calls.

Both are made of the same four functions. The library op is what torch.compile, fake tensors and tracers see. An eager
call goes past the dispatcher, whose way to a Python function costs more than many of these kernels take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("mvp_kernels", "DEF")


class Operator:
    """`operator(*args)` runs `forward(*args)`, with its gradient where there is one.

    Args:
        name: in the namespace mvp_kernels.
        schema: the arguments and results, as torch.library writes them.
        forward: launches the kernels.
        fake: the results' shapes and types from the arguments', for tracing.
        setup: keeps in ctx what `backward` needs, from (ctx, arguments, results); None where there is no gradient.
        backward: gradients of the arguments from (ctx, *gradients of the results).
    """

    def __init__(
        self,
        name: str,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[[Any, Any, Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        forward = on_its_device(forward)
        self.name, self.forward = name, forward
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, forward, key)
        torch.library.register_fake(f"mvp_kernels::{name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.mvp_kernels, name).default
        self.eager = forward
        if setup is not None and backward is not None:
            backward = differentiable_once(backward)
            torch.library.register_autograd(f"mvp_kernels::{name}", backward, setup_context=setup, lib=LIBRARY)
            self.eager = _autograd_function(name, forward, setup, backward).apply

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if traced(*args) else self.eager(*args)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU: makes that the one of the first tensor among the arguments."""

    @functools.wraps(launch)
    def guarded(*args: Any, **named: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args, **named)
        with torch.cuda.device(device):
            return launch(*args, **named)

    return guarded


def traced(*args: Any) -> bool:
    """Whether something looks on that must see operators: a compiler, a tracer, a dispatch mode, or fake tensors and
    other subclasses among the arguments, which bring a mode of their own."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(isinstance(arg, Tensor) and type(arg) not in _PLAIN for arg in args)


_PLAIN = (Tensor, torch.nn.Parameter)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of which a second derivative is an error, where autograd would take it for 0.

    torch's own once_differentiable does not see that a gradient depends on what `ctx` has saved.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor | None) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        on = [t for t in (*upstream, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        if not isinstance(gradients, tuple):
            return _Final.apply(gradients, *on)
        return tuple(None if gradient is None else _Final.apply(gradient, *on) for gradient in gradients)

    return guarded


class _Final(torch.autograd.Function):
    """(gradient, tensors that it depends on) -> the gradient; going back from it is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "mvp_kernels has no second derivatives in Triton; impl='reference' (or MVP_KERNELS=reference) has them"
        )


def _autograd_function(
    name: str, forward: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def run(ctx: Any, *args: Any) -> Any:
        results = forward(*args)
        setup(ctx, args, results)
        return results

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(backward)})
