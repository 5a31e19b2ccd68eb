"""Stochastic depth on a part of the batch: the same as multiplying by factors, without computing what is dropped."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mvp_fast.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from mvp_fast.loaders.base import Batch
from mvp_fast.models.block import run_block
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from mvp_fast.samples.random import Stream, uniforms
from mvp_fast.train.drop_path import kept_images, scales
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.step import TrainStep

SIDE, SEED = 64, 3
RATES = (0.0, 0.25, 0.5)
CONFIG = StudentConfig(width=48, depth=3, heads=3, drop_path=0.5, drop_path_mode="subset")


def make_rows(batch_size: int, number: int = 0) -> PlanRows:
    plan = SamplePlan(
        Index.synthetic(images=100),
        seed=SEED,
        batch_size=batch_size,
        data=DataConfig(image_size=SIDE),
        mask=MaskConfig(patches=6, min_block=2),
    )
    return plan.step(number)


def factors(kept: list[Tensor], batch_size: int) -> Tensor:
    """What multiplies each branch of each image: (L, S, B), float64."""
    scale_LSB = torch.zeros(len(kept), 2, batch_size, dtype=torch.float64)
    for block, kept_SK in enumerate(kept):
        for branch in (0, 1):
            scale_LSB[block, branch, kept_SK[branch]] = batch_size / kept_SK.shape[1]
    return scale_LSB


def small_student(config: StudentConfig = CONFIG) -> Student:
    student = Student(config, target_width=16, image_size=SIDE).double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return student


def loss_and_gradients(student: Student, *given: object) -> tuple[Tensor, list[Tensor]]:
    prediction_BMD = student(*given)
    loss = (prediction_BMD * torch.linspace(-1, 1, prediction_BMD.numel()).view_as(prediction_BMD)).sum()
    return loss, list(torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad]))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_what_factors_give(batch_size: int, recompute: bool) -> None:
    """In float64, gradients too; with the last block on some tokens alone."""
    student = small_student()
    rows = make_rows(batch_size)
    kept = kept_images(rows, RATES, SEED)
    masked_BM = torch.from_numpy(rows.masked_BM())
    mask_BN = torch.zeros(batch_size, 16, dtype=torch.bool).scatter_(1, masked_BM, True)
    index_BM = torch.cat([torch.zeros(batch_size, 1, dtype=torch.int64), 1 + masked_BM], 1)
    patches_BNP = torch.randn(batch_size, 16, 768, dtype=torch.float64)
    expected = loss_and_gradients(student, patches_BNP, mask_BN, index_BM, factors(kept, batch_size))
    if recompute:
        student.recompute_blocks()
    found = loss_and_gradients(student, patches_BNP, mask_BN, index_BM, None, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if batch_size > 1:
        whole = loss_and_gradients(student, patches_BNP, mask_BN, index_BM)
        assert abs(float((whole[0] - expected[0]).detach())) > 1e-6, "nothing is dropped here"


def test_the_number_that_is_kept() -> None:
    kept = kept_images(make_rows(16), RATES, SEED)
    assert [tuple(kept_SK.shape) for kept_SK in kept] == [(2, 16), (2, 12), (2, 8)]
    assert all(kept_SK.unique(dim=1).shape == kept_SK.shape for kept_SK in kept)
    assert not torch.equal(kept[2][0], kept[2][1])  # each branch drops others
    assert [kept_SK.shape[1] for kept_SK in kept_images(make_rows(1), (0.0, 0.9), SEED)] == [1, 1]


def test_it_keeps_those_with_the_lowest_numbers_of_the_plan() -> None:
    rows = make_rows(16, 5)
    kept = kept_images(rows, RATES, SEED)
    drawn_BX = uniforms(SEED, Stream.DROP_PATH, rows.epoch_B, rows.position_B, 6)
    for block in range(3):
        for branch in (0, 1):
            column_B = drawn_BX[:, 2 * block + branch]
            inside = kept[block][branch].numpy()
            outside = np.setdiff1d(np.arange(16), inside)
            assert outside.size == 0 or column_B[inside].max() < column_B[outside].min()
    again = kept_images(make_rows(16, 5), RATES, SEED)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not torch.equal(kept_images(rows, RATES, SEED + 1)[2], kept[2])


def test_every_image_is_kept_as_often_as_asked() -> None:
    """Over many batches each place of the batch keeps the last block's branches at the rate of it."""
    counts_SB = torch.zeros(2, 16)
    for number in range(400):
        for branch, kept_K in enumerate(kept_images(make_rows(16, number), RATES, SEED)[2]):
            counts_SB[branch, kept_K] += 1
    assert (counts_SB / 400 - 0.5).abs().max() < 0.12  # 4.8 standard deviations
    shares_LS = (scales(make_rows(8000), RATES, SEED) > 0).double().mean(-1)
    torch.testing.assert_close(shares_LS, torch.tensor([[1.0] * 2, [0.75] * 2, [0.5] * 2]).double(), atol=0.03, rtol=0)


def test_it_compiles_whole_and_computes_the_same() -> None:
    torch._dynamo.reset()
    student = small_student()
    patches_BNP, kept = torch.randn(8, 16, 768, dtype=torch.float64), kept_images(make_rows(8), RATES, SEED)
    mask_BN, index_BM = torch.rand(8, 16) < 0.4, torch.arange(5).expand(8, -1).contiguous()
    expected = student(patches_BNP, mask_BN, index_BM, None, kept)
    compiled = torch.compile(run_block, fullgraph=True, dynamic=False, backend="aot_eager")
    for block in student.blocks:
        block.run = compiled
    torch.testing.assert_close(student(patches_BNP, mask_BN, index_BM, None, kept), expected, rtol=1e-10, atol=1e-12)


def test_compiling_makes_room_for_all_numbers() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would delete the setting at the end
        Student(replace(CONFIG, depth=24), target_width=4, image_size=SIDE).compile_blocks()
        assert torch._dynamo.config.recompile_limit >= 48  # with gradients and without


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_computes_nothing_of_what_is_dropped(accumulate: int) -> None:
    config = Config(
        data=DataConfig(image_size=SIDE),
        mask=MaskConfig(patches=6, min_block=2),
        student=CONFIG,
        teacher=TeacherConfig("ViT-S-16", "random"),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(batch_size=16, precision="fp32", accumulate=accumulate),
        seed=SEED,
    )
    teacher = build_teacher(config.teacher, grid=(4, 4), image_size=SIDE)
    student = Student(config.student, target_width=teacher.width, image_size=SIDE)
    step = TrainStep(
        *(student, copy.copy(student), teacher, Objective(config.objective)),
        build_optimizer(student, config.optim),
        config,
        torch.device("cpu"),
    )
    taken: list[tuple[int, int]] = []
    for number, block in enumerate(student.blocks):
        block.mlp.register_forward_pre_hook(lambda module, given, number=number: taken.append((number, len(given[0]))))
    rows = make_rows(16)
    images_BHWC = torch.randint(0, 256, (16, SIDE, SIDE, 3), dtype=torch.uint8)
    result = step(Batch(0, images_BHWC, torch.from_numpy(rows.masked_BM()), rows))
    assert bool(result.finite)
    size = 16 // accumulate
    assert taken == [(0, size), (1, size * 3 // 4), (2, size // 2)] * accumulate
