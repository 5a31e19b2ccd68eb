"""The step as one CUDA graph: its bookkeeping, on the CPU; test_gpu.py has the graph itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvp_fast.errors import ConfigError
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.train.optim import clear_gradients, set_learning_rate
from mvp_fast.train.step import TrainStep
from mvp_fast.train.step_graph import WARM_UP, Parts, StepGraph, Work, check, prepare
from tests.test_train_step import BASE, CPU, SIDE, changed, make_batch, make_step, weights


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """A random tower; read only."""
    return build_teacher(BASE.teacher, grid=(4, 4), image_size=SIDE)


def again(work: Work) -> Work:
    """In place of a capture, which computes nothing by itself: a replay does the work on the same places."""
    return work


@pytest.mark.parametrize("mode", ["image", "subset"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_from_fixed_places_is_the_step(teacher: Teacher, accumulate: int, mode: str) -> None:
    """What a CUDA graph replays, without one: inputs copied to fixed places, gradients never cleared from outside."""
    config = changed(student={"drop_path_mode": mode}, train={"accumulate": accumulate}, optim={"clip_grad": 0.5})
    plain, replayed = make_step(teacher, config), make_step(teacher, config)
    replayed.graph = StepGraph(with_cleared_gradients(replayed), accumulate, capture=again)
    replayed.ahead = True
    batches = [make_batch(number) for number in range(8)]
    for number, batch in enumerate(batches):
        for step in (plain, replayed):
            set_learning_rate(step.optimizer, 1e-3 / (number + 1))
        following = batches[number + 1] if number + 1 < len(batches) else None
        expected, found = plain(batch), replayed(batch, following)
        for name in ("loss", "grad_norm", "finite"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0)
    assert replayed.graph.replays == len(batches) - WARM_UP
    assert replayed.inputs.taken_ahead == accumulate * len(batches) - 1
    torch.testing.assert_close(weights(replayed), weights(plain), rtol=1e-5, atol=1e-7)


def with_cleared_gradients(step: TrainStep) -> Callable[[Parts], tuple[Tensor, ...]]:
    """A replay writes the gradients anew; work that is merely called again would add to them."""

    def work(parts: Parts) -> tuple[Tensor, ...]:
        clear_gradients(step.optimizer)
        return step._update_from(parts)

    return work


def test_what_a_graph_leaves_is_copied() -> None:
    left = torch.zeros(())
    graph = StepGraph(lambda parts: (left.copy_(parts[0][0].sum()),), 1, capture=again)
    found = []
    for value in (1.0, 2.0):
        graph.load(0, [torch.full((3,), value)])
        found.append(graph.run()[0])
    assert [float(each) for each in found] == [3.0, 6.0]
    with pytest.raises(ValueError, match="zip"):
        graph.load(0, [])


def test_the_optimizer_reads_its_rate_from_the_device(teacher: Teacher) -> None:
    step = make_step(teacher)
    prepare(step.optimizer, CPU)
    set_learning_rate(step.optimizer, 0.25)
    rates = [group["lr"] for group in step.optimizer.param_groups]
    assert all(isinstance(rate, Tensor) and float(rate) == 0.25 for rate in rates)
    assert all(group["capturable"] for group in step.optimizer.param_groups)


@pytest.mark.parametrize(("optimizer", "world", "told"), [("adamw", 2, "several ranks"), ("lamb", 1, "`lamb`")])
def test_what_can_not_be_one_graph(optimizer: str, world: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(optimizer, world)


def test_on_the_cpu_there_is_no_graph(teacher: Teacher) -> None:
    assert make_step(teacher, changed(train={"step_graph": True})).graph is None
