"""What the benchmarks count, read and write down: operations, bytes, launches, the calibration arm, commands, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # is no package: its helpers are found there

from calibration import Calibration
from counts import count, flops_of
from peers import commands


def test_operations_and_bytes_are_exact() -> None:
    x_84, buffer_48 = torch.ones(8, 4), torch.empty(4, 8)
    calls = []

    def work() -> torch.Tensor:
        calls.append(None)
        doubled_84 = x_84 * 2  # 128 bytes
        doubled_84.relu_()  # in place: none
        seen_48 = doubled_84.view(4, 8).narrow(1, 0, 8)  # views: no operation
        seen_48 = torch.ops.aten._unsafe_view(seen_48, [4, 8])  # a view that torch does not call one
        torch.add(seen_48, 1, out=buffer_48)  # into memory that is there: none
        mean_8, deviation_8 = torch.var_mean(x_84, dim=1)  # 32 bytes each
        return mean_8 + deviation_8  # 32 bytes

    found = count(work, "cpu")
    assert found.as_dict() == {"operations": 5, "written_bytes": 128 + 3 * 32}
    assert len(calls) == 1


def test_backward_is_counted_too() -> None:
    w_44 = torch.ones(4, 4, requires_grad=True)

    def step() -> None:
        (w_44 @ w_44).sum().backward()
        w_44.grad = None

    # Forward: product, sum. Backward: a one, two products and their sum; the sum's gradient is a view.
    assert count(step, "cpu").as_dict() == {"operations": 6, "written_bytes": 4 * 64 + 2 * 4}


def test_what_reads_a_number_is_an_operation() -> None:
    x = torch.ones(())
    assert count(lambda: x.item(), "cpu").as_dict() == {"operations": 1, "written_bytes": 0}


def test_operations_of_products_are_counted() -> None:
    """Two a multiply-add, forward and backward, of attention too, whichever kernel would carry it out."""
    x_53, w_37 = torch.ones(5, 3), torch.ones(3, 7, requires_grad=True)
    assert flops_of(lambda: (x_53 @ w_37).sum().backward()) == 2 * (2 * 5 * 3 * 7)  # x needs no gradient
    q_2348 = torch.ones(2, 3, 4, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert flops_of(lambda: attention(q_2348, q_2348, q_2348)) == 2 * (2 * 2 * 3 * 4 * 4 * 8)


def test_an_image_in_the_plain_step_costs_what_the_models_sizes_say() -> None:
    """Width 384, 4 blocks, 12 in the teacher, 50 tokens, 49 patches of 768 values, targets of 384 channels."""
    from peers.step_cases import SMALL, flops_an_image

    tokens, width = 50, 384
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    patches = 2 * 49 * 768 * width
    head = 2 * tokens * width * 384
    forward = patches + 4 * block + head
    backward = 2 * forward - patches  # the images need no gradient
    # open_clip projects the 49 patch tokens and CLS as here, from its own width of 384.
    teacher = patches + 12 * block + head
    assert flops_an_image(SMALL) == pytest.approx(forward + backward + teacher, rel=1e-3)


@pytest.mark.gpu
def test_launches_and_peak_are_exact_on_a_gpu() -> None:
    x = torch.ones(1024, 1024, device="cuda")

    def work() -> None:
        doubled = x * 2
        (doubled + 1).cpu()

    work()
    found = count(work, "cuda")
    assert found.launches == 3
    assert found.peak_bytes == 2 * x.nbytes


def test_the_calibration_arm_multiplies_and_copies() -> None:
    arm = Calibration("cpu")
    arm.copy.zero_()
    seconds = arm.round()
    assert set(seconds) == {"matmul", "copy"}
    assert all(each > 0 for each in seconds.values())
    torch.testing.assert_close(arm.product, arm.a @ arm.b)
    assert bool((arm.copy == 1).all())
    side = arm.a.shape[0]
    assert (arm.flops, arm.bytes) == (2 * side**3, 2 * arm.source.nbytes)


def metrics(folder: Path, **changed: Any) -> Path:
    """A run's folder with ten metric lines; the fourth is changed."""
    lines = [
        {
            "step": 2 * n,
            "loss": 1.0,
            "images_per_second": float(n),
            "data_wait": n / 100,
            "skipped_updates": 0,
            "bad_samples": 0,
        }
        for n in range(1, 11)
    ]
    lines[3].update(changed)
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_commands_rate_is_of_the_steady_state(tmp_path: Path) -> None:
    ended = commands.read(metrics(tmp_path), steps=20)
    assert ended.rates == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert ended.rate == 6.5
    assert ended.facts()["data_wait"] == pytest.approx(0.065)


