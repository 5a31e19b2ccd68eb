"""From a command to its first result, in seconds: the help, the first step of a training run, a loader's first batch.

The others here are floors and peers: a bare interpreter; importing what any such program imports; PyTorch's DataLoader
and DALI's own random crop (`peers.image_loaders`), from their construction to their first batch of the same size.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Session, Variant, compare, nothing
from peers.commands import OURS, REPO, SMALL, python, run, settings_words, write_beton
from peers.image_loaders import Passages, RandomCropPipeline
from recorder import cores

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.loaders.registry import LOADERS, make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan

pytestmark = pytest.mark.timeout(900)  # also on a busy machine
BATCH = 32
LIBRARIES = "import torch, timm, open_clip"


def test_help(benchmark: Any, session: Session) -> None:
    """`mvp-fast --help`, until it has ended."""

    def check() -> None:
        assert "train" in run(python("-m", "mvp_fast", "--help"))

    compare(
        benchmark,
        session,
        ours=Variant(lambda: run(python("-m", "mvp_fast", "--help"))),
        peers={"a bare interpreter": Variant(lambda: run(python("-c", "pass")))},
        check=check,
        items=1,
        unit="commands",
    )


class FirstStep:
    """`mvp-fast train` until it prints its first step; `after` lets it come to its end."""

    def __init__(self, settings: dict[str, object], folder: Path) -> None:
        self.folder = folder
        self.words = python(*OURS, *settings_words({**settings, "run.dir": folder}))
        self.process: subprocess.Popen[str] | None = None

    def before(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.process = subprocess.Popen(
            self.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO
        )
        assert self.process.stdout is not None
        said = []
        try:
            for line in self.process.stdout:
                if line.startswith("step 1/"):
                    return time.perf_counter() - start
                said.append(line)
        except BaseException:  # such as a time limit: it must not go on beside the next benchmark
            self.process.kill()
            raise
        raise RuntimeError(f"{' '.join(self.words)} ended before its first step:\n{''.join(said)}")

    def after(self) -> None:
        if self.process is not None:
            said, _ = self.process.communicate()
            if self.process.returncode:
                raise RuntimeError(f"exit code {self.process.returncode} of {' '.join(self.words)}\n{said}")

    def variant(self) -> Variant:
        return Variant(before=self.before, seconds=self.seconds, after=self.after)


def measure_first_step(
    benchmark: Any, session: Session, settings: dict[str, object], folder: Path, device: str, rounds: int
) -> None:
    compare(
        benchmark,
        session,
        ours=FirstStep({**settings, "train.steps": 1, "train.log-every": 1}, folder).variant(),
        peers={} if session.quick else {LIBRARIES: Variant(lambda: run(python("-c", LIBRARIES)))},
        check=nothing,  # a run that does not come to its first step ends the benchmark
        items=1,
        unit="commands",
        device=device,
        rounds=rounds,
        warm_up_seconds=None,
    )


def test_first_step(benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path) -> None:
    """`mvp-fast train` to its first step, width 96, 2 blocks, ViT-S-16 teacher, 112 px, batch 8, DALI."""
    measure_first_step(benchmark, session, {**SMALL, "data.index": imagenet_scenes}, tmp_path / "run", "cpu", 3)


@pytest.mark.gpu
def test_first_step_b16(benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path) -> None:
    """`mvp-fast train` to its first step, ViT-B/16 student and teacher, 224 px, batch 64, bf16, DALI."""
    settings = {
        "data.index": imagenet_scenes,
        "teacher.name": "ViT-B-16",
        "teacher.pretrained": "random",
        "train.batch-size": 64,
        "train.device": "cuda",
        "run.tensorboard": False,
    }
    measure_first_step(benchmark, session, settings, tmp_path / "run", "cuda", 2)


class FirstBatch:
    """From nothing to a first batch; `close` is not timed."""

    def __init__(self, take: Callable[[], tuple[torch.Tensor, Callable[[], None]]]) -> None:
        self.take = take

    def run(self) -> None:
        self.images, self.close = self.take()

    def after(self) -> None:
        self.close()
        del self.images, self.close
        gc.collect()  # a DataLoader's workers end with it

    def variant(self) -> Variant:
        return Variant(self.run, after=self.after)


@pytest.mark.parametrize("name", LOADERS)
def test_first_batch(benchmark: Any, session: Session, imagenet_scenes: Path, tmp_path: Path, name: str) -> None:
    """A loader's first batch of 32 crops of 224 px, from its construction, all cores."""
    index, data = Index.open(imagenet_scenes), DataConfig()
    if name == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed: make install says why", exc_type=ImportError)
        index, data = Index.open(write_beton(imagenet_scenes, tmp_path, "raw", 256)), DataConfig(interpolation="area")
    plan = SamplePlan(index, seed=0, batch_size=BATCH, data=data, mask=MaskConfig())

    def ours() -> tuple[torch.Tensor, Callable[[], None]]:
        loader = make_loader(name, data)
        batches = loader.batches(plan, 0)

        def close() -> None:
            batches.close()  # type: ignore[attr-defined]
            loader.close()

        return next(batches).images_BHWC, close

    def data_loader() -> tuple[torch.Tensor, Callable[[], None]]:
        passages = Passages(index, data, tensors=False, batch_size=BATCH, batches=1, workers=cores())
        passage = passages.start()
        return next(passage).permute(0, 2, 3, 1), lambda: passages.end(passage)

    def dali() -> tuple[torch.Tensor, Callable[[], None]]:
        pipeline = RandomCropPipeline(index, BATCH, data, cores())
        return next(iter(pipeline)), pipeline.close

    reads_files = name not in ("synthetic", "ffcv")
    peers = {} if not reads_files else {"DataLoader, Pillow": data_loader, "DALI random crop": dali}
    variants = {each: FirstBatch(take) for each, take in {"ours": ours, **peers}.items()}

    def check() -> None:
        for each, variant in variants.items():
            variant.run()
            found = (variant.images.shape, variant.images.dtype)
            variant.after()
            assert found == ((BATCH, data.image_size, data.image_size, 3), torch.uint8), f"{each}: {found}"

    compare(
        benchmark,
        session,
        ours=variants.pop("ours").variant(),
        peers={each: variant.variant() for each, variant in variants.items()},
        check=check,
        items=1,
        unit="batches",
        rounds=7,
    )
