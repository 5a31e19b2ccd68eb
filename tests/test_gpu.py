"""The same tiny run on each device: what holds on the CPU must hold on the GPU, and there the host must not wait.

Each test's body takes the device, so that it also runs where there is no GPU; only the watch for synchronisation, which
torch keeps for CUDA alone, is then idle (test_train_step.py has it on fake tensors).

Shape legend: B images, H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mvp_fast.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    ObjectiveConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from mvp_fast.loaders.prefetch import Prefetcher
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import teacher_dtype
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.fp8 import Fp8Linear, quantise
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.optim import build_optimizer, learning_rate, set_learning_rate
from mvp_fast.train.step import TrainStep
from mvp_fast.train.step_graph import WARM_UP
from mvp_fast.train.update import StepResult
from tests.conftest import losses, read_metrics

GPU = pytest.mark.gpu
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def on_devices(name: str, *values: str) -> pytest.MarkDecorator:
    """Each value on the GPU; on the CPU, where other tests have the rest, the first alone."""
    gpu = [pytest.param("cuda", value, marks=GPU, id=f"cuda-{value}") for value in values]
    return pytest.mark.parametrize(("device", name), [pytest.param("cpu", values[0], id=f"cpu-{values[0]}"), *gpu])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On the CPU, more threads would only wait for each other over tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """Inside, an operation for which the host would wait for the GPU raises RuntimeError."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_devices("precision", "fp32", "bf16")
