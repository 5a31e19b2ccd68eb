"""`mvp-fast train` as it is run, from JPEG files to updated weights: images a second in the steady state.

A round is the whole command; its rate comes from metrics.jsonl, the first fifth of whose lines (start-up) is left out.
`extra_info` has each line's rate, the share of the time spent waiting for data, the loss and the peak memory.

On the CPU the other variant is the same command with `synthetic`, whose resident batch costs nothing to load: the
difference is what loading costs. On the GPU it is what one would run instead (`peers.plain_training`: DataLoader over
Pillow, timm, open_clip, autocast); that both began with the same loss and gradient norm is checked after the rounds.
What a step could do there if it never waited for data is test_train_step's rate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Session, compare, nothing
from peers.commands import OURS, PLAIN, REPO, SMALL, Training, python, run
from peers.step_cases import B16, flops_an_image
from recorder import cores

pytestmark = pytest.mark.timeout(900)  # also on a busy machine
LOSS, NORM = 0.03, 0.3  # relative: from the same weights, over other crops of the same files
CONFIG = REPO / "configs" / "vit_b16_in1k.yaml"


def measure(
    benchmark: Any,
    session: Session,
    ours: Training,
    peers: dict[str, Training],
    device: str,
    rounds: int,
    same_images: bool,
    flops_an_item: Callable[[], float] | None = None,
) -> None:
    """`same_images`: whether the peers train on the same files, so that they must begin as ours does."""

    def same_start() -> None:
        for name, peer in peers.items():
            first, other = (each.last.lines[0] for each in (ours, peer) if each.last is not None)
            assert other["loss"] == pytest.approx(first["loss"], rel=LOSS), f"{name}: the first loss"
            assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=NORM), f"{name}: the gradient norm"

    def extra() -> dict[str, Any]:
        assert ours.last is not None
        environment = json.loads((ours.folder / "environment.json").read_text())
        return {
            **ours.last.facts(),
            "peers_last_run": {name: each.last.facts() for name, each in peers.items() if each.last},
            "kernels": environment["kernels"],
            "settings": {name: str(value) for name, value in ours.settings.items()},
        }

    compare(
        benchmark,
        session,
        ours=ours.variant(),
        peers={name: each.variant(ours.images) for name, each in peers.items()},
        check=nothing,  # each run makes sure by itself that all went well
        items=ours.images,
        unit="images",
        device=device,
        rounds=rounds,
        warm_up_seconds=None,
        afterwards=same_start if same_images else nothing,
        extra=extra,
        flops_an_item=flops_an_item,
    )


def test_small(benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path) -> None:
    """JPEG files to updated weights, width 96, 2 blocks, ViT-S-16 teacher, 112 px, batch 8, float32, DALI."""
    settings = {
        **SMALL,
        "data.index": imagenet_scenes,
        "data.loader": "dali",
        "train.steps": 4 if session.quick else 20,
        "train.log-every": 2,
    }
    command = (*OURS, "--config", CONFIG)
    resident = Training(command, {**settings, "data.loader": "synthetic"}, tmp_path / "resident")
    peers = {} if session.quick else {"a resident batch": resident}
    measure(
        benchmark, session, Training(command, settings, tmp_path / "ours"), peers, "cpu", rounds=3, same_images=False
    )


@pytest.fixture(scope="module")
def photo_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2048 ImageNet-shaped JPEG files with an index."""
    folder = tmp_path_factory.mktemp("end_to_end")
    run(python("-m", "mvp_fast", "data", "scenes", "--out", folder, "--images", 2048, "--profile", "imagenet"))
    run(python("-m", "mvp_fast", "data", "index", folder))
    return folder


@pytest.mark.gpu
def test_b16(benchmark: Any, session: Session, photo_sized: Path, tmp_path: Path) -> None:
    """JPEG files to updated weights, ViT-B/16 student and teacher, 224 px, batch 256, bf16, one GPU."""
    settings = {
        "data.index": photo_sized,
        "data.loader": "dali",
        "teacher.name": "ViT-B-16",
        "teacher.pretrained": "random",
        "train.batch-size": 256,
        "train.precision": "bf16",
        "train.steps": 10 if session.quick else 40,
        "train.log-every": 2,
        "train.device": "cuda",
        "run.tensorboard": False,
    }
    ours = Training((*OURS, "--config", CONFIG), settings, tmp_path / "ours")
    plain = Training((*PLAIN, "--config", CONFIG, "--workers", cores()), settings, tmp_path / "plain")
    measure(
        benchmark,
        session,
        ours,
        {"DataLoader, timm, open_clip": plain},
        "cuda",
        rounds=2,
        same_images=True,
        flops_an_item=lambda: flops_an_image(B16),
    )
