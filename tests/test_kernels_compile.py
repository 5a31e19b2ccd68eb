"""The kernels compiled for GPUs that are not there: the interpreter runs programs that the compiler refuses.

`compile_kernels.py` runs the operators' launch code in a process of its own, for one compute capability after another.
What the kernels owe their speed to is looked for in what the compiler made of them: 16-byte accesses, everything in
registers, and for the widths that matter one warp a program that waits for nobody.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

from mvp_kernels.operators import cosine_loss, guided_loss, masked_gather, patchify, rows, score_kernels, token_norm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # about a minute, where nothing else runs

SCRIPT = Path(__file__).with_name("compile_kernels.py")
MODULES = (cosine_loss, guided_loss, masked_gather, patchify, rows, score_kernels, token_norm)
WIDTHS = (384, 512, 768, 1024)
TYPES = ("bfloat16", "float16", "float32")
LANES = 32
# Tensors of tokens that a kernel reads and writes, by the case's name.
ROW_TENSORS = {
    "guided_loss": (2, 1),
    "guided_loss layernorm": (2, 1),
    "guided_loss unindexed": (2, 0),
    "guided_loss compiled": (2, 1),
    "cosine_loss": (2, 2),
    "token_norm l2": (1, 1),
    "token_norm layernorm": (1, 1),
    "token_norm_backward l2": (2, 1),
    "token_norm_backward layernorm": (2, 1),
    "masked_gather": (1, 2),  # a row is written by one of two stores: what was taken, or NaN
    "masked_gather_backward": (1, 1),
}
ROW_KERNELS = ("score_kernel", "token_norm_kernel", "gather_kernel", "scatter_kernel")

Told = dict[str, Any]


def script(*words: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run compile_kernels.py, or code that runs it."""
    command = [sys.executable, *(["-c", code] if code else [str(SCRIPT)]), *map(str, words)]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=kept, timeout=850)


def takes_blackwell() -> bool:
    """Whether Triton's package has an assembler for compute capability 10.0."""
    try:
        tool = knobs.nvidia.ptxas_blackwell.path
    except RuntimeError:
        return False
    return "'sm_100a'" in subprocess.run([tool, "--help"], capture_output=True, text=True, check=True).stdout


ARCHITECTURES = [80, 90, *([100] if takes_blackwell() else [])]


@pytest.fixture(scope="module")
def all_launches() -> list[Told]:
    """Every launch, compiled for every architecture."""
    done = script(*ARCHITECTURES)
    assert done.returncode == 0, done.stderr
    found: list[Told] = json.loads(done.stdout)
    return found


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def launches(request: pytest.FixtureRequest, all_launches: list[Told]) -> list[Told]:
    """Those for one architecture."""
    return [told for told in all_launches if told["arch"] == request.param]


def wrong(launches: list[Told], is_right: Callable[[Told], bool]) -> list[Told]:
    """Launches that are not as they should be; an assertion that there are none shows them."""
    assert launches
    return [told for told in launches if not is_right(told)]


def those_that_matter(launches: list[Told]) -> list[Told]:
    """Kernels over rows, at the widths and types that are trained with."""
    found = [told for told in launches if told["kernel"] in ROW_KERNELS]
    return [told for told in found if told["width"] in WIDTHS and told["dtype"] in TYPES]


def in_vectors(told: Told, way: str, of: str = "b") -> int:
    """Bytes that a program loads or stores in accesses of 16 bytes or more a lane, of a type if need be."""
    sizes = {kind: int(kind[1] if kind[0] == "v" else 1) * int(kind.split("b")[-1]) // 8 for kind in told[way]}
    wide = [kind for kind in told[way] if sizes[kind] >= 16 and of in kind]
    return sum(sizes[kind] * told[way][kind] for kind in wide) * LANES * told["warps"]


def test_everything_compiles(launches: list[Told]) -> None:
    """Every kernel that there is, every case with every type and width, and grids that cover all rows."""
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and inspect.unwrap(getattr(value, "fn", value)).__module__ == module.__name__
    }
    assert {told["kernel"] for told in launches} == kernels >= set(ROW_KERNELS)
    cases = Counter((told["case"], told["width"], told["dtype"]) for told in launches if told["kernel"] in ROW_KERNELS)
    assert {(case, width, dtype) for case in ROW_TENSORS for width in WIDTHS for dtype in TYPES} <= cases.keys()
    assert {width for _, width, _ in cases} >= {7, 64, 100, 1280, 4096, *WIDTHS}
    assert {dtype for _, _, dtype in cases} == {*TYPES, "float64"}


def test_nothing_leaves_the_registers(launches: list[Told]) -> None:
    assert wrong(launches, lambda told: told["stack"] == told["spilled"] == 0) == []
    assert wrong(launches, lambda told: 0 < told["registers"] <= 128) == []


def test_tokens_move_in_vectors(launches: list[Told]) -> None:
    """All of a tile is moved 16 bytes a lane at a time; what else is loaded is indices and numbers of a row."""

    def is_right(told: Told) -> bool:
        tile = told["rows"] * told["block"] * getattr(torch, told["dtype"]).itemsize
        read, written = ROW_TENSORS[told["case"]]
        # As words of 32 bits: indices, of 64, may come two at a time.
        moved = in_vectors(told, "loads", "b32"), in_vectors(told, "stores", "b32")
        return moved == (read * tile, written * tile) and not {"b8", "b16"} & {*told["loads"], *told["stores"]}

    assert wrong(those_that_matter(launches), is_right) == []


def test_a_warp_has_its_rows_for_itself(launches: list[Told]) -> None:
    assert wrong(those_that_matter(launches), lambda told: told["warps"] == 1 and told["barriers"] == 0) == []


def test_the_guards_would_notice(launches: list[Told]) -> None:
    """What is asserted above does not hold where it can't: rows that are not aligned, rows for several warps."""
    odd = next(told for told in launches if told["case"] == "masked_gather" and told["width"] == 7)
    assert in_vectors(odd, "loads") == in_vectors(odd, "stores") == 0
    wide = next(told for told in launches if told["case"].startswith("token_norm") and told["width"] == 4096)
    assert wide["warps"] > 1
    assert wide["barriers"] > 0
    assert in_vectors(wide, "stores") == 4096 * 4


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_patches_are_stored_in_vectors(launches: list[Told], layout: str) -> None:
    """Every byte that a program of patchify writes at patch 16 and 32, in one or two results."""
    kernels = [told for told in launches if told["case"] == f"patchify {layout}" and told["width"] in (256, 1024)]

    def is_right(told: Told) -> bool:
        tile = 3 * told["rows"] * told["block"]
        return in_vectors(told, "stores") == tile * 4  # one result of float32, or two of 16 bits

    assert {told["dtype"] for told in kernels} == {"bfloat16", "float32"}
    assert wrong(kernels, is_right) == []


def test_colours_side_by_side_are_read_in_vectors(launches: list[Told]) -> None:
    kernels = [told for told in launches if told["case"] == "patchify NCHW" and told["width"] == 256]
    assert wrong(kernels, lambda told: set(told["loads"]) == {"v4.b32"}) == []


def test_a_missing_assembler_is_said() -> None:
    code = (
        "import runpy, sys\nfrom triton import knobs\n"
        "vars(type(knobs.nvidia))['ptxas'].default_path = '/nowhere/ptxas'\n"
        f"sys.argv = [{str(SCRIPT)!r}, '90']\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = script(code=code)
    assert done.returncode == 4
    assert re.search("Cannot find ptxas: it belongs to the package triton", done.stderr)
