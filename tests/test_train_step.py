"""One training step on real parts: what it computes, what it skips, and that the host never waits for the device.

Shape legend: B images, H and W pixels, C channels, M masked patches, L blocks, S the two branches of a block,
K tokens in the loss, N all tokens, D channels of a feature.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.objective.guided import Objective
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from mvp_fast.train.optim import build_optimizer, set_learning_rate
from mvp_fast.train.step import TrainStep
from mvp_fast.train.update import StepResult
from tests.conftest import read_metrics, run_verb

CPU = torch.device("cpu")
SIDE = 64
BASE = Config(
    data=DataConfig(image_size=SIDE, threads=1),
    mask=MaskConfig(patches=6, min_block=2),
    student=StudentConfig(width=64, depth=3, heads=2, drop_path=0.4),
    teacher=TeacherConfig("ViT-S-16", "random"),
    # Adam divides by the gradient's size: a large epsilon keeps rounding noise in tiny gradients from growing.
    optim=OptimConfig(lr=1e-3, eps=1e-3),
    train=TrainConfig(batch_size=8, precision="fp32", device="cpu"),
    seed=3,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: more threads only wait for each other, for minutes where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """A random tower; read only."""
    return build_teacher(BASE.teacher, grid=(4, 4), image_size=SIDE)


class Recording(nn.Module):
    """Calls the student and keeps what it was called with."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student, self.calls = student, []

    def forward(self, *args: Any) -> Tensor:
        self.calls.append(args)
        prediction: Tensor = self.student(*args)
        return prediction

    def drop_scale_LSB(self) -> Tensor:
        """All calls' stochastic depth factors, as of one batch."""
        return torch.cat([call[3] for call in self.calls], dim=2)


def make_step(teacher: Teacher | Remembering, config: Config = BASE) -> TrainStep:
    student = Student(config.student, target_width=teacher.width, image_size=config.data.image_size, seed=config.seed)
    optimizer = build_optimizer(student, config.optim)
    return TrainStep(student, Recording(student), teacher, Objective(config.objective), optimizer, config, CPU)


def changed(config: Config = BASE, **parts: dict[str, Any]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items()})


def make_plan(batch_size: int = 8, images: int = 100) -> SamplePlan:
    index = Index.synthetic(images=images)
    return SamplePlan(index, seed=BASE.seed, batch_size=batch_size, data=BASE.data, mask=BASE.mask)


def make_batch(number: int = 0, batch_size: int = 8) -> Batch:
    plan = make_plan(batch_size)
    rows = plan.step(number)
    generator = torch.Generator().manual_seed(number)
    images_BHWC = torch.randint(0, 256, (batch_size, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return Batch(number, images_BHWC, torch.from_numpy(rows.masked_BM()), rows)


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    these = slice(start, stop)
    return Batch(batch.step, batch.images_BHWC[these], batch.masked_BM[these], batch.rows.slice(start, stop))


def gradients(step: TrainStep) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in step.student.named_parameters() if p.grad is not None}


def weights(step: TrainStep) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in step.student.state_dict().items()}


