"""The file in which tuned launch parameters are kept: where it is, what it holds, and what if it can't be used.

Shape legend: M tokens, D channels of a token.
"""

from __future__ import annotations

import contextlib
import json
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import mvp_kernels
from mvp_kernels import launch
from mvp_kernels.launch import Launch
from tests.kernel_cases import surroundings
from tests.test_kernels_launch import FOUND, GPU_NAME, as_on_gpu, folder, look_up

__all__ = ["as_on_gpu", "folder", "surroundings"]


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("as_on_gpu")
def test_what_is_kept_goes_before_the_default(folder: Path) -> None:
    assert look_up("token_norm", 512, torch.bfloat16) == launch.default_launch("token_norm", 512, 2)
    path = launch.save_tuned(GPU_NAME, FOUND)
    assert path.parent == folder
    for (op, width, itemsize), found in FOUND.items():
        dtypes = [torch.bfloat16, torch.float16] if itemsize == 2 else [torch.float32]
        assert [look_up(op, width, dtype) for dtype in dtypes] == [found] * len(dtypes)
        assert found != launch.default_launch(op, width, itemsize)  # or nothing was shown
    for op, width, dtype in [("token_norm", 500, torch.float16), ("cosine_loss", 512, torch.float16)]:
        assert look_up(op, width, dtype) == launch.default_launch(op, width, 2)
    launch.forget()  # as a new process would
    assert launch.tuned_for(GPU_NAME) == FOUND
    assert launch.tuned_for("another GPU") == {}
    assert launch.launch_of("token_norm", 512, torch.bfloat16, torch.device("cpu")) == launch.default_launch(
        "token_norm", 512, 2
    )


@pytest.mark.usefixtures("as_on_gpu")
def test_results_are_added_to_the_file() -> None:
    path = launch.save_tuned(GPU_NAME, FOUND)
    more = {("masked_gather", 384, 2): Launch(8, 1), ("token_norm", 512, 2): Launch(1, 1)}
    assert launch.save_tuned(GPU_NAME, more) == path
    assert launch.tuned_for(GPU_NAME) == {**FOUND, **more}
    launch.save_tuned(GPU_NAME, {("token_norm", 512, 2): None, ("patchify", 196, 2): None})
    assert ("token_norm", 512, 2) not in launch.tuned_for(GPU_NAME)
    assert len(launch.tuned_for(GPU_NAME)) == len(FOUND)
    assert look_up("token_norm", 512, torch.bfloat16) == launch.default_launch("token_norm", 512, 2)
    launch.save_tuned("another GPU", more)
    assert launch.tuned_for("another GPU") == more
    assert ("patchify", 196, 2) not in launch.tuned_for(GPU_NAME)
    assert len(list(path.parent.iterdir())) == 2


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nvidia-h100-80gb-hbm3-triton{triton.__version__}.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MVP_KERNELS_CACHE", str(tmp_path / "own"))
    assert launch.cache_file(GPU_NAME) == tmp_path / "own" / name
    monkeypatch.setenv("MVP_KERNELS_CACHE", "")
    assert launch.cache_file(GPU_NAME) == tmp_path / "xdg" / "mvp_kernels" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert launch.cache_file(GPU_NAME) == tmp_path / "home" / ".cache" / "mvp_kernels" / name
    assert launch.cache_file("a/../b") == tmp_path / "home/.cache/mvp_kernels" / f"a-b-triton{triton.__version__}.json"


def test_no_home_means_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MVP_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with no_warning():
        assert launch.tuned_for(GPU_NAME) == {}
    with pytest.raises(RuntimeError, match="home"):
        launch.save_tuned(GPU_NAME, FOUND)


def document(**entry: Any) -> str:
    good = {"op": "token_norm", "width": 512, "itemsize": 4, "rows": 8, "warps": 1}
    return json.dumps({"schema": launch.SCHEMA, "launches": [good | entry]})


DAMAGED = {
    "empty": b"",
    "cut off": document().encode()[:-9],
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "nothing": b"null",
    "another schema": document().replace('"schema": 1', '"schema": 2').encode(),
    "no schema": b'{"launches": []}',
    "no launches": b'{"schema": 1}',
    "a launch that is none": b'{"schema": 1, "launches": [4]}',
    "a key missing": document().replace("warps", "wraps").encode(),
    "rows that are no power of two": document(rows=3).encode(),
    "too many rows": document(rows=1 << 20).encode(),
    "a word for rows": document(rows="8").encode(),
    "no warps": document(warps=0).encode(),
    "a word for a width": document(width="512").encode(),
    "a number for a kernel": document(op=5).encode(),
    "a list for a kernel": document(op=[]).encode(),
    "a folder": None,
}


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_cannot_be_used(damage: str) -> None:
    """It is said once, kernels run with their defaults and are right, and tuning anew replaces it."""
    path, content = launch.cache_file(GPU_NAME), DAMAGED[damage]
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    x_MD = torch.randn(3, 512, device="cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for width in (512, 384, 7):
            assert look_up("token_norm", width, torch.float32) == launch.default_launch("token_norm", width, 4)
            assert look_up("guided_loss", width, torch.float32) == launch.default_launch("guided_loss", width, 4)
        out_MD = mvp_kernels.token_norm(x_MD, impl="triton")
    assert mvp_kernels.last_used("token_norm") == "triton"
    torch.testing.assert_close(out_MD, mvp_kernels.token_norm(x_MD, impl="reference"), rtol=1e-6, atol=1e-7)
    assert [warning.category for warning in warned] == [UserWarning]
    assert "can't use its tuned launch parameters" in str(warned[0].message)
    assert str(path) in str(warned[0].message)
    assert "python -m mvp_kernels.tune" in str(warned[0].message)
    if content is None:
        path.rmdir()
    launch.save_tuned(GPU_NAME, FOUND)
    with no_warning():
        assert launch.tuned_for(GPU_NAME) == FOUND


def test_the_undamaged_file_can_be_used() -> None:
    path = launch.cache_file(GPU_NAME)
    path.parent.mkdir(parents=True)
    path.write_text(document())
    with no_warning():
        assert launch.tuned_for(GPU_NAME) == {("token_norm", 512, 4): Launch(8, 1)}


def test_a_file_is_replaced_at_once() -> None:
    """Who has the old file open reads the old one to its end; a write that fails leaves it as it was."""
    path = launch.save_tuned(GPU_NAME, FOUND)
    before = path.read_text()
    with path.open() as reader:
        launch.save_tuned(GPU_NAME, {("masked_gather", 384, 2): Launch(8, 1)})
        assert reader.read() == before
    now, (soft, hard) = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert now != before
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # a full disk, as it were
    try:
        with pytest.raises(OSError, match="File too large"):
            launch.save_tuned(GPU_NAME, {("masked_gather", 512, 2): Launch(8, 1)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == now
    assert list(path.parent.iterdir()) == [path]
