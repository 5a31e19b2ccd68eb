"""Images a second of the training step alone: ours against the step as one would write it with the usual libraries.

The peers are `peers.plain_step`: the same student and teacher, eager, and on the GPU through torch.compile as well. On
the CPU compiling takes longer than all the rest of the benchmark, and nobody trains there. All get the same resident
batches. That they compute the same is checked first, in float32 and without stochastic depth: loss and gradient norm
from the same weights, over two steps.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import Session, Variant, compare
from peers.step_cases import (
    B16,
    COMPILED,
    SMALL,
    Case,
    check_compiled,
    check_steps,
    flops_an_image,
    make_batches,
    make_steps,
    plainly,
    work,
)

import mvp_kernels

pytestmark = pytest.mark.timeout(900)  # also on a busy machine, and torch.compile takes its time


def measure(benchmark: Any, session: Session, case: Case, steps: int, compiled: bool, rounds: int) -> None:
    steps, compiled = 1 if session.quick else steps, compiled and not session.turns
    batches, made = make_batches(case), make_steps(case, compiled)

    def check() -> None:
        check_steps(case)
        if compiled:
            check_compiled(made.plain, batches[0])

    mvp_kernels.reset_record()
    compare(
        benchmark,
        session,
        ours=Variant(work(made.ours, batches, steps), countable=True),
        peers={
            name: Variant(work(plainly(step), batches, steps), countable=True, compiled=name == COMPILED)
            for name, step in made.plain.items()
        },
        check=check,
        items=steps * case.config.train.batch_size,
        unit="images",
        device=case.device,
        rounds=rounds,
        flops_an_item=lambda: flops_an_image(case),
        extra=lambda: {"kernels": mvp_kernels.record(), "precision": case.config.train.precision},
    )


def test_small_step(benchmark: Any, session: Session) -> None:
    """Training step, width 384, 4 blocks, ViT-S-16 teacher, 112 px, batch 8, float32."""
    measure(benchmark, session, SMALL, steps=2, compiled=False, rounds=15)


@pytest.mark.gpu
def test_b16_step(benchmark: Any, session: Session) -> None:
    """Training step, ViT-B/16 student and teacher, 224 px, batch 256, bf16."""
    measure(benchmark, session, B16, steps=5, compiled=True, rounds=15)