# --- The batch in parts


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(teacher: Teacher, parts: int, clip: float) -> None:
    whole, split = (
        make_step(teacher, changed(optim={"clip_grad": clip}, train={"accumulate": count})) for count in (1, parts)
    )
    for number in range(3):
        one, many = whole(make_batch(number)), split(make_batch(number))
        torch.testing.assert_close(many.loss, one.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(many.grad_norm, one.grad_norm, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(split), gradients(whole), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights(split), weights(whole), rtol=1e-5, atol=1e-5)
    assert (len(whole.forward.calls), len(split.forward.calls)) == (3, 3 * parts)
    moved = make_step(teacher)
    assert any(
        (a - b).abs().max() > 1e-3 for a, b in zip(weights(whole).values(), weights(moved).values(), strict=True)
    )


class Passes(TorchDispatchMode):
    """Notes, by the step's stages, what reads or writes a gradient that a parameter holds, and what was copied."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__()
        self.parameters, self.now = step.parameters, ""
        self.touched: dict[str, list[list[str]]] = {}  # a list a time that the stage is entered
        self.copies: list[Tensor] = []
        step.stage = self.stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        self.touched.setdefault(name, []).append([])
        yield
        self.now = before

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {p.grad.untyped_storage().data_ptr() for p in self.parameters if p.grad is not None}
        out = op(*args, **(kwargs or {}))
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if held & {tensor.untyped_storage().data_ptr() for tensor in taken}:
            self.touched.setdefault(self.now, [[]])[-1].append(op.name().removeprefix("aten::").partition(".")[0])
        if op.name() in ("aten::clone", "aten::copy_", "aten::_to_copy"):
            self.copies.append(out)
        return out


def passes_over_gradients(teacher: Teacher, parts: int, name: str = "adamw", clip: float = 0.05) -> Passes:
    config = changed(optim={"name": name, "clip_grad": clip}, train={"accumulate": parts})
    step = make_step(teacher, config)
    step(make_batch(0))  # the optimizer's state is made
    with Passes(step) as passes:
        step(make_batch(1))
    return passes


def is_view(name: str) -> bool:
    return name in ("detach", "alias", "view", "t", "transpose", "as_strided")


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_are_passed_over_no_more_than_needed(teacher: Teacher, parts: int) -> None:
    """Added to once for each further micro-batch; then one reading for the norm and one pass for the whole update.

    The first micro-batch's gradients become the parameters' own, without a copy.
    """
    passes = passes_over_gradients(teacher, parts)
    count = len(passes.parameters)
    added = [[name for name in names if not is_view(name)] for names in passes.touched["backward"]]
    assert added == [[], *[["add_"] * count] * (parts - 1)]
    groups = 2  # with weight decay and without
    assert passes.touched["clip"] == [["_foreach_norm"]]
    assert passes.touched["optimizer"] == [["_fused_adamw_"] * groups]
    assert set(passes.touched) <= {"backward", "clip", "optimizer"} | {
        k for k, v in passes.touched.items() if not any(v)
    }
    copied = {tensor.untyped_storage().data_ptr() for tensor in passes.copies}
    assert not [p.shape for p in passes.parameters if p.grad.untyped_storage().data_ptr() in copied]


def test_further_passes_would_be_noticed(teacher: Teacher) -> None:
    """An optimizer that can't divide by itself makes one, where there is a limit."""
    assert passes_over_gradients(teacher, 1, "nadamw").touched["optimizer"][0][0] == "_foreach_div_"
    assert "_foreach_div_" not in passes_over_gradients(teacher, 1, "nadamw", clip=0.0).touched["optimizer"][0]


# --- Targets ahead


@pytest.mark.parametrize("parts", [1, 2])
def test_targets_ahead_change_no_bit(teacher: Teacher, parts: int) -> None:
    """With the batch that follows at hand, without it, and with another than the one that then comes."""
    config = changed(train={"accumulate": parts})
    plain, ahead = make_step(teacher, config), make_step(teacher, config)
    assert not plain.ahead  # nothing to gain on the CPU
    ahead.ahead = True
    batches = [make_batch(number) for number in range(5)]
    following = [batches[1], batches[2], None, batches[0], None]
    results = [(plain(batch), ahead(batch, after)) for batch, after in zip(batches, following, strict=True)]
    for one, other in results:
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.grad_norm, other.grad_norm)
    assert weights(plain).keys() == weights(ahead).keys()
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(ahead).items())
    # Of five steps the second and third found their first part made; parts after the first always are.
    assert (plain.inputs.taken_ahead, ahead.inputs.taken_ahead) == (0, 2 + 5 * (parts - 1))


# --- The exact savings


