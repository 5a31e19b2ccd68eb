"""Attention with a relative position bias against what torch has for it: each of SDPA's backends, and FlexAttention.

All start from a projection's output and end with what the next projection takes, so that what is copied on the way
counts. With a bias, all start from its table: ours, the others by `table[index]`, rounded to the type of q where SDPA
wants that; each gives the table's gradient, which FlashAttention does not, so it is raced without a bias alone. Before
anything is timed, values and gradients must agree (AGREE, of the largest value). A way that can't do the work here is
left out, and the record says why.

Rates count the operations of the matrix products that the formulas have: 4 B H N N D forward, 3.5 times as many with
the backward pass. `share_of_matmul` is ours, of the calibration arm's matrix product in the same run. Peaks of memory
are in the summary. TARGETS are for an H100 at B/16; a miss fails nothing, a disagreement does.

On the CPU: the reference's path, through the dispatcher, against SDPA called plainly. Triton's interpreter is not
timed.

Shape legend: B images, N tokens, H heads, D channels of a head, R rows of the table; 3 is q, k, v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from gpu_timing import (
    Entry,
    Inputs,
    Rotation,
    Target,
    contender,
    copies_to_cover,
    judge,
    judged_in_words,
)
from harness import Session, Variant, compare
from timm.models.beit import gen_relative_position_index
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mvp_kernels
from mvp_kernels.launch import tuned_for

pytestmark = pytest.mark.timeout(900)  # FlexAttention has to be compiled
ROUNDS = 20
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the largest value
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
TARGETS = {
    ("both", True): Target("best with a bias", 1.5, "forward and backward 1.5 times the best with the bias's gradient"),
    ("forward", True): Target("best without a bias", 1.0, "forward no slower than SDPA without a bias"),
}
MEMORY = 0.5  # of SDPA's peak with a bias, whichever is least, forward and backward


class Case(NamedTuple):
    """A model's attention on a batch: patches along a side of an image, and one token more."""

    name: str
    images: int
    heads: int
    grid: int
    biased: bool = True
    width: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.name}-{'bias' if self.biased else 'plain'}"

    @property
    def tokens(self) -> int:
        return self.grid**2 + 1

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 4.0 * self.images * self.heads * self.tokens**2 * self.width


Way = Callable[..., Tensor]  # qkv_BN3HD, table_RH -> out_BNC


def plain(qkv_BN3HD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """As a model calls it that has q, k and v from one projection."""
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def expanded(table_RH: Tensor, index_NN: Tensor) -> Tensor:
    return table_RH[index_NN.flatten()].reshape(*index_NN.shape, -1).permute(2, 0, 1).contiguous()


def sdpa(backend: SDPBackend | None, index_NN: Tensor, biased: bool, qkv: Tensor, table: Tensor) -> Tensor:
    bias = expanded(table, index_NN).to(qkv.dtype)[None] if biased else None
    attend = partial(F.scaled_dot_product_attention, attn_mask=bias)
    if backend is None:
        return plain(qkv, attend)
    with sdpa_kernel(backend):
        return plain(qkv, attend)


def flex(index_NN: Tensor, biased: bool) -> Way:
    from torch.nn.attention.flex_attention import flex_attention

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        if not biased:
            return plain(qkv, flex_attention)
        bias = expanded(table, index_NN)
        return plain(qkv, partial(flex_attention, score_mod=lambda s, b, h, m, n: s + bias[h, m, n]))

    return torch.compile(run)


def ours(index_NN: Tensor, biased: bool, impl: str, qkv: Tensor, table: Tensor) -> Tensor:
    given = (table, index_NN) if biased else (None, None)
    return mvp_kernels.relpos_attention_qkv(qkv, *given, impl=impl).flatten(2)


def inputs(case: Case, device: torch.device) -> Inputs:
    """Fresh numbers; gradients are those of the projection's output, and of the table where it is used."""
    qkv = torch.randn(case.images, case.tokens, 3, case.heads, case.width, device=device).to(case.dtype)
    table = torch.randn((2 * case.grid - 1) ** 2 + 3, case.heads, device=device)
    upstream = torch.randn(case.images, case.tokens, case.heads * case.width, device=device).to(case.dtype)
    leaves = (qkv.requires_grad_(), *([table.requires_grad_()] if case.biased else []))
    return Inputs((qkv, table), leaves, upstream)  # type: ignore[arg-type]  # autograd takes several as it takes one


def values(way: Way, given: Inputs) -> list[Tensor]:
    out = way(*given.given)
    return [out.detach(), *torch.autograd.grad(out, given.leaf, given.upstream)]  # type: ignore[arg-type]


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, name: str) -> None:
    for what, x, y in zip(("value", "gradient of qkv", "gradient of the table"), got, want, strict=False):
        off = float((x.float() - y.float()).abs().max() / y.float().abs().max())
        assert off <= AGREE[dtype], f"{name} differs in the {what} by {off:.2g} of the largest"


def able(ways: dict[str, Way], given: Inputs) -> tuple[dict[str, Way], dict[str, str]]:
    """Those that can do the work on this machine, and what the others said."""
    fit, left_out = {}, {}
    for name, way in ways.items():
        try:
            values(way, given)
        except Exception as error:  # whatever a backend or a compiler raises, it can't
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        else:
            fit[name] = way
    return fit, left_out


