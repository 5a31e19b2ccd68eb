"""Batches made ahead: their order, how far ahead, errors, and an end at any time.

Nothing here depends on how long anything takes: loaders that wait do so for an event that the test sets.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders import prefetch
from mvp_fast.loaders.base import Batch, Loader, StageStats
from mvp_fast.loaders.prefetch import Prefetcher
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan

PATIENCE = 60  # seconds until a wait that should end is a failure


def make_plan(index: Index | None = None, batch_size: int = 2) -> SamplePlan:
    data = DataConfig(image_size=32, threads=2)
    return SamplePlan(
        index or Index.synthetic(images=100), seed=3, batch_size=batch_size, data=data, mask=MaskConfig(patches=1)
    )


class GatedLoader:
    """A loader that counts what it makes, and waits or fails at a step that the test chooses."""

    bad_samples = 0

    def __init__(self, *, fail_at: int = -1, wait_at: int = -1, last: int = 10**6) -> None:
        self.fail_at, self.wait_at, self.last = fail_at, wait_at, last
        self.made = threading.Semaphore(0)
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.closed_by: threading.Thread | None = None
        self._stats = StageStats()

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        try:
            for step in range(start_step, self.last):
                if step == self.fail_at:
                    raise DataError("the disk is on fire")
                if step == self.wait_at:
                    self.pass_gate()
                rows = plan.step(step)
                images_BHWC = torch.full((len(rows), 32, 32, 3), step % 256, dtype=torch.uint8)
                batch = Batch(step, images_BHWC, torch.from_numpy(rows.masked_BM()), rows)
                self.made.release()
                yield batch
        finally:
            self.closed_by = threading.current_thread()

    def pass_gate(self) -> None:
        self.at_gate.set()
        assert self.gate.wait(PATIENCE)

    def stats(self) -> StageStats:
        return self._stats

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mvp-")]


def test_batches_come_in_order_and_unchanged() -> None:
    plan = make_plan()
    with Prefetcher(GatedLoader(), plan, 5, "cpu", depth=3) as ahead:
        for step, batch in enumerate(islice(ahead, 10), start=5):
            assert batch.step == step
            assert (batch.images_BHWC == step).all()
            np.testing.assert_array_equal(batch.masked_BM.numpy(), plan.step(step).masked_BM())


def test_real_loaders_give_the_same_with_and_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    build_index(tmp_path)
    plan = make_plan(Index.open(tmp_path), batch_size=4)
    for name in ("torchvision", "dali"):
        loader = make_loader(name, plan.data)
        direct = list(islice(loader.batches(plan, 1), 4))
        loader.close()
        with Prefetcher(loader, plan, 1, torch.device("cpu")) as ahead:
            for expected, batch in zip(direct, ahead, strict=False):
                assert batch.step == expected.step
                assert torch.equal(batch.images_BHWC, expected.images_BHWC)


@pytest.mark.parametrize("depth", [1, 3])
def test_it_stays_depth_batches_ahead(depth: int) -> None:
    loader = GatedLoader()
    with Prefetcher(loader, make_plan(), 0, "cpu", depth=depth) as ahead:
        for consumed in range(4):
            # `depth` that wait, and one in the thread's hands; each one taken makes room for one more.
            for _ in range(depth + 1 if consumed == 0 else 1):
                assert loader.made.acquire(timeout=PATIENCE)
            assert not loader.made.acquire(timeout=0.05)
            assert next(ahead).step == consumed


def test_an_error_comes_after_the_batches_before_it_and_with_its_traceback() -> None:
    with Prefetcher(GatedLoader(fail_at=3), make_plan(), 0, "cpu") as ahead:
        assert [next(ahead).step for _ in range(3)] == [0, 1, 2]
        for _ in range(2):  # and it stays
            with pytest.raises(DataError, match="on fire") as caught:
                next(ahead)
            names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
            assert "batches" in names  # where in the loader it was raised


def test_an_end_is_an_end() -> None:
    with Prefetcher(GatedLoader(last=3), make_plan(), 0, "cpu") as ahead:
        assert [batch.step for batch in ahead] == [0, 1, 2]
        with pytest.raises(StopIteration):
            next(ahead)


def test_closing_while_the_thread_waits_for_room() -> None:
    loader = GatedLoader()
    ahead = Prefetcher(loader, make_plan(), 0, "cpu", depth=1)
    for _ in range(2):  # one lies ready, the second has no room
        assert loader.made.acquire(timeout=PATIENCE)
    ahead.close()
    ahead.close()
    assert loader.closed_by is not None  # the generator was closed, by the thread that ran it
    assert loader.closed_by.name == "mvp-prefetch"
    assert not loader.closed_by.is_alive()
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_while_the_loader_works() -> None:
    loader = GatedLoader(wait_at=1)
    ahead = Prefetcher(loader, make_plan(), 0, "cpu")
    assert next(ahead).step == 0
    assert loader.at_gate.wait(PATIENCE)
    closer = threading.Thread(target=ahead.close)
    closer.start()
    loader.gate.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_closing_while_the_consumer_waits() -> None:
    loader = GatedLoader(wait_at=0)
    ahead = Prefetcher(loader, make_plan(), 0, "cpu")
    seen: list[object] = []
    consumer = threading.Thread(target=lambda: seen.append(next(ahead, "ended")))
    consumer.start()
    assert loader.at_gate.wait(PATIENCE)
    closer = threading.Thread(target=ahead.close)
    closer.start()
    consumer.join(PATIENCE)  # it is let go though the loader still works
    assert seen == ["ended"]
    loader.gate.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_an_exception_in_the_consumer_ends_the_thread() -> None:
    loader = GatedLoader()
    with pytest.raises(ZeroDivisionError), Prefetcher(loader, make_plan(), 0, "cpu") as ahead:
        _ = next(ahead).step / 0
    assert loader.closed_by is not None


def test_wait_seconds_are_those_spent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: it opens the loader's gate when `next` looks at it, and the loader then takes ten seconds."""

    class Clock:
        now, armed = 100.0, False

        def perf_counter(self) -> float:
            now = self.now
            if self.armed:
                loader.gate.set()
            return now

    class SlowLoader(GatedLoader):
        def pass_gate(self) -> None:
            super().pass_gate()
            clock.now += 10

    clock, loader = Clock(), SlowLoader(wait_at=2)
    monkeypatch.setattr(prefetch, "time", clock)
    with Prefetcher(loader, make_plan(), 0, "cpu", depth=4) as ahead:
        assert loader.at_gate.wait(PATIENCE)
        assert [next(ahead).step for _ in range(2)] == [0, 1]
        assert ahead.wait_seconds == 0  # these lay ready
        clock.armed = True
        assert next(ahead).step == 2
        assert ahead.wait_seconds == 10