@pytest.mark.parametrize("tokens", ["masked", "all"])
@pytest.mark.parametrize("cls", [True, False])
def test_the_savings_are_exact(tokens: str, cls: bool) -> None:
    """Loss and every gradient in float64 as with all of both last blocks, norms, head and target projection."""
    config = changed(objective={"tokens": tokens, "cls": cls})
    teacher = build_teacher(config.teacher, grid=(4, 4), image_size=SIDE).double()
    step = make_step(teacher, config)
    student = step.student.double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = make_batch()
    drop_scale_LSB = step._drop_scale(batch.rows)
    assert drop_scale_LSB is not None
    assert (drop_scale_LSB == 0).any()
    inputs = step.inputs.take((0, 0), batch.images_BHWC, batch.masked_BM)
    saved = step._loss(inputs, drop_scale_LSB.double(), 1.0)

    every_BND = student._encode(inputs.patches_BNP, inputs.mask_BN, drop_scale_LSB.double())
    predicted_BND = student.predictor(student.norm(every_BND))
    x_BCHW = F.fold(teacher.patches(batch.images_BHWC).transpose(1, 2), SIDE, 16, stride=16)
    tower = teacher.visual
    tower.output_tokens = True
    pooled_BD, patches_BND = tower(x_BCHW)
    features_BND = torch.cat([pooled_BD[:, None], patches_BND @ tower.proj], dim=1)
    taken = inputs.index_BK[..., None].expand(-1, -1, teacher.width)
    cosine_BK = F.cosine_similarity(predicted_BND.gather(1, taken), features_BND.gather(1, taken), dim=-1)
    unsaved = (1 - cosine_BK).mean()

    torch.testing.assert_close(saved, unsaved, rtol=1e-10, atol=0)
    names, parameters = zip(*student.named_parameters(), strict=True)
    for name, got, want in zip(
        names, torch.autograd.grad(saved, parameters), torch.autograd.grad(unsaved, parameters), strict=True
    ):
        scale = float(want.abs().max())
        torch.testing.assert_close(
            got, want, rtol=1e-10, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert scale > 0 or name == "mask_token"


# --- The whole step against a plain one


def plain_curve(teacher: Teacher, config: Config, batches: list[Batch]) -> list[float]:
    """Every token through both models, torch's cosine, its own clipping and its unfused AdamW."""
    student = Student(config.student, target_width=teacher.width, image_size=SIDE, seed=config.seed)
    kept = student.no_weight_decay()
    decayed = [p for name, p in student.named_parameters() if p.ndim > 1 and name not in kept]
    others = [p for name, p in student.named_parameters() if p.ndim <= 1 or name in kept]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        foreach=False,
    )
    tower, losses = copy.deepcopy(teacher.visual), []
    tower.output_tokens = True
    drop = make_step(teacher, config)
    for batch in batches:
        masked_BN = torch.zeros(len(batch.rows), 16, dtype=torch.bool).scatter_(1, batch.masked_BM, True)
        in_loss_BN = F.pad(masked_BN, (1, 0), value=True)  # CLS and the masked patches
        scale_LSB = drop._drop_scale(batch.rows)
        predicted_BND = student.predictor(
            student.norm(student._encode(student.patches(batch.images_BHWC), masked_BN, scale_LSB))
        )
        with torch.no_grad():
            x_BCHW = F.fold(teacher.patches(batch.images_BHWC).transpose(1, 2), SIDE, 16, stride=16)
            pooled_BD, patches_BND = tower(x_BCHW)
            features_BND = torch.cat([pooled_BD[:, None], patches_BND @ tower.proj], dim=1)
        loss = (1 - F.cosine_similarity(predicted_BND[in_loss_BN], features_BND[in_loss_BN], dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.optim.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_fused_step_and_a_plain_one_give_one_loss_curve(teacher: Teacher) -> None:
    """100 steps in float32: targets ahead, two micro-batches, pruned last blocks, clipping inside the fused update."""
    config = changed(train={"accumulate": 2}, optim={"clip_grad": 0.5, "weight_decay": 0.05})
    batches = [make_batch(number) for number in range(100)]
    step = make_step(teacher, config)
    step.ahead = True
    set_learning_rate(step.optimizer, config.optim.lr)
    results = [step(batch, after) for batch, after in zip(batches, [*batches[1:], None], strict=True)]
    assert step.inputs.taken_ahead == 2 * 100 - 1
    assert sum(float(result.grad_norm) > 0.5 for result in results) > 10, "the limit is never at work"
    found = [float(result.loss) for result in results]
    assert found == pytest.approx(plain_curve(teacher, config, batches), rel=1e-5)
    assert sum(found[-10:]) < sum(found[:10]) - 1, "it learns nothing"


# --- Planned stochastic depth


def test_drop_path_belongs_to_the_sample_not_to_the_batch(teacher: Teacher) -> None:
    batch = make_batch(5)
    whole, split, again = (make_step(teacher) for _ in range(3))
    whole(batch)
    split(part_of(batch, 0, 3))
    split(part_of(batch, 3, 8))
    scale_LSB = whole.forward.drop_scale_LSB()
    assert scale_LSB.shape == (3, 2, 8)
    assert torch.equal(split.forward.drop_scale_LSB(), scale_LSB)
    torch.manual_seed(99)  # torch's random state plays no part
    again(batch)
    assert torch.equal(again.forward.drop_scale_LSB(), scale_LSB)
    other = make_step(teacher, replace(BASE, seed=4))
    other(batch)
    assert not torch.equal(other.forward.drop_scale_LSB(), scale_LSB)


def test_drop_path_keeps_as_often_as_asked(teacher: Teacher) -> None:
    step, images = make_step(teacher), 8000
    plan = make_plan(images, images)

    def drawn(rows: PlanRows) -> Tensor:
        scale_LSB = step._drop_scale(rows)  # without 8000 images through the networks
        assert scale_LSB is not None
        return scale_LSB

    scale_LSB, next_epoch_LSB = drawn(plan.step(0)), drawn(plan.step(1))
    assert step.student.drop_path_rates == (0.0, 0.2, 0.4)
    assert (scale_LSB[0] == 1).all()
    for block, keep in ((1, 0.8), (2, 0.6)):
        sigma = (keep * (1 - keep) / images) ** 0.5
        for branch in range(2):
            kept_B = scale_LSB[block, branch] != 0
            assert abs(kept_B.double().mean().item() - keep) < 5 * sigma
            torch.testing.assert_close(scale_LSB[block, branch][kept_B], torch.full((int(kept_B.sum()),), 1 / keep))
    kept_XB = (scale_LSB[1:] != 0).flatten(0, 1).double()
    correlation_XX = np.corrcoef(torch.cat((kept_XB, (next_epoch_LSB[1:] != 0).flatten(0, 1).double())).numpy())
    assert np.abs(correlation_XX - np.eye(8)).max() < 5 / images**0.5


def test_without_drop_path_nothing_is_drawn(teacher: Teacher) -> None:
    step = make_step(teacher, changed(student={"drop_path": 0.0}))
    step(make_batch())
    assert step.forward.calls[0][3] is None


# --- Updates that must not be taken


@pytest.mark.parametrize("parts", [1, 2])
def test_a_poisoned_loss_skips_the_update(parts: int) -> None:
    """An infinite target makes smooth L1 infinite with a finite gradient: the update must be skipped all the same."""
    config = changed(objective={"loss": "smooth_l1", "target_norm": "none"}, train={"accumulate": parts})
    own = build_teacher(config.teacher, grid=(4, 4), image_size=SIDE)
    step = make_step(own, config)
    assert bool(step(make_batch(0)).finite)
    before, state = weights(step), {p: {k: v.clone() for k, v in s.items()} for p, s in step.optimizer.state.items()}

    clean = own.visual.proj.clone()
    own.visual.proj[0, 0] = torch.inf
    batch = make_batch(1)
    target_BKD = own(own.patches(batch.images_BHWC), step.objective.token_index(batch.masked_BM, 16))
    predicted_BKD = torch.zeros_like(target_BKD, requires_grad=True)
    loss = step.objective(predicted_BKD, target_BKD)
    (gradient,) = torch.autograd.grad(loss, predicted_BKD)
    assert torch.isinf(loss)
    assert torch.isfinite(gradient).all(), "the premise: the gradient alone does not tell"

    poisoned = step(batch)
    assert not torch.isfinite(poisoned.loss)
    assert not bool(poisoned.finite)
    torch.testing.assert_close(weights(step), before, rtol=0, atol=0)
    assert state.keys() == step.optimizer.state.keys()
    for parameter, values in state.items():
        torch.testing.assert_close(dict(step.optimizer.state[parameter]), values, rtol=0, atol=0)

    own.visual.proj.copy_(clean)  # and the run goes on as if nothing had been
    result, other = step(make_batch(2)), make_step(own, config)
    other(make_batch(0))
    assert bool(result.finite)
    torch.testing.assert_close(other(make_batch(2)).loss, result.loss, rtol=0, atol=0)
    torch.testing.assert_close(weights(other), weights(step), rtol=0, atol=0)


def test_clipping(teacher: Teacher) -> None:
    free, clipped, loose = (make_step(teacher, changed(optim={"clip_grad": limit})) for limit in (0.0, 0.1, 1e6))
    results = [step(make_batch()) for step in (free, clipped, loose)]
    raw = gradients(free)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in raw.values()]))
    assert norm > 0.2
    for result in results:
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients(loose), raw)
    applied = gradients(clipped)
    assert 0.0999 < torch.linalg.vector_norm(torch.cat([g.flatten() for g in applied.values()])) <= 0.1
    torch.testing.assert_close(applied, {name: g * (0.1 / norm) for name, g in raw.items()}, rtol=1e-4, atol=1e-9)


