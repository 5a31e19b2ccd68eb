"""The teacher alone: from uint8 crops to the features of the tokens in the loss.

Ours normalises and cuts patches in one pass, and only the tokens in the loss leave its last block. On the GPU it is in
FP16, and one CUDA graph; beside it stands the same without a graph. The
peers are open_clip's own forward over all tokens (`peers.plain_step.PlainTeacher`), of whose result the tokens in the
loss are taken: eager, and on the GPU through torch.compile as well (on the CPU compiling takes longer than all the rest
of the benchmark). The same weights, crops and tokens; that the features agree is checked first, in float32.

Shape legend: B images, H and W pixels, C channels, M tokens in the loss, D channels of a feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counts import flops_of
from harness import Session, Variant, compare
from peers.plain_step import PlainTeacher, autocast
from peers.step_cases import B16, SMALL, Case, exact, full_float32, make_batches
from torch import Tensor
from torch.nn import functional as F

import mvp_kernels
from mvp_fast.models.graphs import GraphedFunction
from mvp_fast.models.teachers.base import Teacher, teacher_dtype
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective

pytestmark = pytest.mark.timeout(900)  # also on a busy machine, and torch.compile takes its time
AGREE = 1e-4  # float32, as a share of the features' norm
COMPILED_AGREES = 0.05  # in the precision that is timed: bf16 rounds otherwise in other fusions
Features = Callable[[Tensor, Tensor], Tensor]  # images_BHWC, index_BM -> features_BMD


def ours_of(teacher: Teacher) -> Features:
    return lambda images_BHWC, index_BM: teacher(teacher.patches(images_BHWC), index_BM)


def graphed(features: Features) -> Features:
    graph = GraphedFunction(lambda *given: (features(*given),))
    return lambda images_BHWC, index_BM: graph(images_BHWC, index_BM)[0]


def plain_of(teacher: Any) -> Features:
    @torch.no_grad()
    def features(images_BHWC: Tensor, index_BM: Tensor) -> Tensor:
        all_BTD = teacher(images_BHWC.permute(0, 3, 1, 2))
        return torch.take_along_dim(all_BTD, index_BM[..., None], dim=1)

    return features


def inputs(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Crops, and the tokens in the loss, of resident batches."""
    objective, side = Objective(case.config.objective), case.config.data.image_size // 16
    return [(each.images_BHWC, objective.token_index(each.masked_BM, side * side)) for each in make_batches(case)]


def assert_close(ours_BMD: Tensor, other_BMD: Tensor, share: float) -> None:
    assert ours_BMD.shape == other_BMD.shape, f"{tuple(ours_BMD.shape)} and {tuple(other_BMD.shape)}"
    distance = F.mse_loss(other_BMD.double(), ours_BMD.double()).sqrt() / ours_BMD.double().square().mean().sqrt()
    assert distance <= share, f"the features differ by {float(distance):.2g} of their size"


def measure(benchmark: Any, session: Session, case: Case, batches: int, compiled: bool, rounds: int) -> None:
    config, device = case.config, torch.device(case.device)
    batches, side = 1 if session.quick else batches, config.data.image_size // 16
    teacher = build_teacher(config.teacher, grid=(side, side), image_size=config.data.image_size).to(device)
    plain = PlainTeacher(teacher).to(device)
    full, peers = ours_of(copy.deepcopy(teacher)), {"open_clip eager": plain_of(plain)}
    dtype = teacher_dtype(config.teacher.precision, config.train.precision, device)
    ours = ours_of(teacher if dtype == torch.float32 else teacher.lower(dtype))
    if device.type == "cuda" and not session.turns:
        peers["without a graph"] = ours
    if device.type == "cuda":
        ours = graphed(ours)
    if compiled and not session.turns:
        peers["open_clip compiled"] = plain_of(torch.compile(plain))
    resident = inputs(case)

    def in_precision(features: Features, number: int = 0) -> Tensor:
        with autocast(config, device):
            return features(*resident[number % len(resident)])

    def check() -> None:
        with full_float32():
            for each in inputs(exact(case)):
                assert_close(full(*each), peers["open_clip eager"](*each), AGREE)
        for features in peers.values():
            assert_close(in_precision(ours), in_precision(features), AGREE if device.type == "cpu" else COMPILED_AGREES)

    def variant(name: str, features: Features) -> Variant:
        def run() -> None:
            for number in range(batches):
                in_precision(features, number)

        return Variant(run, countable=True, compiled=name.endswith("compiled"))

    def flops_an_image() -> float:
        """Of open_clip's forward over all tokens: what ours leaves out counts in its favour."""
        two = inputs(case.of(2))[0]
        return flops_of(lambda: peers["open_clip eager"](*two)) / 2

    mvp_kernels.reset_record()
    compare(
        benchmark,
        session,
        ours=variant("ours", ours),
        peers={name: variant(name, features) for name, features in peers.items()},
        check=check,
        items=batches * config.train.batch_size,
        unit="images",
        device=case.device,
        rounds=rounds,
        flops_an_item=flops_an_image,
        extra=lambda: {"kernels": mvp_kernels.record(), "precision": str(dtype).removeprefix("torch.")},
    )


def test_small_teacher(benchmark: Any, session: Session) -> None:
    """Teacher's features of the tokens in the loss, ViT-S-16, 112 px, batch 8, float32."""
    measure(benchmark, session, SMALL, batches=2, compiled=False, rounds=15)


@pytest.mark.gpu
def test_b16_teacher(benchmark: Any, session: Session) -> None:
    """Teacher's features of the tokens in the loss, ViT-B/16, 224 px, batch 256, FP16; peers under bf16 autocast."""
    measure(benchmark, session, B16, batches=10, compiled=True, rounds=15)
