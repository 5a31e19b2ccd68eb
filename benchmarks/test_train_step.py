"""Images a second of the training step alone: ours against the step as one would write it with the usual libraries.

The peer holds the same student and teacher: timm's BEiT, its blocks, norm and predictor over all tokens; open_clip's
tower over all tokens; boolean indexing of the tokens in the loss; autocast; torch's AdamW; clip_grad_norm_; loss and
gradient norm read back at every step. Both get the same resident batches. That they compute the same is checked first,
in float32 and without stochastic depth: loss and gradient norm from the same weights. Then they take turns: before each
of our rounds, the peer does its own.

Shape legend: B images, H and W pixels, C channels, N tokens, M masked patches, D channels of a token.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from compare import in_words, ratio_of_medians
from torch import Tensor, nn

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
from mvp_fast.models.student import Student, beit_overrides
from mvp_fast.models.teacher import Teacher, build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.optim import build_optimizer
from mvp_fast.train.step import TrainStep

LR, AGREE = 1e-4, 1e-4


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison; `steps` a round, `rounds` of each."""

    config: Config
    device: str
    steps: int
    rounds: int


SMALL = Case(
    Config(
        data=DataConfig(image_size=112),
        mask=MaskConfig(patches=19, min_block=4),
        student=StudentConfig(width=384, depth=4, heads=6),
        teacher=TeacherConfig("ViT-S-16", "random"),
        optim=OptimConfig(lr=LR),
        train=TrainConfig(batch_size=8, precision="fp32"),  # many CPUs have no fast bf16
    ),
    device="cpu",
    steps=2,
    rounds=15,
)
B16 = Case(
    Config(
        teacher=TeacherConfig("ViT-B-16", "random"),
        optim=OptimConfig(lr=LR),
        train=TrainConfig(batch_size=256, precision="bf16"),
    ),
    device="cuda",
    steps=10,
    rounds=15,
)