# --- Precision


class Types(TorchDispatchMode):
    """Notes the type of every tensor that an operation takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.seen |= {leaf.dtype for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        return out


def test_precision(teacher: Teacher) -> None:
    found: dict[str, tuple[StepResult, set[torch.dtype]]] = {}
    for precision in ("fp32", "bf16"):
        step = make_step(teacher, changed(train={"precision": precision}))
        with Types() as types:
            step(make_batch(0))
            found[precision] = step(make_batch(1)), types.seen
        assert {p.dtype for p in step.student.parameters()} == {torch.float32}
        assert {g.dtype for g in gradients(step).values()} == {torch.float32}
    half = {torch.bfloat16, torch.float16}
    assert not found["fp32"][1] & half
    assert found["bf16"][1] & half == {torch.bfloat16}
    single, mixed = found["fp32"][0], found["bf16"][0]
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, single.loss, rtol=0.01, atol=0)
    torch.testing.assert_close(mixed.grad_norm, single.grad_norm, rtol=0.1, atol=0)
    assert mixed.loss != single.loss


# --- No host synchronisation, shown without a GPU


class NoWaiting(TorchDispatchMode):
    """On fake CUDA tensors: notes copies for which a host would wait. Reading a value fails by itself there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.name()
        if name == "aten::is_pinned":
            return False
        if name == "aten::_pin_memory":  # fake tensors can't be pinned; what follows must be a copy that does not wait
            return args[0].clone()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {tensor.device.type for tensor in tensors}
        out = op(*args, **kwargs)
        after = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        if len(before | after) > 1 and before:
            # A 0-dimensional CPU operand of an arithmetic operation is a kernel's argument; a copy is a copy.
            if name in ("aten::_to_copy", "aten::copy_") and (kwargs.get("non_blocking") or True in args[2:]):
                self.copies += 1
            else:
                self.waits.append(name)
        return out


