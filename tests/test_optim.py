"""Learning rate, optimizer groups, and the update that skips itself: against plain torch, with real optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mvp_fast.config.schema import OptimConfig
from mvp_fast.errors import ConfigError
from mvp_fast.train.optim import (
    apply_update,
    build_optimizer,
    clear_gradients,
    clip_scale,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1, reference_batch_size=4)


class Toy(nn.Module):
    """A matrix, a bias, a norm and a named token: every case of weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.linear = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x + self.token[0]))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(7, 5)).square().mean().add(model.linear.weight.sum()).backward()


def test_learning_rate_is_linear_then_a_cosine() -> None:
    rates = [learning_rate(step, 100, OPTIM, 4) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * i / 89)) for i in range(90)])


def test_learning_rate_scales_with_the_batch_but_its_floor_does_not() -> None:
    assert learning_rate(10, 100, OPTIM, 8) == 2.0
    assert learning_rate(99, 100, OPTIM, 8) == pytest.approx(0.1)
    assert learning_rate(99, 100, OptimConfig(lr=0.01, min_lr=0.1, reference_batch_size=4), 4) == pytest.approx(0.01)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_of_short_runs(total: int) -> None:
    rates = [learning_rate(step, total, OPTIM, 4) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert learning_rate(total + 5, total, OPTIM, 4) == pytest.approx(0.1), "past the end it stays at the floor"


def test_matrices_alone_have_weight_decay() -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)] > 0}
    assert decayed == {"linear.weight"}
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.98)


# --- The fused update against the plain one

STEPS, POISONED, LIMIT = 100, (0, 17, 18, 60), 0.4
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-7}


class Net(nn.Module):
    """Two layers with a norm between: gradients that change in size and direction as it learns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 12, dtype=dtype))
        self.inner = nn.Linear(12, 16, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.outer = nn.Linear(16, 3, dtype=dtype)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def learn(self, step: int) -> None:
        """A gradient that is a function of the weights and the step alone; not finite in the poisoned steps."""
        generator = torch.Generator().manual_seed(step)
        x_BD = torch.randn(20, 12, dtype=self.token.dtype, generator=generator)
        y_BD = self.outer(torch.tanh(self.norm(self.inner(x_BD + self.token))))
        self.zero_grad()
        (y_BD - x_BD[:, :3].sin()).square().mean().backward()
        if step in POISONED:
            self.norm.bias.grad[1] = (torch.nan, torch.inf)[step % 2]


def plain_adamw(model: Net) -> torch.optim.Optimizer:
    """torch's single-tensor AdamW, grouped by hand."""
    kept = [model.token, model.inner.bias, model.norm.weight, model.norm.bias, model.outer.bias]
    groups = [
        {"params": [model.inner.weight, model.outer.weight], "weight_decay": 0.3},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, foreach=False, fused=False)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_plain_adamw_over_100_steps(dtype: torch.dtype, rounded: bool) -> None:
    """With clipping, schedule, decay and skipped steps. `rounded`: the reference's factor is cut to float32 as well,
    which is what the fused update takes; nothing else then parts the two in float64."""
    torch.manual_seed(0)
    fused, plain = Net(dtype), Net(dtype)
    plain.load_state_dict(fused.state_dict())
    ours = build_optimizer(fused, OptimConfig(weight_decay=0.3))
    reference = plain_adamw(plain)
    start, clipped = copy.deepcopy(fused.state_dict()), 0
    for step in range(STEPS):
        rate = learning_rate(step, STEPS, OPTIM, 1) / 20
        set_learning_rate(ours, rate)
        set_learning_rate(reference, rate)
        fused.learn(step)
        plain.learn(step)
        norm = nn.utils.get_total_norm([p.grad for p in fused.parameters()])
        apply_update(ours, torch.isfinite(norm), clip_scale(norm, LIMIT))

        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in plain.parameters()]))
        if not math.isfinite(norm):
            assert step in POISONED
            continue
        scale = max(1.0, (norm.item() + 1e-6) / LIMIT)
        clipped += scale > 1
        if rounded:
            scale = torch.tensor(scale, dtype=torch.float32).item()
        for parameter in plain.parameters():
            parameter.grad /= scale
        reference.step()
    assert 20 < clipped < 80
    tolerance = 1e-12 if rounded and dtype == torch.float64 else TOLERANCE[dtype]
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert (a - start[name]).abs().max() > 0.05, "and it has gone far"
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert ours.state[a]["step"] == reference.state[b]["step"] == STEPS - len(POISONED), name


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.2, 1e9])
@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lamb", "sgd"])
def test_clipping_is_that_of_torch(name: str, limit: float) -> None:
    torch.manual_seed(2)
    ours, theirs = Net(torch.float64), Net(torch.float64)
    theirs.load_state_dict(ours.state_dict())
    mine, other = (build_optimizer(model, OptimConfig(name=name, lr=0.1)) for model in (ours, theirs))
    for step in range(1, 4):
        ours.learn(step)
        theirs.learn(step)
        norm = nn.utils.get_total_norm([p.grad for p in ours.parameters()])
        apply_update(mine, torch.tensor(True), clip_scale(norm, limit))
        if limit:
            nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        apply_update(other, torch.tensor(True))
        for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_clip_scale_is_exactly_one_below_the_limit() -> None:
    for norm in (0.0, 1e-30, 0.5, 2.9):
        assert clip_scale(torch.tensor(norm), 3.0) == 1
    assert clip_scale(torch.tensor(12.0), 3.0).item() == pytest.approx(4.0)
    assert clip_scale(torch.tensor(12.0, dtype=torch.float64), 3.0).dtype == torch.float32
    assert clip_scale(torch.tensor(12.0), 0.0) is None