def test_the_protocol_is_met() -> None:
    loader: Loader = GatedLoader()
    assert loader.stats().items["copy"] == 0
    with Prefetcher(loader, make_plan(), 0, "cpu") as ahead:
        next(ahead)
    assert loader.stats().items["copy"] == 0  # nothing to copy on the CPU


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_whole() -> None:
    """Steps that take longer than copies and reuse memory at once: a missing wait would show other steps' pixels."""
    loader, device = GatedLoader(), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    with Prefetcher(loader, make_plan(batch_size=64), 0, device, depth=2) as ahead:
        for batch in islice(ahead, 40):
            assert batch.images_BHWC.is_cuda
            assert batch.masked_BM.is_cuda
            busy = (busy @ busy).clamp(-1, 1)
            sums.append((batch.images_BHWC.double().mean(), batch.masked_BM.clone()))
            del batch
    for step, (mean, masked_BM) in enumerate(sums):
        assert mean.item() == step
        np.testing.assert_array_equal(masked_BM.cpu().numpy(), make_plan(batch_size=64).step(step).masked_BM())
    assert loader.stats().items["copy"] >= 40 * 64


@pytest.mark.gpu
def test_on_a_gpu_a_resident_batch_is_not_copied() -> None:
    plan = make_plan()
    loader = make_loader("synthetic", plan.data, device="cuda")
    with Prefetcher(loader, plan, 0, "cuda") as ahead:
        first, second = next(ahead), next(ahead)
        assert first.images_BHWC.data_ptr() == second.images_BHWC.data_ptr()


class Watched:
    """A loader that tells where its batches lie."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.places = loader, list[int]()
        self.bad_samples, self.stats, self.close = loader.bad_samples, loader.stats, loader.close

    def batches(self, plan: SamplePlan, start_step: int) -> Iterator[Batch]:
        for batch in self.loader.batches(plan, start_step):
            self.places.append(batch.images_BHWC.data_ptr())
            yield batch


@pytest.mark.gpu
def test_on_a_gpu_a_batch_that_was_made_there_is_passed_on_and_stays_whole(tmp_path: Path) -> None:
    """Grey images, each of its own level: pixels of another batch would show, while the consumer's stream lags."""
    for i in range(64):
        Image.new("RGB", (64, 64), (4 * i,) * 3).save(tmp_path / f"{i:02}.jpg", quality=95)
    build_index(tmp_path)
    plan, device = make_plan(Index.open(tmp_path), batch_size=16), torch.device("cuda")
    loader = Watched(make_loader("dali", plan.data, device=device))
    busy = torch.randn(4096, 4096, device=device)
    means, places = [], []
    with Prefetcher(loader, plan, 0, device) as ahead:
        for batch in islice(ahead, 40):
            places.append(batch.images_BHWC.data_ptr())
            busy = (busy @ busy).clamp(-1, 1)
            means.append(batch.images_BHWC.double().mean(dim=(1, 2, 3)))
            del batch
    loader.close()
    assert places == loader.places[:40]
    for step, mean_B in enumerate(means):
        levels_B = [4 * int(plan.index.key(int(sample))[:2]) for sample in plan.step(step).sample_B]
        np.testing.assert_allclose(mean_B.cpu().numpy(), levels_B, atol=3)


def test_peek_shows_what_comes_next_and_never_waits() -> None:
    loader = GatedLoader(wait_at=2)
    with Prefetcher(loader, make_plan(), 0, "cpu", depth=2) as batches:
        for _ in range(2):
            assert loader.made.acquire(timeout=PATIENCE)
        assert loader.at_gate.wait(PATIENCE)  # both are ready, and the thread stands before the third
        first = batches.peek()
        assert first is not None
        assert first is batches.peek()
        assert first is next(batches)
        second = batches.peek()
        assert second is not None
        assert (first.step, second.step) == (0, 1)
        assert next(batches) is second
        assert batches.peek() is None  # while the third is still being made
        loader.gate.set()
        assert next(batches).step == 2
    assert batches.peek() is None
