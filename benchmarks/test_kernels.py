"""The kernels against what one would run without them: eager torch, and torch.compile of the same code.

Before anything is timed, all must agree in values and gradients (`gpu_timing.AGREE`). Then they take turns on cold
caches, beside a device copy that moves as many bytes as the operation must (its floor): rates count these bytes, and
times the copy is the share of the copy bandwidth. Two clocks (`gpu_timing`): the device's own, and for small sizes,
where the host decides, also the time that the caller waits for. TARGETS holds what is aimed at on an H100; each result
says by how much it was met or missed. A miss fails nothing, a disagreement does.

Passes: `forward` with gradients wanted, of which Triton's losses write the predictions' while the others keep what
theirs needs; `backward` alone, for the losses with an upstream gradient that Triton did not prepare for; `both` one
after the other, for the losses with the upstream gradient that is expected. Eager and compiled call
`mvp_kernels.reference` without dispatch or checks, Triton goes through the public functions.

On the CPU: guided_loss, torch.compile against eager. Triton's interpreter is not timed: its time says nothing of a
kernel's.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours; e bytes a value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gpu_timing import (
    Clock,
    DeviceClock,
    Entry,
    Inputs,
    Rotation,
    Target,
    WallClock,
    cache_bytes,
    check_agreement,
    contender,
    copies_to_cover,
    copying,
    judge,
    judged_in_words,
    working_set,
)
from harness import Session, compare
from torch import Tensor

import mvp_kernels
from mvp_kernels import Normalization, reference
from mvp_kernels.launch import tuned_for

ROUNDS = 20
IMAGES, SMALL_IMAGES, TOKENS, TAKEN = 256, 8, 197, 76
SIDE, PATCH, COLOURS = 224, 16, 3
STUDENT = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.bfloat16)
TEACHER = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), torch.float16)

TARGETS = {
    "guided_loss, both": (
        Target("copy", 1 / 1.4, "within 1.4 times the floor"),
        Target("eager", 3.0, "3 times as fast as eager"),
        Target("compiled", 1.0, "faster than torch.compile"),
    ),
    "small": (Target("eager", 1.0, "never slower than eager"),),
    "any other": (Target("copy", 0.85, "85 % of the copy bandwidth"),),
}
CLOCKS: dict[str, Callable[[torch.device], Clock]] = {"device": DeviceClock, "wall": WallClock}


class Case(NamedTuple):
    """An operation at a size: `kind` is a normalisation, or an image layout and the number of results."""

    op: str
    kind: str
    width: int
    dtype: torch.dtype
    small: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join(word for word in (self.op, self.kind, str(self.width), dtype, "small" * self.small) if word)


class Floor(NamedTuple):
    """Bytes that a pass must read and write, whoever carries it out."""

    read: int
    written: int


class Work(NamedTuple):
    """A case carried out: fresh inputs, both implementations, the floor of each pass, sizes for the record."""

    inputs: Callable[[], Inputs]
    eager: Callable[..., Any]
    triton: Callable[..., Any]
    floors: dict[str, Floor]
    sizes: dict[str, int]


def masked_gather(case: Case, passed: str, device: torch.device) -> Work:
    """forward: B M rows are read and written. backward: B M rows are read, and all B N of the gradient written.

    The index, about half a per cent of either, is left out.
    """
    images = SMALL_IMAGES if case.small else IMAGES
    taken, dense = (images * tokens * case.width * case.dtype.itemsize for tokens in (TAKEN, TOKENS))

    def inputs() -> Inputs:
        x_BND = random(case, device, images, TOKENS).requires_grad_()
        return Inputs((x_BND, random_index(images, device)), x_BND, random(case, device, images, TAKEN))

    floors = {"forward": Floor(taken, taken), "backward": Floor(taken, dense), "both": Floor(2 * taken, taken + dense)}
    triton = partial(mvp_kernels.masked_gather, impl="triton")
    return Work(inputs, reference.masked_gather, triton, floors, {"B": images, "N": TOKENS, "M": TAKEN})


def token_norm(case: Case, passed: str, device: torch.device) -> Work:
    """forward: x is read and y written, 2 M D e. backward: x and the gradient are read, one written, 3 M D e."""
    row = case.width * case.dtype.itemsize
    tokens = tokens_of(case, 2 * row, device)
    once = tokens * row

    def inputs() -> Inputs:
        x_MD = random(case, device, tokens).requires_grad_()
        return Inputs((x_MD,), x_MD, random(case, device, tokens))

    floors = {"forward": Floor(once, once), "backward": Floor(2 * once, once), "both": Floor(3 * once, 2 * once)}
    kind = case.kind
    triton = partial(mvp_kernels.token_norm, kind=kind, impl="triton")
    return Work(inputs, lambda x_MD: reference.token_norm(x_MD, kind), triton, floors, {"M": tokens})


def cosine_loss(case: Case, passed: str, device: torch.device) -> Work:
    """Any pass: predictions and targets are read, the predictions' gradient is written, 3 M D e."""
    row = case.width * case.dtype.itemsize
    tokens = tokens_of(case, 3 * row, device)
    floor = Floor(2 * tokens * row, tokens * row)

    def inputs() -> Inputs:
        pred_MD = random(case, device, tokens).requires_grad_()
        return Inputs((pred_MD, random(case, device, tokens)), pred_MD, loss_upstream(passed, device))

    triton = partial(mvp_kernels.cosine_loss, impl="triton")
    floors = dict.fromkeys(("forward", "backward", "both"), floor)
    return Work(inputs, reference.cosine_loss, triton, floors, {"M": tokens})


