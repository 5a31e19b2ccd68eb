"""`python -m mvp_kernels.tune` as a command: its arguments, its exit codes, and what it says where it can't run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvp_kernels import launch, tune
from mvp_kernels.launch import Launch
from tests.kernel_cases import GPU, surroundings
from tests.test_kernels_launch import GPU_NAME, folder

__all__ = ["folder", "surroundings"]


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m mvp_kernels.tune` where no GPU is to be seen."""
    kept_variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "mvp_kernels.tune", *words],
        env={**kept_variables, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_gpu(folder: Path) -> None:
    done = command()
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("mvp_kernels.tune can't run here: torch finds no CUDA device. ")
    assert len(done.stderr.splitlines()) == 1
    assert not folder.exists()


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert tune.main([]) == 4
    assert "the package triton is not installed" in capsys.readouterr().err
    assert tune.main(["--list", "--ops", "patchify"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--widths", "0"],
        ["--widths", "x"],
        ["--widths"],
        ["--dtypes", "float64"],
        ["--ops", "relpos"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--speed"],
    ],
    ids=" ".join,
)
def test_bad_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tune.main(words)
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--list", "--ops", "token_norm", "patchify", "--widths", "384", "512"]
    assert tune.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 + 3 * 2
    assert lines[0] == "token_norm                384  bfloat16   rows 2 warps 1"
    launch.save_tuned(GPU_NAME, {("token_norm", 512, 4): Launch(8, 2)})
    monkeypatch.setattr(tune, "triton_obstacle", lambda device_type: "")
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU_NAME)
    assert tune.main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if line not in lines] == [
        "token_norm                512  float32    rows 8 warps 2 (tuned)"
    ]


@GPU
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--ops", "token_norm", "masked_gather", "--widths", "512", "--dtypes", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 are in" in out
    for line in out.splitlines()[2:4]:
        assert 0.2 < float(line.split("%")[0].split()[-1]) / 100 < 1.5
    assert launch.cache_file(torch.cuda.get_device_name()).exists()
