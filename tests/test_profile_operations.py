"""How many operations and bytes a step takes, against torch's own counter; and the rates that they are held against."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvp_fast.config.schema import Config, DataConfig, StudentConfig, TeacherConfig, TrainConfig
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.train.build import build_run
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.profile.memory import resident
from mvp_fast.train.profile.operations import Tower, Work, operations, products, teacher_tower
from mvp_fast.train.profile.rates import Rates, measure_rates

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # is no package: its helpers are found there

from counts import flops_of
from peers.step_cases import SMALL, Case, flops_an_image

CPU = Ranks(0, 1, 1, torch.device("cpu"))


OTHER = replace(
    SMALL,
    config=replace(
        SMALL.config,
        data=DataConfig(image_size=64),
        mask=replace(SMALL.config.mask, patches=6, min_block=2),
        student=StudentConfig(width=128, depth=3, heads=2),
    ),
)


@pytest.mark.parametrize("case", [SMALL, OTHER], ids=["112 px", "64 px"])
def test_operations_of_a_step_are_those_that_torch_counts_in_the_plain_step(case: Case) -> None:
    """The plain step of the benchmarks: every token in every layer, forward and backward, and open_clip's teacher."""
    config = replace(case.config, data=replace(case.config.data, loader="synthetic"))
    work = operations(build_run(config, CPU, None))
    assert products(work) / config.train.batch_size == pytest.approx(flops_an_image(case), rel=1e-3)


@pytest.mark.parametrize(("name", "side"), [("ViT-S-16", 64), ("ViT-S-32", 192)])
def test_a_teachers_operations_are_those_that_torch_counts(name: str, side: int) -> None:
    patch = int(name[-2:])
    teacher = build_teacher(TeacherConfig(name, "random"), grid=(side // patch, side // patch), image_size=side)
    tokens = (side // patch) ** 2 + 1
    every_BK, patches_BNP = torch.arange(tokens).expand(2, -1), torch.randn(2, tokens - 1, 3 * patch**2)
    counted = flops_of(lambda: teacher(patches_BNP, every_BK))
    tower = teacher_tower(teacher)
    assert tower is not None
    assert tower.forward(2, 4).flops == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vit_tiny_patch16_224", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("beit_base_patch16_224", 64),
        ("eva02_tiny_patch14_224", 56),
    ],
)
def test_a_timm_teachers_operations_are_those_that_torch_counts(name: str, side: int) -> None:
    teacher = build_teacher(TeacherConfig(name, "random", kind="timm"), grid=(4, 4), image_size=side)
    every_BK, patches_BNP = torch.arange(17).expand(2, -1), torch.randn(2, 16, 3 * (side // 4) ** 2)
    counted = flops_of(lambda: teacher(patches_BNP, every_BK))
    tower = teacher_tower(teacher)
    assert tower is not None
    # Of registers, no query and no MLP of the last block where it is pruned.
    registers = tower.prefix - 1
    assert tower.forward(2, 4).flops == pytest.approx(counted, rel=1e-6 if registers == 0 else 0.02)
    assert tower.forward(2, 4).flops >= counted * (1 - 1e-6)


@pytest.mark.parametrize("kind", ["pixels", "hog"])
def test_teachers_without_products_are_left_out(kind: str) -> None:
    config = replace(
        OTHER.config,
        data=replace(OTHER.config.data, loader="synthetic"),
        teacher=TeacherConfig(kind=kind),  # type: ignore[arg-type]
        objective=replace(OTHER.config.objective, cls=False),
    )
    with_clip = replace(OTHER.config, data=config.data)
    work, other = (operations(build_run(each, CPU, None)) for each in (config, with_clip))
    assert "teacher" not in work
    assert products(work) == work["student forward"].flops + work["backward"].flops
    assert work["patchify"] == other["patchify"]


def test_a_linear_layer_reads_input_and_weights_and_writes_its_output_once() -> None:
    tower = Tower(patches=5, patch_values=7, width=3, hidden=0, depth=0, head=0)
    assert tower.embedding(2, 4) == Work(2 * 10 * 7 * 3, 4 * (10 * 7 + 10 * 3 + 7 * 3))


def test_half_precision_moves_half_and_computes_as_much() -> None:
    tower = Tower(patches=5, patch_values=7, width=12, hidden=48, depth=2, head=9)
    single, half = tower.forward(2, 4), tower.forward(2, 2)
    assert half.flops == single.flops
    assert half.bytes == single.bytes / 2


def test_memory_by_part_is_what_the_parts_weigh() -> None:
    config = Config(
        data=DataConfig(image_size=64, loader="synthetic"),
        mask=replace(Config().mask, patches=6, min_block=2),
        student=StudentConfig(width=64, depth=2, heads=2),
        teacher=TeacherConfig("ViT-S-16", "random"),
        train=TrainConfig(batch_size=4, precision="fp32", device="cpu", ema_decay=0.9),
    )
    run = build_run(config, CPU, None)
    before = resident(run)
    count = sum(parameter.numel() for parameter in run.student.parameters())
    assert before["student weights"] == before["averaged weights"] == 4 * count
    assert "gradients" not in before
    assert "optimizer state" not in before
    batch = next(make_loader("synthetic", config.data).batches(run.plan, 0))
    run.step(batch)
    after = resident(run)
    assert after["gradients"] == 4 * count
    # Two averages a weight, and each parameter's count of steps.
    assert 8 * count <= after["optimizer state"] <= 8 * count + 8 * len(list(run.student.parameters()))
    assert after["teacher"] == sum(4 * each.numel() for each in run.teacher.state_dict().values())


def test_rates_are_of_this_device() -> None:
    rates = measure_rates(torch.device("cpu"))
    assert set(rates.matmul) == {"fp32", "bf16"}
    # No machine that this runs on does less than a million, or more than 10^16, a second.
    assert all(1e6 < rate < 1e16 for rate in (*rates.matmul.values(), rates.copy))
    assert rates.upload is None


def test_a_device_without_room_gets_a_smaller_product(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(device: torch.device, side: int, size: int) -> Rates:
        tried.append((side, size))
        if side > 2048:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Rates({}, 1.0)

    monkeypatch.setattr("mvp_fast.train.profile.rates._measure", measured)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert measure_rates(torch.device("cuda")).copy == 1.0
    assert tried == [(8192, 1 << 29), (4096, 1 << 27), (2048, 1 << 25)]
    monkeypatch.setattr("mvp_fast.train.profile.rates.LEAST_SIDE", 4096)
    with pytest.raises(torch.OutOfMemoryError):
        measure_rates(torch.device("cuda"))