@pytest.mark.parametrize("name", ["lamb", "lambc", "adamw", "lion"])
def test_no_optimizer_clips_by_itself(name: str) -> None:
    """timm's LAMB clips at a norm of 1 unless it is told not to: the moments of a large gradient show it."""
    model = Net(torch.float32)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    apply_update(optimizer, torch.tensor(True))
    share = 1 - optimizer.param_groups[0]["betas"][1 if name == "lion" else 0]
    for parameter in model.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 7.0 * share))


def test_gradients_are_given_back() -> None:
    model = Net(torch.float32)
    optimizer = build_optimizer(model, OptimConfig())
    model.learn(1)
    clear_gradients(optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adam", "lamb", "nadamw"])
def test_a_skipped_update_changes_neither_weights_nor_state(name: str) -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(name=name))
    assert bool(optimizer.defaults.get("fused")) == (name in ("adamw", "adam"))
    for _ in range(3):
        backward(model)
        apply_update(optimizer, torch.tensor(True))
    names = {parameter: key for key, parameter in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    state = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer, names).items()}
    backward(model)
    model.linear.weight.grad[0, 0] = torch.nan
    apply_update(optimizer, torch.tensor(False))
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    after = optimizer_tensors(optimizer, names)
    assert after.keys() == state.keys()
    assert len(state) >= 2 * len(names)
    assert all(torch.equal(after[key], state[key]) for key in state)
    backward(model)
    apply_update(optimizer, torch.tensor(True))
    assert not torch.equal(weights["linear.weight"], model.linear.weight), "and the next update is taken"


@pytest.mark.parametrize("name", ["adamw", "lamb", "nadamw", "lion"])
def test_state_round_trip_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(1)
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(name=name))
    for _ in range(3):
        backward(model)
        apply_update(optimizer, torch.tensor(True))
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build_optimizer(twin, OptimConfig(name=name))
    saved = optimizer_tensors(optimizer, {p: key for key, p in model.named_parameters()})
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    load_optimizer_tensors(twin_optimizer, {p: key for key, p in twin.named_parameters()}, saved)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            torch.manual_seed(step)
            backward(m)
            apply_update(o, torch.tensor(True))
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_unknown_optimizer_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `adamw`"):
        build_optimizer(Toy(), OptimConfig(name="adamww"))


def test_an_optimizer_that_cannot_be_built_is_told() -> None:
    with pytest.raises(ConfigError, match="`adan` can't be built here"):  # it takes three betas
        build_optimizer(Toy(), OptimConfig(name="adan"))
