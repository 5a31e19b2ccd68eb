"""How kernels are cut into programs: by default, as tuned or as tried out, and always with the same results.

A GPU is given a name by hand here, so that what was tuned is looked up where there is none too.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import mvp_kernels
from mvp_kernels import Normalization, launch
from mvp_kernels.launch import Launch
from mvp_kernels.tune_cases import OPS
from tests.kernel_cases import DEVICES, FLOATS, OPERATORS, Shape, distinct_index, score, surroundings

__all__ = ["surroundings"]

GPU_NAME = "NVIDIA H100 80GB HBM3"
WIDTHS = [1, 2, 3, 7, 16, 64, 100, 197, 384, 500, 512, 768, 1000, 1024, 1280, 4096, 4099, 65536]
FOUND = {
    ("token_norm", 512, 2): Launch(8, 2),
    ("token_norm", 512, 4): Launch(4, 4),
    ("guided_loss", 768, 2): Launch(2, 2),
}


@pytest.fixture(autouse=True)
def folder(surroundings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tuned parameters are kept in a folder of the test's own, which does not exist yet."""
    random.seed(torch.initial_seed())
    monkeypatch.setenv("MVP_KERNELS_CACHE", str(tmp_path / "kept" / "here"))
    launch.forget()
    yield tmp_path / "kept" / "here"
    launch.forget()


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch parameters are looked up as on a GPU of that name, also where the interpreter is to run the kernels."""

    def name_of_the_gpu(device: torch.device) -> str:
        return GPU_NAME

    monkeypatch.setattr(torch.cuda, "get_device_name", name_of_the_gpu)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    for module in (*OPERATORS, score):
        monkeypatch.setattr(module, "launch_of", look_up, raising=False)


def look_up(op: str, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Launch:
    return launch.launch_of(op, width, dtype, torch.device("cuda", 0))


class Spy:
    """Stands before a kernel and writes down how it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            self.seen.append((grid, named["ROWS"], named["num_warps"]))
            self.kernel[grid](*args, **named)

        return call


