"""How rates grow: with ranks, with the batch size, with cores.

The other variants of the first and the last are ours, too, with fewer ranks or cores: a ratio of 2 for twice as many
would be perfect. All do the same work: the same global batch, whose loss is compared after the rounds, and the same
batches of crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Session, Variant, compare, nothing
from peers.commands import OURS, SMALL, Training
from peers.pinned_loader import BATCH, PinnedLoader
from peers.step_cases import B16, Case, check_steps, make_batches, make_steps, plainly, work
from peers.step_cases import SMALL as SMALL_STEP
from recorder import cores

pytestmark = pytest.mark.timeout(900)  # also on a busy machine
SAME_LOSS = 1e-3  # relative, of the first metric line: sums in another order
NEAR_LOSS = 0.03  # where `synthetic` gives each rank the same images
BATCHES_A_CORE = 4  # a round of a loader


def torchrun(ranks: int, settings: dict[str, object], folder: Path, device: str) -> Training:
    """`torchrun -m mvp_fast train`; on the CPU a rank has one core, for the step and for loading."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *OURS)
    if device == "cuda":
        return Training(command, settings, folder)
    return Training(command, settings, folder, {"OMP_NUM_THREADS": "1"}, cores=ranks)


def measure_ranks(
    benchmark: Any, session: Session, settings: dict[str, object], folder: Path, device: str, loss: float
) -> None:
    two, one = (torchrun(ranks, settings, folder / f"ranks{ranks}", device) for ranks in (2, 1))

    def same_loss() -> None:
        if session.quick:
            return
        assert one.last is not None
        assert two.last is not None
        first, other = (each.lines[0]["loss"] for each in (one.last, two.last))
        assert other == pytest.approx(first, rel=loss), "the first loss"

    def extra() -> dict[str, Any]:
        assert two.last is not None
        return two.last.facts()

    compare(
        benchmark,
        session,
        ours=two.variant(),
        peers={} if session.quick else {"one rank": one.variant()},
        check=nothing,
        items=two.images,
        unit="images",
        device=device,
        rounds=2,
        warm_up_seconds=None,
        afterwards=same_loss,
        extra=extra,
    )


def test_two_ranks(benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path) -> None:
    """Two ranks on two cores, global batch 16, width 96, 2 blocks, ViT-S-16 teacher, 112 px, float32, gloo."""
    settings = {
        **SMALL,
        "data.index": imagenet_scenes,
        "data.loader": "torchvision",
        "data.threads": 1,
        "train.batch-size": 16,
        "train.steps": 4 if session.quick else 12,
        "train.log-every": 2,
    }
    measure_ranks(benchmark, session, settings, tmp_path, "cpu", SAME_LOSS)


@pytest.mark.gpu
def test_two_ranks_b16(benchmark: Any, session: Session, tmp_path: Path) -> None:
    """Two ranks on two GPUs, global batch 512, ViT-B/16 student and teacher, 224 px, bf16, NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two ranks need two GPUs, and torch sees {torch.cuda.device_count()}")
    settings = {
        "data.loader": "synthetic",
        "teacher.name": "ViT-B-16",
        "teacher.pretrained": "random",
        "train.batch-size": 512,
        "train.steps": 10 if session.quick else 40,
        "train.log-every": 2,
        "train.device": "cuda",
        "run.tensorboard": False,
    }
    measure_ranks(benchmark, session, settings, tmp_path, "cuda", NEAR_LOSS)


def measure_batch_size(benchmark: Any, session: Session, case: Case, steps: int) -> None:
    steps = 1 if session.quick else steps
    batches, made = make_batches(case), make_steps(case)
    compare(
        benchmark,
        session,
        ours=Variant(work(made.ours, batches, steps), countable=True),
        peers={"eager": Variant(work(plainly(made.plain["eager"]), batches, steps), countable=True)},
        check=lambda: check_steps(case),
        items=steps * case.config.train.batch_size,
        unit="images",
        device=case.device,
        rounds=7,
    )


@pytest.mark.parametrize("batch_size", [2, 16], ids=lambda size: f"batch-{size}")
def test_batch_size(benchmark: Any, session: Session, batch_size: int) -> None:
    """Training step by batch size, width 384, 4 blocks, ViT-S-16 teacher, 112 px, float32."""
    if session.quick and batch_size > 2:
        pytest.skip("one batch size is enough for --quick")
    measure_batch_size(benchmark, session, SMALL_STEP.of(batch_size), steps=max(1, 8 // batch_size))


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [32, 128], ids=lambda size: f"batch-{size}")
def test_batch_size_b16(benchmark: Any, session: Session, batch_size: int) -> None:
    """Training step by batch size, ViT-B/16 student and teacher, 224 px, bf16."""
    measure_batch_size(benchmark, session, B16.of(batch_size), steps=1024 // batch_size)


@pytest.fixture
def pinned(imagenet_scenes: Path, session: Session) -> Iterator[dict[int, PinnedLoader]]:
    """The torchvision loader on all cores and, where it is not alone in its turns, on each power of two below."""
    fewer = [] if session.turns else [1 << n for n in range(cores().bit_length()) if 1 << n < cores()]
    counts, loaders = [cores(), *fewer], {}
    try:
        for count in counts:
            loaders[count] = PinnedLoader("torchvision", imagenet_scenes, count)
        yield loaders
    finally:
        for loader in loaders.values():
            loader.close()


def test_loader_cores(benchmark: Any, session: Session, pinned: dict[int, PinnedLoader]) -> None:
    """The torchvision loader on all cores and on fewer, ImageNet-shaped JPEG files to crops of 224 px."""
    items = BATCH * BATCHES_A_CORE * cores()

    def variant(count: int) -> Variant:
        """Each times as many batches as its cores deserve, told as the time for those of all cores."""
        return Variant(seconds=lambda: pinned[count].ask(BATCHES_A_CORE * count) * cores() / count)

    def check() -> None:
        digests = {count: loader.ask("digest") for count, loader in pinned.items()}
        assert len(set(digests.values())) == 1, f"sums of the first batch's pixels by cores: {digests}"

    compare(
        benchmark,
        session,
        ours=variant(cores()),
        peers={f"{count} core{'s' * (count > 1)}": variant(count) for count in pinned if count != cores()},
        check=check,
        items=items,
        unit="images",
        rounds=7,
    )