class Peer:
    """The plain step, from the weights of our student and teacher."""

    def __init__(self, student: Student, teacher: Teacher, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.beit: Any = timm.create_model(
            config.student.name,
            pretrained=False,
            num_classes=0,
            global_pool="",
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            init_values=config.student.layer_scale,
            drop_path_rate=config.student.drop_path,
            **beit_overrides(config.student, config.data.image_size),
        )
        state = student.state_dict()
        self.beit.load_state_dict({name: state[name] for name in self.beit.state_dict()})
        self.beit.to(device).train()
        self.mask_token = nn.Parameter(student.mask_token.detach().clone())
        self.predictor = copy.deepcopy(student.predictor)
        self.tower: Any = copy.deepcopy(teacher.visual)
        self.tower.output_tokens = True
        self.parameters = [*self.beit.parameters(), self.mask_token, *self.predictor.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, betas=config.optim.betas, weight_decay=config.optim.weight_decay
        )
        self.statistics = {
            name: [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (part.mean, part.std)]
            for name, part in (("student", student), ("teacher", teacher))
        }

    def __call__(self, batch: Batch) -> tuple[float, float]:
        """One step; loss and gradient norm before clipping."""
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            with torch.no_grad():
                pooled_BD, tokens_BND = self.tower(self._normalised(batch, "teacher"))
                target_BND = torch.cat((pooled_BD[:, None], tokens_BND @ self.tower.proj), dim=1)
            predicted_BND = self.predictor(self._encode(batch))
        in_loss_BN = F.pad(self._mask_BN(batch), (1, 0), value=True)
        predicted_XD, target_XD = predicted_BND[in_loss_BN].float(), target_BND[in_loss_BN].float()
        loss = (1 - F.cosine_similarity(predicted_XD, target_XD, dim=-1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_grad)
        self.optimizer.step()
        return loss.item(), norm.item()

    def _encode(self, batch: Batch) -> Tensor:
        x_BND = self.beit.patch_embed(self._normalised(batch, "student"))
        x_BND = torch.where(self._mask_BN(batch)[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        x_BND = torch.cat((self.beit.cls_token.expand(x_BND.shape[0], -1, -1).to(x_BND.dtype), x_BND), dim=1)
        bias_HNN = self.beit.rel_pos_bias()
        for block in self.beit.blocks:
            x_BND = block(x_BND, shared_rel_pos_bias=bias_HNN)
        encoded_BND: Tensor = self.beit.norm(x_BND)
        return encoded_BND

    def _normalised(self, batch: Batch, whose: str) -> Tensor:
        mean, std = self.statistics[whose]
        return (batch.images_BHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def _mask_BN(self, batch: Batch) -> Tensor:
        patches = (self.config.data.image_size // 16) ** 2
        mask_BN = torch.zeros(len(batch.masked_BM), patches, dtype=torch.bool, device=self.device)
        return mask_BN.scatter_(1, batch.masked_BM, True)


def make_both(case: Case, config: Config) -> tuple[TrainStep, Peer]:
    device = torch.device(case.device)
    side = config.data.image_size // 16
    teacher = build_teacher(config.teacher, grid=(side, side), image_size=config.data.image_size).to(device)
    student = Student(config.student, target_width=teacher.width, image_size=config.data.image_size).to(device)
    optimizer = build_optimizer(student, config.optim)
    ours = TrainStep(student, student, teacher, Objective(config.objective), optimizer, config, device)
    return ours, Peer(student, teacher, config, device)


def make_batches(case: Case, config: Config) -> list[Batch]:
    """Resident batches, each with its own pixels and masks."""
    plan = SamplePlan(Index.synthetic(), seed=0, batch_size=config.train.batch_size, data=config.data, mask=config.mask)
    generator, batches = torch.Generator().manual_seed(0), []
    for step in range(4):
        rows, side = plan.step(step), config.data.image_size
        images_BHWC = torch.randint(0, 256, (len(rows), side, side, 3), dtype=torch.uint8, generator=generator)
        masked_BM = torch.from_numpy(rows.masked_BM())
        batches.append(Batch(step, images_BHWC.to(case.device), masked_BM.to(case.device), rows))
    return batches


def check_agreement(case: Case) -> None:
    """Same weights and batches, float32, no stochastic depth: the same losses and gradient norms, step after step."""
    config = replace(
        case.config,
        student=replace(case.config.student, drop_path=0.0),
        train=replace(case.config.train, precision="fp32", batch_size=4),
        optim=replace(case.config.optim, weight_decay=0.0),  # the peer decays biases and norms too
    )
    ours, peer = make_both(case, config)
    with full_float32():
        for batch in make_batches(case, config)[:2]:
            result, (loss, norm) = ours(batch), peer(batch)
            assert result.loss.item() == pytest.approx(loss, rel=AGREE)
            assert result.grad_norm.item() == pytest.approx(norm, rel=10 * AGREE)


def full_float32() -> Any:
    """No TF32, whose rounding would hide a difference."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if torch.cuda.is_available() else nullcontext()


def compare(benchmark: Any, case: Case, quick: bool) -> None:
    steps, rounds = (1, 1) if quick else (case.steps, case.rounds)
    check_agreement(case)
    ours, peer = make_both(case, case.config)
    batches = make_batches(case, case.config)

    def steps_of(step: Callable[[Batch], Any]) -> None:
        for number in range(steps):
            step(batches[number % len(batches)])
        if case.device == "cuda":
            torch.cuda.synchronize()

    memory = {}
    mvp_kernels.reset_record()
    for name, step in (("ours", ours), ("peer", peer)):
        steps_of(step)  # a warm-up
        memory[name] = peak_memory(case, lambda step=step: steps_of(step))
    peer_seconds: list[float] = []

    def peer_round() -> None:
        start = time.perf_counter()
        steps_of(peer)
        peer_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(steps_of, args=(ours,), setup=peer_round, rounds=rounds, iterations=1)
    ours_seconds = benchmark.stats.stats.data
    images = steps * case.config.train.batch_size
    rates = {who: images / float(np.median(s)) for who, s in (("ours", ours_seconds), ("peer", peer_seconds))}
    times = ratio_of_medians(ours_seconds, peer_seconds)
    in_memory = "".join(f", {name} {size / 2**30:.2f} GiB" for name, size in memory.items() if size is not None)
    benchmark.extra_info.update(
        summary=f"{rates['ours']:.1f} images/s, plain step {rates['peer']:.1f}; {in_words(times)}{in_memory}",
        images_a_round=images,
        images_a_second=rates,
        peer_seconds=peer_seconds,
        times_the_peer=times,
        peak_memory_above_resident_bytes=memory,
        kernels=mvp_kernels.record(),
        precision=case.config.train.precision,
    )


def peak_memory(case: Case, work: Callable[[], None]) -> int | None:
    """Bytes that a round takes on the GPU above what is resident (weights, optimizer state, batches of both)."""
    if case.device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - resident


def test_small_step(benchmark: Any, quick: bool) -> None:
    compare(benchmark, SMALL, quick)


@pytest.mark.gpu
def test_b16_step(benchmark: Any, quick: bool) -> None:
    compare(benchmark, B16, quick)