def guided_loss(case: Case, passed: str, device: torch.device) -> Work:
    """Any pass: predictions and their targets are read, the predictions' gradient is written, 3 B M D e.

    The index, under half a per cent, is left out.
    """
    images = SMALL_IMAGES if case.small else IMAGES
    once = images * TAKEN * case.width * case.dtype.itemsize

    def inputs() -> Inputs:
        pred_BMD = random(case, device, images, TAKEN).requires_grad_()
        target_BND, index_BM = random(case, device, images, TOKENS), random_index(images, device)
        return Inputs((pred_BMD, target_BND, index_BM), pred_BMD, loss_upstream(passed, device))

    kind = case.kind
    triton = partial(mvp_kernels.guided_loss, kind=kind, impl="triton")
    floors = dict.fromkeys(("forward", "backward", "both"), Floor(2 * once, once))
    sizes = {"B": images, "N": TOKENS, "M": TAKEN}
    return Work(inputs, lambda p, t, i: reference.guided_loss(p, t, i, kind), triton, floors, sizes)


def patchify(case: Case, passed: str, device: torch.device) -> Work:
    """The bytes of the images are read, and a value written for each in every result."""
    layout, results = case.kind.split("-")
    normalizations = [STUDENT, TEACHER][: int(results)]
    pixels = SIDE * SIDE * COLOURS
    written = pixels * sum(normalization.dtype.itemsize for normalization in normalizations)
    images = SMALL_IMAGES if case.small else up_to(8, working_set(device) / (pixels + written))
    shape = (images, SIDE, SIDE, COLOURS) if layout == "NHWC" else (images, COLOURS, SIDE, SIDE)

    def inputs() -> Inputs:
        return Inputs((torch.randint(0, 256, shape, dtype=torch.uint8, device=device),))

    def eager(pixels_u8: Tensor) -> list[Tensor]:
        images_BHWC = pixels_u8 if layout == "NHWC" else pixels_u8.permute(0, 2, 3, 1)
        return reference.patchify(images_BHWC, PATCH, normalizations)

    def triton(pixels_u8: Tensor) -> list[Tensor]:
        return mvp_kernels.patchify(pixels_u8, PATCH, normalizations, layout, impl="triton")

    return Work(inputs, eager, triton, {"forward": Floor(images * pixels, images * written)}, {"B": images})


OPS = {function.__name__: function for function in (masked_gather, token_norm, cosine_loss, guided_loss, patchify)}


def random(case: Case, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, case.width, device=device).to(case.dtype)


def random_index(images: int, device: torch.device) -> Tensor:
    """TAKEN distinct tokens of each image in rising order, as masks give them."""
    return torch.rand(images, TOKENS, device=device).argsort(1)[:, :TAKEN].sort(1).values


def loss_upstream(passed: str, device: torch.device) -> Tensor:
    """Of a loss; backward alone gets another than the 1 that Triton prepares for, and has to compute."""
    return torch.tensor(0.5 if passed == "backward" else 1.0, device=device)


def tokens_of(case: Case, moved: int, device: torch.device) -> int:
    """Tokens, of which a forward pass moves `moved` bytes each, that make up the working set."""
    return SMALL_IMAGES * TAKEN if case.small else up_to(256, working_set(device) / moved)


