"""Compiles the kernels for GPUs that need not be there, and prints what came of it as JSON.

    python tests/compile_kernels.py 80 90 100             compute capabilities, without the point
    python tests/compile_kernels.py --attention 90        the attention kernels alone, or all --others

The operators' own launch code runs, on CPU tensors; a stand-in for Triton's driver takes the launches, so that Triton
compiles as for a GPU of that kind, down to machine code. It uses a cache folder of its own, so that everything is
compiled. TRITON_INTERPRET must not be set. Each launch is told by

    arch, case, width, dtype, kernel, grid, rows, block, warps
    registers, stack, spilled       of a thread: registers, bytes of local memory, bytes that did not fit in registers
    shared, barriers                bytes of shared memory of a program, and how often its warps wait for each other
    loads, stores                   of global memory, by kind: {"v4.b32": 8} are 8 of 16 bytes a lane

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from mvp_kernels.operators.guided_loss import guided_loss_backward_op
from mvp_kernels.operators.masked_gather import masked_gather_op, masked_scatter_op
from mvp_kernels.operators.patchify import patchify_op
from mvp_kernels.operators.relpos_attention import (
    relpos_attention_backward_op,
    relpos_attention_op,
    relpos_attention_qkv_backward_op,
    relpos_attention_qkv_op,
)
from mvp_kernels.operators.relpos_bias import _fake as _fake_bias
from mvp_kernels.operators.relpos_bias import relpos_bias_backward_op, relpos_bias_op
from mvp_kernels.operators.score import Rule, score, score_again
from mvp_kernels.operators.token_norm import token_norm_backward_op, token_norm_op

B, N, M = 256, 197, 76
EPS = 1e-6
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may ask for
HEADS = [(64, 197), (64, 577), (32, 197), (128, 197)]  # channels of a head, tokens
WIDTHS = (384, 512, 768, 1024)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = [(7, torch.bfloat16), (7, torch.float32), (64, torch.bfloat16), (100, torch.float16), (1000, torch.bfloat16)]
ODD += [(1280, torch.bfloat16), (4096, torch.float32), (768, torch.float64)]


class Case(NamedTuple):
    """Launches under one name."""

    name: str
    width: int
    dtype: torch.dtype
    run: Callable[[], Any]


class OfflineDriver:
    """What Triton asks a driver for; launches are written down. A capability stands for a device's number."""

    def __init__(self) -> None:
        self.arch = 0
        self.case: Case | None = None
        self.launches: list[dict[str, Any]] = []
        self.log = io.StringIO()  # what ptxas said
        self.compiled: dict[str, dict[str, Any]] = {}
        self.utils = self
        self.launcher_cls = self.launcher
        knobs.nvidia.dump_ptxas_log = True
        knobs.runtime.kernel_load_end_hook = self.loaded

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, dict[str, Any], int, int, int]:
        assert binary.startswith(b"\x7fELF"), "no machine code"
        return None, {"kernel": name, "shared": shared}, 0, 0, 1024

    def loaded(self, module: None, function: dict[str, Any], name: str, files: dict[str, str], key: str) -> None:
        """Adds what the compiler said and wrote. Another specialisation may have come to the same code before."""
        if key not in self.compiled:
            ptx = Path(next(path for file, path in files.items() if file.endswith(".ptx"))).read_text()
            self.compiled[key] = {**resources(self.log.getvalue()), **accesses(ptx)}
        self.log.seek(0)
        self.log.truncate()
        function.update(self.compiled[key])

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: dict[str, Any], *rest: Any) -> None:
            case, given = self.case, dict(zip(source.fn.arg_names, rest[-len(source.fn.arg_names) :], strict=True))
            assert case is not None
            told = {"arch": self.arch, "case": case.name, "width": case.width, "dtype": str(case.dtype)[6:]}
            tile = {"rows": given.get("ROWS"), "block": given.get("BLOCK"), "warps": metadata.num_warps}
            self.launches.append({**told, "grid": [x, y, z], **tile, **function})

        return launch


def resources(log: str) -> dict[str, int]:
    """Registers and local memory from `ptxas -v`."""
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not spilled or not registers:
        raise RuntimeError(f"ptxas does not tell its registers as it used to: {log!r}")
    stack, stores, loads = map(int, spilled.groups())
    return {"registers": int(registers[1]), "stack": stack, "spilled": max(stores, loads)}


def accesses(ptx: str) -> dict[str, Any]:
    """Loads and stores of global memory by kind, and barriers."""
    kinds = {
        name: Counter(re.findall(rf"\b{name}\.global(?:\.(?:L\d|relaxed|gpu|evict)[\w:]*)*\.([\w.]+)", ptx))
        for name in ("ld", "st")
    }
    return {"loads": dict(kinds["ld"]), "stores": dict(kinds["st"]), "barriers": ptx.count("bar.sync")}


