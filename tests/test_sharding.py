"""A student spread over two ranks (train.sharding full) against DDP and one rank: torchrun, gloo, the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_fast.models.student import Student
from tests.conftest import REPO
from tests.sharded_ranks import BASE, CASES, CLIP, POISONED, STEPS

Found = dict[str, Any]
MATRICES = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
GROUPS = BASE.student.depth + 1  # each block and the root


@pytest.fixture(scope="module")
def ranks(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two ranks found; see sharded_ranks.py."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(REPO / "tests" / "sharded_ranks.py"), str(scenes), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def both(ranks: list[Found], case: str) -> tuple[Found, Found]:
    """The same run on the first rank: DDP, sharded."""
    return ranks[0][f"{case}.none"], ranks[0][f"{case}.full"]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float) -> None:
    """Tensor by tensor, the norm of the difference against that of the tensor."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert tensor.dtype == theirs[name].dtype, name
        difference = (tensor.double() - theirs[name].double()).norm()
        assert difference <= share * theirs[name].double().norm(), f"{name}: {difference}"


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_ddps(ranks: list[Found], case: str) -> None:
    for rank in ranks:
        ddp, sharded = rank[f"{case}.none"], rank[f"{case}.full"]
        # In bf16 the weights' rounding turns the last digit of an update into one of a thousand here and there.
        close = 1e-6 if case != "bf16" else 2e-3
        assert sharded["losses"] == pytest.approx(ddp["losses"], rel=close, abs=0, nan_ok=True)
        assert sharded["norms"] == pytest.approx(ddp["norms"], rel=max(close, 1e-5), abs=0, nan_ok=True)
        assert len(set(ddp["losses"])) == STEPS
    assert ranks[0][f"{case}.full"]["losses"] != ranks[1][f"{case}.full"]["losses"], "each rank has images of its own"


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_compiled_blocks_compute_the_same(ranks: list[Found], sharding: str) -> None:
    plain, compiled = (ranks[0][f"{case}.{sharding}"] for case in ("recomputed", "compiled"))
    assert (compiled["compiled"], plain["compiled"]) == (True, False)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5, abs=0)
    assert_close(compiled["gradients"], plain["gradients"], 1e-4)


def test_bf16_computes_what_autocast_computes(ranks: list[Found]) -> None:
    """The same weights give the very same loss, and gradients that differ by the order of the sum over ranks alone."""
    ddp, sharded = both(ranks, "bf16")
    assert sharded["losses"][0] == ddp["losses"][0]
    assert_close(sharded["gradients"], ddp["gradients"], 1e-6)


def test_what_travels_in_bf16(ranks: list[Found]) -> None:
    types = ranks[0]["bf16.full"]["types"]
    assert types.keys() > MATRICES
    assert {name for name, kind in types.items() if kind == "torch.bfloat16"} == MATRICES
    assert {kind for name, kind in types.items() if name not in MATRICES} == {"torch.float32"}
    assert set(ranks[0]["fp32.full"]["types"].values()) == {"torch.float32"}


@pytest.mark.parametrize(("case", "share"), [(case, 1e-5) for case in CASES if case != "bf16"])
def test_weights_averages_and_optimizer_state_are_ddps(ranks: list[Found], case: str, share: float) -> None:
    ddp, sharded = both(ranks, case)
    assert_close(sharded["first"], ddp["first"], share)
    assert sharded["parts"].keys() == ddp["parts"].keys() == {"student", "optimizer", "progress", "ema"}
    for part in ("student", "ema", "optimizer"):
        assert_close(sharded["parts"][part], ddp["parts"][part], share)
    assert any(not torch.equal(sharded["parts"]["ema"][name], value) for name, value in ddp["parts"]["student"].items())
    assert not any(ranks[1][f"{case}.full"]["parts"].values()), "the rank that writes nothing keeps nothing"


def test_each_rank_holds_its_part(ranks: list[Found]) -> None:
    whole = ranks[0]["fp32.none"]["held"]
    for rank in ranks:
        for case in CASES:
            for part in ("student", "ema", "optimizer"):
                assert 0.4 * whole[part] < rank[f"{case}.full"]["held"][part] < 0.6 * whole[part], (case, part)
            assert rank[f"{case}.none"]["held"][part] == whole[part]


def test_exchanges_of_a_step(ranks: list[Found]) -> None:
    """Gradients once, whatever the micro-batches; weights for each forward and backward pass but the root's and the
    last block's, which are kept from one to the other."""
    parts = CASES["fp32"][0].train.accumulate
    gathered = parts * (2 * GROUPS - 2)
    for name, counts in ranks[0]["fp32.full"]["exchanges"][-1].items():
        wanted = gathered if "gather" in name else GROUPS if "reduce_scatter" in name else 1 if "reduce" in name else 0
        assert counts == wanted, (name, counts)
    assert len(ranks[0]["fp32.full"]["exchanges"][-1]) == 3


def test_a_loss_that_is_infinite_on_one_rank_skips_the_update_on_all(ranks: list[Found]) -> None:
    for rank in ranks:
        for sharding in ("none", "full"):
            found = rank[f"poisoned.{sharding}"]
            assert found["finite"] == [number != POISONED for number in range(STEPS)]
            assert [bool(names) for names in found["changed"]] == found["finite"]
    for sharding in ("none", "full"):
        poisoned = [torch.tensor(rank[f"poisoned.{sharding}"]["losses"]).isfinite().all() for rank in ranks]
        assert poisoned == [True, False]
    assert all(all(rank["fp32.full"]["finite"]) for rank in ranks)


def test_every_update_changes_every_weight(ranks: list[Found]) -> None:
    names = ranks[0]["fp32.full"]["parts"]["student"].keys()
    for rank in ranks:
        for changed in rank["fp32.full"]["changed"]:
            assert set(changed) == set(names)


def test_clipping_is_that_of_whole_gradients(ranks: list[Found]) -> None:
    for case in ("fp32", "bf16"):
        assert all(norm > CLIP for norm in ranks[0][f"{case}.full"]["norms"]), "the premise: the limit is at work"
    for rank in ranks:
        for found in rank["clipped"]:
            weights = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in found["before"]]
            for weight, tensor in zip(weights, found["before"], strict=True):
                weight.grad = tensor.clone()
            norm = torch.nn.utils.clip_grad_norm_(weights, found["limit"] or torch.inf)
            torch.testing.assert_close(found["norm"], norm, equal_nan=True)
            if norm.isfinite():
                torch.testing.assert_close(found["after"], [weight.grad for weight in weights])
            else:
                assert not found["norm"].isfinite()


def test_encode(ranks: list[Found]) -> None:
    """What is no forward pass of training gathers its weights too."""
    found = ranks[0]["fp32.full"]
    width = found["parts"]["student"]["predictor.weight"].shape[0]
    student = Student(BASE.student, target_width=width, image_size=64)
    student.load_state_dict(found["parts"]["student"])
    with torch.no_grad():
        wanted = student.encode(student.patches(found["images"]))
    torch.testing.assert_close(found["encoded"], wanted, rtol=0, atol=1e-5)
