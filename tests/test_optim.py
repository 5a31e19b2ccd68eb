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


def test_parity_with_plain_adamw_over_100_steps() -> None:
    torch.manual_seed(0)
    model, reference = Toy(), Toy()
    reference.load_state_dict(model.state_dict())
    ours = build_optimizer(model, OptimConfig(weight_decay=0.05))
    plain = torch.optim.AdamW(
        [
            {"params": [reference.linear.weight], "weight_decay": 0.05},
            {"params": [reference.token, reference.linear.bias, *reference.norm.parameters()], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        foreach=False,
        fused=False,
    )
    for step in range(100):
        rate = learning_rate(step, 100, OPTIM, 1) / 100
        set_learning_rate(ours, rate)
        set_learning_rate(plain, rate)
        for m, optimizer in ((model, ours), (reference, plain)):
            torch.manual_seed(step)
            backward(m)
            optimizer.step() if m is reference else apply_update(optimizer, torch.tensor(True))
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


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
