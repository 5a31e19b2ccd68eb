"""Three short benchmarks that the comparison of revisions is tried on: a loader, a reference kernel, the training step.

They are no part of the suite (their file's name keeps them out): `self_check.py` and the tests name them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import Session, Variant, compare
from peers.image_loaders import take

import mvp_kernels
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
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.samples.scenes import SceneSet, write_set
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.step import TrainStep

IMAGES, BATCH, BATCHES, NORMS = 32, 16, 6, 800
TOKENS = (4, 196, 384)  # stays in a core's cache: how fast memory is differs from process to process
WARM_UP_SECONDS = 0.2


def test_loader(benchmark: Any, session: Session, tmp_path: Path) -> None:
    """Small JPEG files to crops: torchvision, one thread."""
    write_set(tmp_path, SceneSet(IMAGES, "small"), workers=1)
    build_index(tmp_path, workers=1)
    data = DataConfig(image_size=64, threads=1)
    mask = MaskConfig(patches=6, min_block=2)
    plan = SamplePlan(Index.open(tmp_path), seed=0, batch_size=BATCH, data=data, mask=mask)
    loader = make_loader("torchvision", data)
    passages: list[Any] = []

    def before() -> None:
        passages.append(loader.batches(plan, 0))
        take(passages[0], 2)

    def after() -> None:
        passages.pop().close()

    def check() -> None:
        before()
        assert next(passages[0]).images_BHWC.shape == (BATCH, 64, 64, 3)
        after()

    ours = Variant(lambda: take(passages[0], BATCHES), before, after)
    compare(
        benchmark,
        session,
        ours=ours,
        check=check,
        items=BATCHES * BATCH,
        unit="images",
        warm_up_seconds=WARM_UP_SECONDS,
    )
    loader.close()


def test_kernel(benchmark: Any, session: Session) -> None:
    """token_norm, the reference, on one thread: two wait for the slower, and a busy machine always has one."""
    x_BND = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))

    def norm() -> torch.Tensor:
        return mvp_kernels.token_norm(x_BND, "l2", impl="reference")

    def check() -> None:
        torch.testing.assert_close(norm().norm(dim=-1), torch.ones(TOKENS[:2]))

    def work() -> None:
        for _ in range(NORMS):
            norm()

    threads = torch.get_num_threads()
    ours = Variant(work, lambda: torch.set_num_threads(1), lambda: torch.set_num_threads(threads), countable=True)
    compare(
        benchmark,
        session,
        ours=ours,
        check=check,
        items=NORMS * TOKENS[0] * TOKENS[1],
        unit="tokens",
        warm_up_seconds=WARM_UP_SECONDS,
    )


def test_step(benchmark: Any, session: Session) -> None:
    """The training step at a size that takes milliseconds."""
    config = Config(
        data=DataConfig(image_size=64),
        mask=MaskConfig(patches=6, min_block=2),
        student=StudentConfig(width=96, depth=2, heads=3),
        teacher=TeacherConfig("ViT-S-16", "random"),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(batch_size=4, precision="fp32"),
    )
    device, side = torch.device("cpu"), config.data.image_size // 16
    teacher = build_teacher(config.teacher, grid=(side, side), image_size=config.data.image_size)
    student = Student(config.student, target_width=teacher.width, image_size=config.data.image_size)
    optimizer = build_optimizer(student, config.optim)
    step = TrainStep(student, student, teacher, Objective(config.objective), optimizer, config, device)
    plan = SamplePlan(Index.synthetic(), seed=0, batch_size=config.train.batch_size, data=config.data, mask=config.mask)
    rows = plan.step(0)
    images_BHWC = torch.randint(0, 256, (len(rows), 64, 64, 3), dtype=torch.uint8)
    batch = Batch(0, images_BHWC, torch.from_numpy(rows.masked_BM()), rows)

    def check() -> None:
        assert step(batch).finite

    ours = Variant(lambda: step(batch), countable=True)
    compare(
        benchmark,
        session,
        ours=ours,
        check=check,
        items=len(rows),
        unit="images",
        warm_up_seconds=WARM_UP_SECONDS,
    )