def test_a_run_learns_and_resumes(train: Callable[..., Any], tmp_path: Path, device: str, precision: str) -> None:
    """Whole, and stopped half-way: on the CPU bit for bit the same, on the GPU within its sums' changing order."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    same = {
        "train__device": device,
        "train__precision": precision,
        "train__steps": 16,
        "train__checkpoint_every": 8,
        "train__keep_checkpoints": 0,
        "optim__lr": 2e-3,
    }
    train(run=whole, **same)
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert 0.9 < lines[0]["loss"] < 1.1
    assert sum(line["loss"] for line in lines[-4:]) / 4 < lines[0]["loss"] - 0.1
    assert {line["skipped_updates"] for line in lines} == {0}
    for line in lines:
        assert ("peak_memory_bytes" in line) == (device == "cuda")
        assert device == "cpu" or 0 < line["peak_memory_bytes"] < 8e9

    train(run=halves, resume=whole / "checkpoints" / "step-00000008", **same)
    resumed = losses(halves)
    assert set(resumed) == set(range(9, 17))
    expected = {step: loss for step, loss in losses(whole).items() if step > 8}
    assert resumed == (expected if device == "cpu" else pytest.approx(expected, rel=0.02))


KINDS: dict[str, dict[str, Any]] = {
    "clip": {"name": "ViT-S-16"},
    "timm": {"kind": "timm", "name": "vit_tiny_patch16_224"},
    "timm-eva": {"kind": "timm", "name": "eva02_tiny_patch14_224"},
    "pixels": {"kind": "pixels"},
    "hog": {"kind": "hog"},
}


def tiny_step(
    device: str,
    kind: str = "clip",
    *,
    mode: Literal["image", "subset"] = "image",
    step_graph: bool = False,
    **teacher: bool,
) -> tuple[TrainStep, SamplePlan, Config]:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    config = Config(
        data=DataConfig(image_size=64, loader="synthetic"),
        mask=MaskConfig(patches=6, min_block=2),
        student=StudentConfig(width=64, depth=2, heads=2, drop_path=0.3, drop_path_mode=mode),
        teacher=TeacherConfig(pretrained="random", **KINDS[kind], **teacher),
        objective=ObjectiveConfig(cls=kind not in ("pixels", "hog")),
        train=TrainConfig(batch_size=8, accumulate=2, precision="bf16", step_graph=step_graph),
    )
    tower = build_teacher(config.teacher, grid=(4, 4), image_size=64).to(where)
    tower.lower(teacher_dtype("auto", "bf16", where))
    student = Student(config.student, target_width=tower.width, image_size=64).to(where)
    optimizer = build_optimizer(student, config.optim)
    step = TrainStep(student, student, tower, Objective(config.objective), optimizer, config, where)
    plan = SamplePlan(Index.synthetic(images=64), seed=0, batch_size=8, data=config.data, mask=config.mask)
    return step, plan, config


HOW = {
    "plain": {"graph": False, "ahead": False},
    "graph": {"graph": True, "ahead": False},
    "ahead": {"graph": False, "ahead": True},
    "graph-ahead": {"graph": True, "ahead": True},
}


@on_devices("how", *reversed(HOW))
def test_the_host_does_not_wait_in_a_steady_step(device: str, how: str) -> None:
    step, plan, config = tiny_step(device, **HOW[how])
    loader = make_loader("synthetic", config.data, device=step.device)
    results = []
    with Prefetcher(loader, plan, 0, step.device) as batches:
        for number, batch in enumerate(islice(batches, 6)):
            if number < 2:  # libraries are loaded, the graph is captured and the optimizer's state is made
                results.append(step(batch, batches.peek()))
                continue
            with waiting_is_an_error(device):
                results.append(step(batch, batches.peek()))
    assert all(bool(result.finite) for result in results)
    assert all(result.loss.device == step.device for result in results)
    assert results[-1].loss < results[0].loss
    graph = step.inputs.graph
    assert (graph is not None) == (device == "cuda" and HOW[how]["graph"])
    assert graph is None or (graph.replays in (12, 13) and graph.others == 0)  # the last step may have made one more


@on_devices("how", "graph-ahead", "graph", "ahead")
@pytest.mark.parametrize("kind", ["clip", *(pytest.param(kind, marks=GPU) for kind in KINDS if kind != "clip")])
def test_graph_and_side_stream_change_no_result(device: str, how: str, kind: str) -> None:
    """Each batch's inputs and targets as computed plainly, with other work queued behind and before them."""
    (plain, plan, config), (other, *_) = tiny_step(device, kind, **HOW["plain"]), tiny_step(device, kind, **HOW[how])
    loader = make_loader("synthetic", config.data, device=plain.device)
    batches = list(islice(loader.batches(plan, 0), 8))
    generator = torch.Generator(plain.device).manual_seed(1)
    for number, batch in enumerate(batches):
        images_BHWC = torch.randint(
            0, 256, batch.images_BHWC.shape, dtype=torch.uint8, device=plain.device, generator=generator
        )
        masked_BM = batch.masked_BM.to(plain.device)
        want = plain.inputs.take((number, 0), images_BHWC, masked_BM)
        if number % 2:
            other.inputs.submit((number, 0), images_BHWC, masked_BM)
            torch.randn(2048, 2048, device=plain.device).square().sum()
        got = other.inputs.take((number, 0), images_BHWC, masked_BM)
        for name, mine, theirs in zip(want._fields, got, want, strict=True):
            assert torch.equal(mine, theirs), f"{name} of batch {number}"


@GPU
@pytest.mark.parametrize("mode", ["image", "subset"])
def test_the_step_as_one_graph_is_the_step(mode: str) -> None:
    """The same losses, norms and weights as without a graph, with rates that change; and the host waits for nothing."""
    (plain, plan, config), (other, *_) = (tiny_step("cuda", mode=mode, step_graph=graph) for graph in (False, True))
    assert plain.graph is None
    assert other.graph is not None
    loader = make_loader("synthetic", config.data, device=plain.device)
    found: list[tuple[StepResult, StepResult]] = []
    for number, batch in enumerate(islice(loader.batches(plan, 0), 12)):
        moved = replace(batch, masked_BM=batch.masked_BM.to(plain.device))
        for step in (plain, other):
            set_learning_rate(step.optimizer, 1e-3 / (1 + number))
        expected = plain(moved)
        with waiting_is_an_error("cuda") if number > WARM_UP else nullcontext():
            found.append((expected, other(moved)))
    assert other.graph.replays == 12 - WARM_UP
    for expected, result in found:
        torch.testing.assert_close(result.loss, expected.loss, rtol=2e-2, atol=0)
        assert bool(result.finite)
    for name, weight in plain.student.state_dict().items():
        torch.testing.assert_close(other.student.state_dict()[name], weight, rtol=2e-2, atol=2e-3, msg=name)