def up_to(multiple: int, number: float) -> int:
    """The next multiple."""
    return int(-(-number // multiple)) * multiple


_compiled: dict[Case, Callable[..., Any]] = {}


def compiled(case: Case, eager: Callable[..., Any], device: torch.device, quick: bool) -> Callable[..., Any]:
    """torch.compile of the plain code, kept for the other passes of the case, which follow each other."""
    if case not in _compiled:
        _compiled.clear()
        torch.compiler.reset()  # it bounds how often one function is compiled anew
        # Trying out vector instructions takes most of a CPU's compile time; one short round can do without them.
        options = {"cpp.vec_isa_ok": False} if quick and device.type == "cpu" else None
        _compiled[case] = torch.compile(eager, fullgraph=True, dynamic=False, options=options)
    return _compiled[case]


def targets_of(case: Case, passed: str, device: torch.device) -> tuple[Target, ...]:
    """What TARGETS wants of a pass; of a CPU nothing is wanted."""
    if device.type != "cuda":
        return ()
    if case.small:
        return TARGETS["small"]
    return TARGETS.get(f"{case.op}, {passed}", TARGETS["any other"])


def race(benchmark: Any, session: Session, device: torch.device, case: Case, passed: str, clock: str) -> None:
    """Check, time and report one pass of a case."""
    work = OPS[case.op](case, passed, device)
    ways = {"eager": work.eager, "compiled": compiled(case, work.eager, device, session.quick)}
    if device.type == "cuda":
        ways["triton"] = work.triton
    floor = work.floors[passed]
    moved = floor.read + floor.written

    def check() -> None:
        mvp_kernels.reset_record()
        check_agreement(ways, work.inputs())
        assert mvp_kernels.record() == ({case.op: "triton"} if "triton" in ways else {})

    def entry() -> Entry:
        source, destination = (torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
        return Entry(work.inputs(), source, destination)

    rotation = Rotation([entry() for _ in range(copies_to_cover(floor.read, device))], device, CLOCKS[clock])
    variants = {name: rotation.variant(contender(function, passed)) for name, function in ways.items()}
    ours = [*ways][-1]

    def extra() -> dict[str, Any]:
        found, seconds = benchmark.extra_info, benchmark.stats.stats.data
        judged = [judge(t, found["times_the_peer"][t.than]["ratio"]) for t in targets_of(case, passed, device)]
        p20, median, p80 = (1e6 * number for number in np.percentile(seconds, [20, 50, 80]))
        words = (f"{ours} {median:.1f} us ({p20:.1f} to {p80:.1f})", found["summary"], *map(judged_in_words, judged))
        return {
            "summary": "; ".join(words),
            "targets": judged,
            "case": case._asdict() | {"dtype": str(case.dtype), "pass": passed, "clock": clock, **work.sizes},
            "ours": ours,
            "floor_bytes": floor._asdict(),
            "rotation": {"copies": len(rotation.entries), "cache_bytes": cache_bytes(device)},
            "kernels": mvp_kernels.record(),
            "tuned": bool(tuned_for(torch.cuda.get_device_name(device))) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
        }

    compare(
        benchmark,
        session,
        ours=variants.pop(ours),
        peers=variants | {"copy": rotation.variant(copying())},
        check=check,
        items=moved / 1e9,
        unit="GB",
        device=device.type,
        rounds=ROUNDS,
        warm_up_seconds=0.0,  # the rotation has its own
        extra=extra,
    )


LARGE = ((512, torch.bfloat16), (768, torch.bfloat16), (768, torch.float32))
TOKEN_OPS = {  # (operation, kind): passes
    ("masked_gather", ""): ("forward", "backward"),
    ("token_norm", "l2"): ("forward", "backward"),
    ("token_norm", "layernorm"): ("forward", "backward"),
    ("cosine_loss", ""): ("forward", "backward", "both"),
    ("guided_loss", "l2"): ("forward", "both"),
}
LAYOUTS = ("NHWC-1", "NHWC-2", "NCHW-1", "NCHW-2")
GPU_CASES = [
    *((Case(*op, *size), passed, "device") for op, passes in TOKEN_OPS.items() for size in LARGE for passed in passes),
    *((Case("patchify", kind, 768, torch.bfloat16), "forward", "device") for kind in LAYOUTS),
    *((Case(*op, 384, torch.bfloat16, small=True), "both", clock) for op in TOKEN_OPS for clock in CLOCKS),
    *((Case("patchify", "NHWC-2", 768, torch.bfloat16, small=True), "forward", clock) for clock in CLOCKS),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "passed", "clock"), GPU_CASES, ids=str)
def test_gpu(benchmark: Any, session: Session, case: Case, passed: str, clock: str) -> None:
    """A kernel in Triton against eager torch and torch.compile."""
    race(benchmark, session, torch.device("cuda"), case, passed, clock)


def test_cpu(benchmark: Any, session: Session) -> None:
    """guided_loss on the CPU, torch.compile against eager torch."""
    case = Case("guided_loss", "l2", 384, torch.float32, small=True)
    race(benchmark, session, torch.device("cpu"), case, "both", "device")