def race(benchmark: Any, session: Session, device: torch.device, case: Case, passed: str) -> None:
    index_NN = gen_relative_position_index((case.grid, case.grid)).to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        named = {name: partial(sdpa, backend, index_NN, case.biased) for name, backend in BACKENDS.items()}
        if case.biased:
            named |= {f"{name}, no bias": partial(sdpa, backend, index_NN, False) for name, backend in BACKENDS.items()}
        peers: dict[str, Way] = {**named, "FlexAttention": flex(index_NN, case.biased)}
    else:
        peers = {"SDPA": partial(sdpa, None, index_NN, case.biased)}
    mine: Way = partial(ours, index_NN, case.biased, "triton" if on_gpu else "auto")
    sample = inputs(case, device)
    bare = inputs(case._replace(biased=False), device)
    without = {name: way for name, way in peers.items() if name.endswith("no bias")}
    peers, left_out = able({n: w for n, w in peers.items() if n not in without}, sample)
    without, others_left_out = able(without if passed == "forward" else {}, bare)

    def check() -> None:
        mvp_kernels.reset_record()
        want = values(partial(sdpa, SDPBackend.MATH, index_NN, case.biased), exact(sample))
        assert_close(values(mine, sample), want, case.dtype, "ours")
        assert mvp_kernels.record() == {"relpos_attention_qkv": "triton" if on_gpu else "reference"}
        for name, way in peers.items():
            assert_close(values(way, sample), want, case.dtype, name)

    def entry() -> Entry:
        return Entry(inputs(case, device), torch.empty(0), torch.empty(0))

    read = sample.given[0].nbytes
    rotation = Rotation([entry() for _ in range(copies_to_cover(read, device))], device, calls=2)

    def variant(way: Way, compiled: bool = False) -> Variant:
        work = contender(way, passed)
        return replace(
            rotation.variant(work), run=lambda: work.work(rotation.entries[0]), countable=True, compiled=compiled
        )

    factor = 1.0 if passed == "forward" else 3.5
    flops = factor * case.flops

    def extra() -> dict[str, Any]:
        found = benchmark.extra_info
        times, counts = found["times_the_peer"], found["counts"]
        hardest = {
            "best with a bias": min((times[n]["ratio"] for n in peers), default=None),
            "best without a bias": min((times[n]["ratio"] for n in without), default=None),
        }
        target = TARGETS.get((passed, case.biased)) if case.name == "B/16" else None
        got = hardest.get(target.than) if target else None
        judged = [judge(target, got)] if target and got is not None else []
        least = min((counts[n]["peak_bytes"] for n in peers if n.startswith("SDPA") and "peak_bytes" in counts[n]),
                    default=0)  # fmt: skip
        if least and passed == "both" and case.biased:
            wanted = Target("SDPA's peak memory", 1 / MEMORY, "peak memory below half of SDPA's with a bias")
            judged.append(judge(wanted, least / max(counts["ours"]["peak_bytes"], 1)))
        arm = session.calibration(device.type)
        matmul = arm.flops / found["calibration"]["matmul"]["seconds"]
        share = flops / found["seconds_a_round"]["ours"]["median"] / matmul
        return {
            "summary": "; ".join(
                (found["summary"], f"{100 * share:.0f} % of the matmul rate", *map(judged_in_words, judged))
            ),
            "share_of_matmul": share,
            "targets": judged,
            "left_out": left_out | others_left_out,
            "case": case._asdict() | {"dtype": str(case.dtype), "pass": passed, "tokens": case.tokens},
            "kernels": mvp_kernels.record(),
            "tuned": bool(tuned_for(torch.cuda.get_device_name(device))) if on_gpu else None,
            "threads": torch.get_num_threads(),
        }

    compare(
        benchmark,
        session,
        ours=variant(mine),
        peers={n: variant(w, compiled=n == "FlexAttention") for n, w in (peers | without).items()},
        check=check,
        items=flops / 1e12,
        unit="TFLOP",
        device=device.type,
        rounds=ROUNDS,
        warm_up_seconds=0.0,  # the rotation has its own
        extra=extra,
    )


def exact(given: Inputs) -> Inputs:
    """The same numbers in float32."""
    copies = {id(x): x.detach().float().requires_grad_(x.requires_grad) for x in given.given}
    leaves = tuple(copies[id(x)] for x in given.leaf)  # type: ignore[union-attr]
    return Inputs(tuple(copies[id(x)] for x in given.given), leaves, given.upstream.float())  # type: ignore[arg-type,union-attr]


GPU_CASES = [
    Case("B/16", 256, 12, 14),
    Case("B/16", 256, 12, 14, biased=False),
    Case("L/16", 128, 16, 14),
    Case("L/16", 128, 16, 14, biased=False),
    Case("B/16 384 px", 64, 12, 24),
    Case("L/16 384 px", 32, 16, 24),
]


@pytest.mark.gpu
@pytest.mark.parametrize("passed", ["forward", "both"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(benchmark: Any, session: Session, case: Case, passed: str) -> None:
    """Attention in Triton against SDPA's backends and FlexAttention."""
    race(benchmark, session, torch.device("cuda"), case, passed)


def test_cpu(benchmark: Any, session: Session) -> None:
    """The reference of attention against SDPA, on the CPU."""
    case = Case("small", 4, 3, 7, width=32, dtype=torch.float32)
    race(benchmark, session, torch.device("cpu"), case, "both")