@contextmanager
def fake_gpu() -> Iterator[Callable[[nn.Module], None]]:
    """Inside, tensors have no values and may lie on cuda:0; yields a function that moves a module there."""

    def move(module: nn.Module) -> None:
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                        held[name] = nn.Parameter(fake, tensor.requires_grad) if held is part._parameters else fake

    with FakeTensorMode():
        yield move


def in_place_of_backward(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """autograd's engine needs a real device: gradients without values. The next test but one watches the engine."""
    assert loss.requires_grad
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def fake_steps(
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    spoil: Callable[[Tensor], object] | None = None,
) -> NoWaiting:
    # A stream of its own needs a real device: test_gpu.py has that part.
    config = changed(objective={"loss": loss}, train={"accumulate": 2}, teacher={"graph": False, "ahead": False})
    teacher = build_teacher(config.teacher, grid=(4, 4), image_size=SIDE)
    student = Student(config.student, target_width=teacher.width, image_size=SIDE)
    rows = make_plan().step(0)
    with fake_gpu() as move:
        move(teacher)
        move(student)
        step = TrainStep(
            student,
            student,
            teacher,
            Objective(config.objective),
            build_optimizer(student, config.optim),
            config,
            torch.device("cuda:0"),
        )
        images_BHWC = torch.empty(8, SIDE, SIDE, 3, dtype=torch.uint8, device="cuda:0")
        batch = Batch(0, images_BHWC, torch.empty(8, 6, dtype=torch.int64, device="cuda:0"), rows)
        monkeypatch.setattr(Tensor, "backward", lambda loss: in_place_of_backward(loss, step.parameters))
        with NoWaiting() as watch:
            for _ in range(2):  # the first step makes the optimizer's state
                result = step(batch)
            if spoil is not None:
                spoil(result.loss)
        assert result.loss.device.type == "cuda"
    return watch


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1", "mse"])
def test_the_host_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    watch = fake_steps(monkeypatch, loss)
    assert watch.waits == []
    assert watch.copies == 2  # the planned stochastic depth, once a step


@pytest.mark.parametrize(
    "teacher_settings",
    [
        {"kind": "pixels"},
        {"kind": "hog"},
        {"kind": "timm", "name": "vit_tiny_patch16_224"},
        {"kind": "timm", "name": "vit_small_patch14_reg4_dinov2"},
        {"kind": "timm", "name": "beit_base_patch16_224"},
        {"kind": "timm", "name": "vit_small_patch16_dinov3"},
    ],
    ids=lambda settings: settings.get("name", settings["kind"]),
)
def test_no_teacher_makes_the_host_wait(teacher_settings: dict[str, Any]) -> None:
    """So that each can be captured in a CUDA graph; a tower in a type of its own."""
    teacher = build_teacher(TeacherConfig(pretrained="random", **teacher_settings), grid=(4, 4), image_size=SIDE)
    teacher.lower(torch.float16)
    with fake_gpu() as move:
        move(teacher)
        images_BHWC = torch.empty(2, SIDE, SIDE, 3, dtype=torch.uint8, device="cuda:0")
        index_BM = torch.empty(2, 6, dtype=torch.int64, device="cuda:0")
        with NoWaiting() as watch:
            features_BMD = teacher(teacher.patches(images_BHWC), index_BM)
        assert features_BMD.device.type == "cuda"
        assert features_BMD.dtype == teacher.dtype == (torch.float16 if teacher.lowered else torch.float32)
    assert (watch.waits, watch.copies) == ([], 0)


def test_waiting_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataDependentOutputException):
        fake_steps(monkeypatch, "cosine", lambda loss: loss.item())
    for spoil, waits in (
        (lambda loss: loss.cpu(), ["aten::_to_copy"]),
        (lambda loss: torch.zeros(3).to(loss.device), ["aten::_to_copy"]),
        (lambda loss: torch.zeros(3).to(loss.device, non_blocking=True), []),
    ):
        assert fake_steps(monkeypatch, "cosine", spoil).waits == waits


