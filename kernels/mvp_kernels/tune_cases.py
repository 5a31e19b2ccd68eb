"""What `mvp_kernels.tune` times: which kernels at which widths, with which launch parameters, on which inputs.

Shape legend: B images, M tokens, D channels of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvp_kernels import launch
from mvp_kernels.arguments import EPS
from mvp_kernels.launch import Key, Launch

OPS = (  # the most used first: the budget may not reach the last
    "guided_loss",
    "cosine_loss",
    "token_norm",
    "token_norm_backward",
    "masked_gather",
    "masked_gather_backward",
    "patchify",
)
WIDTHS = (384, 512, 768, 1024)
PATCHES = (16, 14, 32)
DTYPES = ("bfloat16", "float16", "float32")
FACTORS = (0.25, 0.5, 1, 2, 4)  # of the default's rows and warps
VECTOR = 16  # bytes that a lane should have to move

Call = Callable[[], Any]


class Case(NamedTuple):
    """A kernel as it is tuned: by values of a row and type of a value."""

    op: str
    width: int
    dtype: torch.dtype

    @property
    def key(self) -> Key:
        return self.op, self.width, self.dtype.itemsize


class Sizes(NamedTuple):
    """What the kernels are timed on.

    Attributes:
        footprint: bytes that a call moves, at least.
        tokens, taken: of an image.
        grid: patches along a side of an image.
        sets: of inputs, taken in turn.
    """

    footprint: int
    tokens: int = 197
    taken: int = 76
    grid: int = 14
    sets: int = 3


class Work(NamedTuple):
    """A launch on each set of inputs, and the bytes that one moves."""

    calls: list[Call]
    moved: int


def cases_of(ops: Iterable[str], widths: Iterable[int], dtypes: Iterable[str]) -> list[Case]:
    """One for each kernel, width and size of a value; the first type of a size stands for all of that size."""
    by_size: dict[int, torch.dtype] = {}
    for dtype in (getattr(torch, name) for name in dtypes):
        by_size.setdefault(dtype.itemsize, dtype)
    return [
        Case(op, width, dtype)
        for op in dict.fromkeys(ops)
        for width in dict.fromkeys(widths if op != "patchify" else (patch * patch for patch in PATCHES))
        for dtype in by_size.values()
    ]


def candidates_of(case: Case) -> list[Launch]:
    """The default, and what lies around it as far as every lane gets a vector to move and can hold its values."""
    default = launch.default_launch(*case.key)
    around = {Launch(int(default.rows * r), int(default.warps * w)) for r in FACTORS for w in FACTORS}
    lane = launch.block_of(case.width) * case.dtype.itemsize / 32  # bytes of a row, to a lane of one warp
    fitting = {c for c in around if launch.sensible(c, case.width) and lane * c.rows / c.warps >= VECTOR}
    return [default, *sorted(fitting - {default})]


def prepare(case: Case, device: torch.device, sizes: Sizes) -> Work:
    """The kernels as training runs them: losses write the predictions' gradient, patches are cut for two models."""
    # Late, because they import Triton, and the tuner says where that is missing.
    from mvp_kernels.operators.masked_gather import masked_gather_op, masked_scatter_op
    from mvp_kernels.operators.patchify import patchify_op
    from mvp_kernels.operators.score import Rule, score
    from mvp_kernels.operators.token_norm import token_norm_backward_op, token_norm_op

    (op, width, dtype), (_, tokens, taken, grid, _) = case, sizes
    row, patch, name = width * dtype.itemsize, math.isqrt(width), name_of(dtype)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, width, dtype=dtype, device=device)

    def index(B: int) -> Tensor:
        return torch.rand(B, tokens, device=device).argsort(1)[:, :taken].sort(1).values

    def pixels(B: int) -> Tensor:
        return torch.randint(0, 256, (B, grid * patch, grid * patch, 3), dtype=torch.uint8, device=device)

    def scored(pred_MD: Tensor, target: Tensor, index_BM: Tensor | None = None) -> Any:
        rule = Rule(op, "none" if index_BM is None else "l2", True, EPS)
        return score(rule, pred_MD, target, index_BM, None, 1.0, True)

    # The launch, the bytes of an image that it moves, and its arguments for B images.
    cases: dict[str, tuple[Callable[..., Any], int, Callable[[int], tuple[Any, ...]]]] = {
        "guided_loss": (scored, 3 * taken * row, lambda B: (rows(B * taken), rows(B, tokens), index(B))),
        "cosine_loss": (scored, 3 * taken * row, lambda B: (rows(B * taken), rows(B * taken))),
        "token_norm": (token_norm_op.forward, 2 * tokens * row, lambda B: (rows(B, tokens), "l2", EPS)),
        "token_norm_backward": (
            token_norm_backward_op.forward,
            3 * tokens * row,
            lambda B: (rows(B, tokens), rows(B, tokens), "l2", EPS),
        ),
        "masked_gather": (masked_gather_op.forward, 2 * taken * row, lambda B: (rows(B, tokens), index(B))),
        "masked_gather_backward": (
            masked_scatter_op.forward,
            (taken + tokens) * row,
            lambda B: (rows(B, taken), index(B), tokens),
        ),
        "patchify": (
            patchify_op.forward,
            3 * grid**2 * (width + 2 * row),
            lambda B: (pixels(B), patch, [0.5] * 6, [0.5] * 6, [name, "float16" if dtype.itemsize == 2 else name]),
        ),
    }
    run, moved, arguments = cases[op]
    B = math.ceil(sizes.footprint / moved)
    return Work([partial(run, *arguments(B)) for _ in range(sizes.sets)], B * moved)


def name_of(dtype: torch.dtype) -> str:
    """bfloat16, say."""
    return str(dtype).removeprefix("torch.")