@GPU
def test_waiting_is_noticed() -> None:
    with waiting_is_an_error("cuda"), pytest.raises(RuntimeError, match="synchronizing"):
        torch.zeros((), device="cuda").item()


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_products_are_those_of_the_rounded(dtype: torch.dtype) -> None:
    layer, x_BND = Fp8Linear(torch.randn(64, 96), torch.randn(64)).cuda(), torch.randn(3, 7, 96, dtype=dtype).cuda()
    for start, stop in ((0, None), (16, 48)):
        values, scale = quantise(x_BND.flatten(0, 1))
        weight = (layer.values_NK.double() * layer.scale_N1)[start:stop]
        expected = (values.double() * scale) @ weight.T + layer.bias_N[start:stop]
        found = layer(x_BND, start, stop).flatten(0, 1)
        torch.testing.assert_close(found.double(), expected, atol=0.01 * float(expected.abs().max()), rtol=0)


@GPU
def test_bf16_ends_where_float32_ends(scenes: Path) -> None:
    """Final loss within 1 % after 300 steps on real images, each precision with a teacher of its own type."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    ends = {precision: last_losses(scenes, torch.device("cuda", 0), precision) for precision in precisions}
    assert ends["fp32"] < 0.7, "it learns too little to tell anything"
    assert ends["bf16"] != ends["fp32"]
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.01)


def last_losses(scenes: Path, device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """Mean loss of the last 20 of 300 steps."""
    config = Config(
        data=DataConfig(image_size=64, threads=2, loader="cpu"),
        mask=MaskConfig(patches=6, min_block=2),
        student=StudentConfig(width=64, depth=3, heads=2),
        teacher=TeacherConfig("ViT-S-16", "random"),
        optim=OptimConfig(lr=2e-3, reference_batch_size=16, warmup_fraction=0.1),
        train=TrainConfig(steps=300, batch_size=16, precision=precision),
    )
    tower = build_teacher(config.teacher, grid=(4, 4), image_size=64).to(device)
    if (dtype := teacher_dtype("auto", precision, device)) != torch.float32:
        tower.lower(dtype)
    student = Student(config.student, target_width=tower.width, image_size=64).to(device)
    optimizer = build_optimizer(student, config.optim)
    step = TrainStep(student, student, tower, Objective(config.objective), optimizer, config, device)
    plan = SamplePlan(Index.open(scenes), seed=0, batch_size=16, data=config.data, mask=config.mask)
    loader, results = make_loader("cpu", config.data), []
    with Prefetcher(loader, plan, 0, device) as batches:
        for number, batch in enumerate(islice(batches, 300)):
            set_learning_rate(optimizer, learning_rate(number, 300, config.optim, 16))
            results.append(step(batch, batches.peek() if step.ahead else None))
    loader.close()
    assert all(bool(result.finite) for result in results)
    return float(torch.stack([result.loss for result in results[-20:]]).mean())


@DEVICES
@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_prefetched_batches_are_the_loaders(scenes: Path, device: str, name: str) -> None:
    """The consumer is slow to look: a batch's memory must not be given to a later one before that."""
    data = DataConfig(image_size=64, threads=2)
    plan = SamplePlan(Index.open(scenes), seed=2, batch_size=8, data=data, mask=MaskConfig(patches=6, min_block=2))
    plain, ahead = make_loader(name, data), make_loader(name, data)
    try:
        expected = [(b.images_BHWC.clone(), b.masked_BM.clone(), b.rows) for b in islice(plain.batches(plan, 3), 20)]
        with Prefetcher(ahead, plan, 3, device, depth=3) as batches:
            for images_BHWC, masked_BM, rows in expected:
                batch = next(batches)
                assert batch.images_BHWC.device.type == batch.masked_BM.device.type == device
                work = batch.images_BHWC.float().square().sum()  # on the consumer's stream, as a step's would be
                assert torch.equal(batch.images_BHWC.cpu(), images_BHWC)
                assert torch.equal(batch.masked_BM.cpu(), masked_BM)
                np.testing.assert_array_equal(batch.rows.sample_B, rows.sample_B)
                assert work.item() > 0
    finally:
        plain.close()
        ahead.close()