def is_power_of_two(n: int) -> bool:
    return n in {1 << k for k in range(20)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_defaults(op: str, dtype: torch.dtype) -> None:
    for width in [*WIDTHS, *random.sample(range(1, 9000), 200)]:
        rows, warps = default = launch.default_launch(op, width, dtype.itemsize)
        block = launch.block_of(width)
        assert block == triton.next_power_of_2(width)
        assert is_power_of_two(rows), (width, default)
        assert is_power_of_two(warps), (width, default)
        assert warps <= 16, (width, default)
        assert launch.sensible(default, width), (width, default)
        # A lane's share of a tile fits in its registers, unless the row is longer than all warps of a program can hold.
        copies = op.startswith("masked_gather")
        held = rows * block * (dtype.itemsize if copies else max(dtype.itemsize, 4)) / (32 * warps)
        assert held <= 128 or block > 16 * 1024 // (dtype.itemsize // 4 or 1), (width, default)
        if width in (384, 512, 768, 1024) and dtype.itemsize <= 4 and op != "patchify":
            assert warps == 1


def test_what_can_be_launched() -> None:
    for good in [(1, 1), (2, 1), (128, 16), (1, 16)]:
        assert launch.sensible(Launch(*good), 512)
    for bad in [(0, 1), (3, 1), (1, 0), (1, 3), (1, 32), (256, 16), (16, 1), (-2, 1), (True, 1), (2.0, 1), ("2", 1)]:
        assert not launch.sensible(Launch(*bad), 512)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_kernel_is_launched_as_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvp_kernels.operators import token_norm

    spy = Spy(token_norm.token_norm_kernel)
    monkeypatch.setattr(token_norm, "token_norm_kernel", spy)
    x_MD = torch.randn(21, 64, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    for rows, warps in [(4, 2), (1, 1), (16, 4)]:
        launch.save_tuned(
            GPU_NAME, {("token_norm", 64, 4): Launch(rows, warps), ("token_norm_backward", 64, 4): Launch(2 * rows, 1)}
        )
        mvp_kernels.token_norm(x_MD, impl="triton").sum().backward()
        assert spy.seen == [((-(-21 // rows),), rows, warps), ((-(-21 // (2 * rows)),), 2 * rows, 1)]
        spy.seen.clear()


def every_kernel(device: str) -> Callable[[], dict[str, Tensor]]:
    """Runs all operations with their gradients, through Triton, on the same numbers each time."""
    shape, dtype = Shape(3, 11, 5, random.choice([1, 7, 16, 40])), random.choice(FLOATS)
    pred_BMD, target_BND = torch.randn(3, 5, shape.width), torch.randn(3, 11, shape.width)
    pred_BMD, target_BND = (x.to(device, dtype).requires_grad_() for x in (pred_BMD, target_BND))
    upstream_BMD, index_BM = torch.randn(3, 5, shape.width).to(device, dtype), distinct_index(shape, device)
    images_BHWC = torch.randint(0, 256, (2, 6, 9, 3), dtype=torch.uint8, device=device)
    normalizations = [Normalization((0.4,) * 3, (0.2,) * 3, kind) for kind in (dtype, torch.float32)]

    def run() -> dict[str, Tensor]:
        found = {}
        for reduction in ("none", "mean"):
            loss = mvp_kernels.guided_loss(pred_BMD, target_BND.detach(), index_BM, "l2", reduction, impl="triton")
            found[f"guided_loss {reduction}"] = loss.detach()
            found[f"guided_loss {reduction} grad"] = torch.autograd.grad(loss.sum() * 2, pred_BMD)[0]
            loss = mvp_kernels.cosine_loss(pred_BMD, target_BND[:, :5], None, reduction, impl="triton")
            found[f"cosine_loss {reduction}"] = loss.detach()
            found[f"cosine_loss {reduction} grad"] = torch.autograd.grad(loss.sum(), target_BND)[0]
        for kind in ("l2", "layernorm"):
            norm_BMD = mvp_kernels.token_norm(pred_BMD, kind, impl="triton")
            found[f"token_norm {kind}"] = norm_BMD.detach()
            found[f"token_norm {kind} grad"] = torch.autograd.grad(norm_BMD, pred_BMD, upstream_BMD)[0]
        taken_BMD = mvp_kernels.masked_gather(target_BND, index_BM, impl="triton")
        found["masked_gather"] = taken_BMD.detach()
        found["masked_gather grad"] = torch.autograd.grad(taken_BMD, target_BND, upstream_BMD)[0]
        found["patchify"], found["patchify 2"] = mvp_kernels.patchify(images_BHWC, 3, normalizations, impl="triton")
        return found

    return run


@DEVICES
def test_results_do_not_depend_on_the_launch(device: str) -> None:
    """A row is computed in one program, so only sums over rows may differ, by rounding; on a GPU sums in a row too."""
    run = every_kernel(device)
    with contextlib.ExitStack() as tried:
        for op in OPS:
            tried.enter_context(launch.trying(op, Launch(1, 1)))
        want = run()
    assert set(mvp_kernels.record()) == {"masked_gather", "token_norm", "cosine_loss", "guided_loss", "patchify"}
    assert set(mvp_kernels.record().values()) == {"triton"}
    for _ in range(4):
        with contextlib.ExitStack() as tried:
            choices = {op: Launch(2 ** random.randrange(6), 2 ** random.randrange(4)) for op in OPS}
            print(choices)
            for op, choice in choices.items():
                tried.enter_context(launch.trying(op, choice))
            got = run()
        assert got.keys() == want.keys()
        for name, value in got.items():
            copies = name.startswith(("masked_gather", "patchify"))
            exact = copies or (device == "cpu" and not name.endswith("_loss mean"))
            tolerance = 0.0 if exact else 4 * torch.finfo(value.dtype).eps
            torch.testing.assert_close(
                value, want[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@DEVICES
def test_the_tuner_knows_every_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def ask(op: str, *rest: Any) -> Launch:
        asked.add(op)
        return launch.launch_of(op, *rest)

    for module in (*OPERATORS, score):
        monkeypatch.setattr(module, "launch_of", ask, raising=False)
    every_kernel(device)()
    assert asked == set(OPS)


def test_trying() -> None:
    usual = [launch.launch_of(op, 384, torch.float32, torch.device("cpu")) for op in OPS]
    first, second = Launch(64, 8), Launch(32, 4)
    seen: list[Launch] = []

    def ask() -> Launch:
        seen.append(launch.launch_of("token_norm", 384, torch.float32, torch.device("cpu")))
        return seen[-1]

    def fail() -> None:
        with launch.trying("token_norm", second):
            assert ask() == second
            thread = threading.Thread(target=ask)  # autograd runs backward passes in threads of its own
            thread.start()
            thread.join()
            raise KeyError

    with launch.trying("token_norm", first):
        assert ask() == first
        with pytest.raises(KeyError):
            fail()
        assert seen == [first, second, second]
        assert ask() == first
        assert (
            launch.launch_of("cosine_loss", 384, torch.float32, torch.device("cpu")) == usual[OPS.index("cosine_loss")]
        )
    assert [launch.launch_of(op, 384, torch.float32, torch.device("cpu")) for op in OPS] == usual


@pytest.mark.usefixtures("as_on_gpu")
def test_nothing_is_timed_or_written_at_a_launch(folder: Path) -> None:
    """Every function that runs is written down: files are read at the first launch alone, clocks and GPUs never."""
    launch.save_tuned(GPU_NAME, FOUND)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    def called() -> list[str]:
        names: list[str] = []

        def note(frame: Any, event: str, function: Any) -> None:
            if event == "c_call":
                names.append(f"{function.__module__}.{function.__qualname__}")
            elif event == "call":
                names.append(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")

        previous = sys.getprofile()
        sys.setprofile(note)
        try:
            for op in OPS:
                look_up(op, 512, torch.bfloat16)
        finally:
            sys.setprofile(previous)
        return names

    first, second = called(), called()
    assert any("open" in name for name in first)  # or the notes would show nothing
    assert any("name_of_the_gpu" in name for name in first)
    assert not any("open" in name or "name_of_the_gpu" in name for name in second)
    assert not [name for name in first + second if name.startswith(("time.", "torch.cuda", "tempfile", "triton"))]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["here"]
