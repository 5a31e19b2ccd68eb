"""Training through the Triton kernels and through the reference: the same loss curve, by the path that was asked for.

Without a GPU the kernels run in Triton's interpreter.

Shape legend: B images, H and W pixels, C colours, N patches, P pixel values a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import mvp_kernels
from mvp_fast.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    ObjectiveConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models import patches
from mvp_fast.models.patches import patches_of_both
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.step import TrainStep
from tests.conftest import arguments, losses, run_verb

STEPS = 50
OPS = ("guided_loss", "masked_gather", "patchify", "relpos_attention", "relpos_attention_qkv", "relpos_bias")
DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
CONFIG = Config(
    data=DataConfig(image_size=64, loader="synthetic"),
    mask=MaskConfig(patches=6, min_block=2),
    student=StudentConfig(width=64, depth=2, heads=1, drop_path=0.1),  # one head: the interpreter takes its time
    teacher=TeacherConfig("ViT-S-16", "random"),
    optim=OptimConfig(lr=1e-3, reference_batch_size=4),
    train=TrainConfig(batch_size=4, accumulate=2, precision="fp32"),
)


@pytest.fixture(autouse=True)
def quiet_threads() -> Iterator[None]:
    """More threads would only wait for each other over tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(config: Config, impl: str, device: str, steps: int) -> list[float]:
    """The losses of a run's first steps, from one seed."""
    where = torch.device(device)
    teacher = build_teacher(config.teacher, grid=(4, 4), image_size=64, impl=impl).to(where)
    student = Student(config.student, target_width=teacher.width, image_size=64, impl=impl).to(where)
    optimizer = build_optimizer(student, config.optim)
    objective = Objective(config.objective, impl=impl)
    step = TrainStep(student, student, teacher, objective, optimizer, config, where)
    plan = SamplePlan(Index.synthetic(images=64), seed=0, batch_size=4, data=config.data, mask=config.mask)
    loader = make_loader("synthetic", config.data, device=where)
    found = [step(batch).loss for batch in islice(loader.batches(plan, 0), steps)]
    loader.close()
    return torch.stack(found).tolist()


@DEVICES
@pytest.mark.parametrize("norm", ["l2", "layernorm"])
def test_both_implementations_give_one_loss_curve(device: str, norm: str) -> None:
    config = replace(CONFIG, objective=ObjectiveConfig(target_norm=norm))
    found = {}
    for impl in ("reference", "triton"):
        mvp_kernels.reset_record()
        found[impl] = curve(config, impl, device, STEPS if norm == "l2" else 5)
        assert mvp_kernels.record() == dict.fromkeys(OPS, impl)
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-5)
    assert found["reference"][-1] < found["reference"][0] - (0.2 if norm == "l2" else 0.01), "it learns nothing"


@DEVICES
def test_smooth_l1_goes_through_token_norm(device: str) -> None:
    config = replace(CONFIG, objective=ObjectiveConfig(target_norm="layernorm", loss="smooth_l1"))
    found = {}
    for impl in ("reference", "triton"):
        mvp_kernels.reset_record()
        found[impl] = curve(config, impl, device, 3)
        assert mvp_kernels.last_used("token_norm") == impl
        assert mvp_kernels.last_used("guided_loss") is None
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-5)


def test_the_command_line_trains_by_triton(scenes: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """The header says which kernels run, and both runs go the same way; without a GPU in the interpreter."""
    found = {}
    for impl in ("reference", "triton"):
        settings = {**tiny, "data.index": scenes, "run.dir": tmp_path / impl, "train.steps": 2, "kernels.impl": impl}
        told = run_verb("train", *arguments(settings), env={"TRITON_INTERPRET": "1"})
        assert f"kernels   {impl}" in told.stdout
        found[impl] = losses(tmp_path / impl)
    assert list(found["triton"]) == [1, 2]
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-5)


# ---- one read of the crops for both models


@pytest.mark.parametrize(("name", "reads"), [("ViT-B-16", 1), ("ViT-L-14", 2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_patches_of_both(monkeypatch: pytest.MonkeyPatch, name: str, reads: int, autocast: bool) -> None:
    """As each model's own `patches`; read once where their patches are the same size, and in autocast's type."""
    small = TeacherConfig(name, "random")
    teacher = build_teacher(small, grid=(2, 2), image_size=32)
    student = Student(StudentConfig(width=32, depth=1, heads=2), target_width=8, image_size=32)
    images_BHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    calls = []
    patchify = patches.dispatch.patchify
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = student.patches(images_BHWC), teacher.patches(images_BHWC)
        monkeypatch.setattr(patches.dispatch, "patchify", lambda *a, **k: calls.append(a) or patchify(*a, **k))
        found = patches_of_both(images_BHWC, student, teacher)
    assert len(calls) == reads
    for one, other in zip(found, want, strict=True):
        assert one.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(one, other)
    assert not torch.equal(found[0], found[1])