@pytest.mark.parametrize("changed", [{"skipped_updates": 1}, {"bad_samples": 1}, {"loss": float("nan")}], ids=str)
def test_a_command_that_went_wrong_is_not_timed(tmp_path: Path, changed: dict[str, float]) -> None:
    with pytest.raises(RuntimeError, match="'step': 8"):
        commands.read(metrics(tmp_path, **changed), steps=20)


def test_a_command_that_ended_early_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="step 20 of 30"):
        commands.read(metrics(tmp_path), steps=30)


def test_a_command_that_fails_shows_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3 .*the reason"):
        commands.run(commands.python("-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"))


TINY_BENCHMARK = '''
import pytest
from harness import Variant, compare, nothing

@pytest.mark.parametrize("size", [7], ids=lambda size: f"size-{size}")
def test_tiny(benchmark, session, size):
    """Tiny work, scripted.

    More about it.
    """
    ours, peer = iter([2.0, 3.0, 4.0]), iter([6.0, 6.0, 6.0])
    peers = {"slow": Variant(seconds=lambda: next(peer))}
    compare(
        benchmark, session, ours=Variant(seconds=lambda: next(ours)), peers=peers, check=nothing, items=size * 3,
        unit="images", rounds=3, warm_up_seconds=None, extra=lambda: {"more": [1, 2]},
    )

def test_disagrees(benchmark, session):
    def check():
        assert 3 == 4, "three and four"
    compare(benchmark, session, ours=Variant(), check=check, items=1, unit="images")

def test_disagrees_afterwards(benchmark, session):
    def check():
        assert 5 == 6, "five and six"
    compare(benchmark, session, ours=Variant(), check=nothing, afterwards=check, items=1, unit="images")
'''


def test_the_json_of_pytest_benchmark_holds_it_all(tmp_path: Path) -> None:
    """The real conftest.py of benchmarks/, in a process of its own."""
    (tmp_path / "test_tiny_file.py").write_text(TINY_BENCHMARK)
    options = ("-p", "conftest", "-p", "no:cacheprovider", "--benchmark-json=out.json", "--rootdir=.")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_tiny_file.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(commands.REPO, "benchmarks")), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert result["name"] == "test_tiny[size-7]"
    assert result["stats"]["data"] == pytest.approx([2.0, 3.0, 4.0])
    extra = result["extra_info"]
    assert extra["title"] == "Tiny work, scripted. [size-7]"
    assert extra["rates"]["ours"]["median"] == pytest.approx(7.0)
    assert extra["times_the_peer"]["slow"]["ratio"] == pytest.approx(2.0)
    assert extra["more"] == [1, 2]
    assert set(extra["calibration"]) == {"matmul", "copy"}
    assert f"test_tiny_file.py::test_tiny[size-7]: {extra['summary']}" in done.stdout
    assert "test_tiny_file.py::test_disagrees: the variants do not compute the same" in done.stdout
    assert "test_tiny_file.py::test_disagrees_afterwards: the variants do not compute the same" in done.stdout
    assert "three and four" in done.stdout
    assert "five and six" in done.stdout