def losses(width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Losses with their gradients, as they run eagerly and compiled."""
    pred, target, index = rows(B * M, width, dtype), rows(B, N, width, dtype), places()
    l2, layernorm, cosine = (
        Rule(op, kind, op == "guided_loss", EPS)
        for op, kind in (("guided_loss", "l2"), ("guided_loss", "layernorm"), ("cosine_loss", "none"))
    )
    upstream = torch.empty((), dtype=torch.float32)

    def eager() -> None:
        _, gradients = score(l2, pred, target, index, None, 1.0, True)
        score_again(l2, upstream, pred, target, index, None, gradients, 1.0)

    yield Case("guided_loss", width, dtype, eager)
    yield Case("guided_loss layernorm", width, dtype, lambda: score(layernorm, pred, target, index, None, 1.0, True))
    yield Case("guided_loss unindexed", width, dtype, lambda: score(l2, pred, pred, None, None))
    total = torch.empty(64, dtype=torch.float32)
    yield Case(
        "guided_loss compiled",
        width,
        dtype,
        lambda: guided_loss_backward_op.forward(upstream, pred, target, index, total, "l2", True, EPS),
    )
    weight = torch.empty(B * M)
    yield Case("cosine_loss", width, dtype, lambda: score(cosine, pred, pred, None, weight, 1.0, True, True))


def row_kernels(width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Norms and copies."""
    x, g, tokens, index = rows(B * N, width, dtype), rows(B, M, width, dtype), rows(B, N, width, dtype), places()
    for kind in ("l2", "layernorm"):
        yield Case(f"token_norm {kind}", width, dtype, lambda k=kind: token_norm_op.forward(x, k, EPS))
        yield Case(
            f"token_norm_backward {kind}", width, dtype, lambda k=kind: token_norm_backward_op.forward(x, x, k, EPS)
        )
    yield Case("masked_gather", width, dtype, lambda: masked_gather_op.forward(tokens, index))
    yield Case("masked_gather_backward", width, dtype, lambda: masked_scatter_op.forward(g, index, N))


def patches() -> Iterator[Case]:
    """One and two results, both layouts."""
    for patch in (14, 16, 32):
        nhwc = torch.empty(B, 448, 448, 3, dtype=torch.uint8)
        nchw = torch.empty(B, 3, 448, 448, dtype=torch.uint8).permute(0, 2, 3, 1)
        for layout, images in (("NHWC", nhwc), ("NCHW", nchw)):
            for names in (["bfloat16", "float16"], ["float32"]):
                constants = [0.4] * 3 * len(names)
                run = lambda i=images, p=patch, c=constants, n=names: patchify_op.forward(i, p, c, c, n)  # noqa: E731
                yield Case(f"patchify {layout}", patch * patch, getattr(torch, names[0]), run)


def attention(width: int, tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward: as a student runs them, without a bias, with queries of their own."""
    heads = 2
    qkv = rows(B, tokens, 3, heads, width, dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    lse, out, grad = (
        torch.empty(B, heads, tokens),
        rows(B, tokens, heads, width, dtype),
        rows(B, tokens, heads, width, dtype),
    )
    table = torch.empty(732, heads)
    index = torch.empty(tokens, tokens, dtype=torch.int64)
    bias = _fake_bias(table, index)
    taken = torch.empty(B, M, dtype=torch.int64)
    some = q[:, :, :M]
    some_out = rows(B, M, heads, width, dtype).transpose(1, 2)

    def student() -> None:
        relpos_attention_qkv_op.forward(qkv, bias, 0.125)
        relpos_attention_qkv_backward_op.forward(grad, qkv, bias, out, lse, 0.125, True)

    def plain() -> None:
        relpos_attention_qkv_op.forward(qkv, None, 0.125)
        relpos_attention_qkv_backward_op.forward(grad, qkv, None, out, lse, 0.125, False)

    def pruned() -> None:
        relpos_attention_op.forward(some, k, v, bias, taken, 0.125)
        few = torch.empty(B, heads, M)
        relpos_attention_backward_op.forward(some_out, some, k, v, bias, taken, some_out, few, 0.125, True)

    name = f"attention {tokens}"
    yield Case(name, width, dtype, student)
    if (tokens, width, dtype) == (N, 64, torch.bfloat16):
        yield Case(f"{name} plain", width, dtype, plain)
        yield Case(f"{name} pruned", width, dtype, pruned)
        yield Case("relpos_bias", width, dtype, lambda: relpos_bias_op.forward(table, index))
        grad_HNN = torch.empty(heads, tokens, tokens)
        yield Case("relpos_bias", width, dtype, lambda: relpos_bias_backward_op.forward(grad_HNN, index, 732))


def rows(*shape_and_type: Any) -> Tensor:
    *shape, dtype = shape_and_type
    return torch.empty(shape, dtype=dtype)


def places() -> Tensor:
    return torch.empty(B, M, dtype=torch.int64)


def attention_cases() -> Iterator[Case]:
    """At the widths of heads and numbers of tokens that there are; bfloat16 is what is trained in."""
    for width, tokens in HEADS:
        yield from attention(width, tokens, torch.bfloat16)
    yield from attention(*HEADS[0], torch.float32)


def other_cases() -> Iterator[Case]:
    """Every kernel with every type at the widths that matter; then what is unlike these."""
    for dtype in TYPES:
        for width in WIDTHS:
            yield from losses(width, dtype)
            yield from row_kernels(width, dtype)
    for width, dtype in ODD:
        yield from list(losses(width, dtype))[1:2]
        yield from list(row_kernels(width, dtype))[3:]
    yield from patches()


def main(words: list[str]) -> int:
    parts = {"--attention": [attention_cases], "--others": [other_cases]}
    cases = parts.get(words[0] if words else "", [other_cases, attention_cases])
    archs = [int(word) for word in words if word not in parts]
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    try:
        for arch in archs:
            get_ptxas(arch)
    except RuntimeError as error:
        print(f"{error}: it belongs to the package triton; name another by TRITON_PTXAS_PATH", file=sys.stderr)
        return 4
    offline = OfflineDriver()
    driver.set_active(offline)
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        for offline.arch in archs:
            for offline.case in itertools.chain.from_iterable(part() for part in cases):
                try:
                    with contextlib.redirect_stdout(offline.log):
                        offline.case.run()
                except Exception as error:
                    error.add_note(f"{offline.case[:3]} for compute capability {offline.arch}")
                    raise
    json.dump(offline.launches, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