class Reads(TorchDispatchMode):
    """Counts operations whose result the host must know: values, and sizes that depend on values."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += op.name() in self.NAMES
        return op(*args, **(kwargs or {}))


def test_backward_reads_nothing(teacher: Teacher) -> None:
    step, batch = make_step(teacher), make_batch()
    with Reads() as forward:
        inputs = step.inputs.take((0, 0), batch.images_BHWC, batch.masked_BM)
        loss = step._loss(inputs, step._drop_scale(batch.rows), 1.0)
    # Two for each range check, which is made on the CPU alone: of four gathers, and of the queries of the last block.
    assert forward.reads == 10
    with Reads() as backward:
        loss.backward()
    assert backward.reads == 0


# --- Learning


class Remembering:
    """A frozen teacher shown one batch again and again: it is asked once."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.known = teacher, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def __call__(self, patches_BNP: Tensor, index_BK: Tensor) -> Tensor:
        if self.known is None:
            self.known = patches_BNP, index_BK, self.teacher(patches_BNP, index_BK)
        assert torch.equal(self.known[0], patches_BNP)
        assert torch.equal(self.known[1], index_BK)
        return self.known[2]


def test_a_student_learns_64_images(teacher: Teacher, scenes: Path) -> None:
    """Far past any prediction that does not look at the image: the best constant, and the best for each position."""
    plan = SamplePlan(Index.open(scenes), seed=0, batch_size=64, data=BASE.data, mask=BASE.mask)
    loader = make_loader("torchvision", BASE.data)
    (batch,) = islice(loader.batches(plan, 0), 1)
    loader.close()

    def distance(target_XD: Tensor, guess_XD: Tensor) -> float:
        return (1 - F.cosine_similarity(target_XD, guess_XD.expand_as(target_XD), dim=-1)).mean().item()

    all_BND = F.normalize(teacher(teacher.patches(batch.images_BHWC), torch.arange(17).expand(64, -1)), dim=-1)
    index_BK = Objective(ObjectiveConfig()).token_index(batch.masked_BM, 16)
    target_BKD = all_BND.gather(1, index_BK[..., None].expand(-1, -1, all_BND.shape[2]))
    constant = distance(target_BKD, target_BKD.mean((0, 1)))
    by_position = distance(target_BKD, all_BND.mean(0)[index_BK])
    assert min(constant, by_position) > 0.45

    config = changed(
        student={"width": 192, "depth": 2, "heads": 3, "drop_path": 0.0},
        optim={"lr": 2e-3, "eps": 1e-8, "weight_decay": 0.0},
    )
    step = make_step(Remembering(teacher), config)
    first = step(batch).loss.item()
    assert 0.9 < first < 1.1
    for number in range(1, 130):
        set_learning_rate(step.optimizer, 2e-3 * min(1.0, (number + 1) / 10))
        loss = step(batch).loss
    assert loss < 0.2
    assert loss < 0.45 * min(constant, by_position)


# --- The recipe


@pytest.mark.slow
def test_two_steps_of_the_b16_recipe(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    run_verb("data", "scenes", "--out", data, "--images", 8, "--profile", "imagenet", "--workers", 1)
    run_verb("data", "index", data, "--verify")
    settings = {
        "data.index": data,
        "run.dir": run,
        "run.tensorboard": False,
        "teacher.pretrained": "random",
        "train.batch-size": 4,
        "train.steps": 2,
        "train.log-every": 1,
        "train.device": "cpu",
        "train.precision": "fp32",  # many CPUs have no instructions for products in bf16
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    run_verb("train", "--config", Path(__file__).parents[1] / "configs" / "vit_b16_in1k.yaml", *words)
    first, second = read_metrics(run)
    assert (first["step"], second["step"]) == (1, 2)
    assert 0.9 < first["loss"] < 1.1
    assert second["bad_samples"] == 0
    assert (run / "checkpoints" / "step-00000002" / "student").exists()
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of every process so far, this one's included
    assert most < 12e9
