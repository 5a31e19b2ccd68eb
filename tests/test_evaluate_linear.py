"""Linear classifiers trained together, against each trained alone by torch's own modules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from mvp_fast.evaluate.feature_cache import Features
from mvp_fast.evaluate.linear import EPS, Bank, Heads, HeadSettings, Scores, predict, score, train_heads

CPU = torch.device("cpu")
HOW = HeadSettings(lrs=(1e-3, 0.03, 0.3), epochs=4, batch_size=16, weight_decay=0.1, seed=5)
Labels = npt.NDArray[np.int64]


def some_features(seed: int = 0, samples: int = 70, layers: int = 3, width: int = 6) -> Features:
    """Features with other means and spreads in each channel, of every other row of a set, stored out of order."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2 * samples, layers, 2, width)) * rng.uniform(0.1, 9, width) + rng.normal(size=width)
    places = rng.permutation(2 * samples)[:samples]
    return Features(values.astype(np.float32), np.arange(0, 2 * samples, 2), places)


def some_labels(features: Features, classes: int = 4) -> Labels:
    """Classes that the last layer tells best."""
    rng = np.random.default_rng(1)
    x = features.gather(np.arange(len(features)), [2])[:, 0]
    scores = x @ rng.normal(size=(x.shape[1], classes)) + rng.normal(size=(len(features), classes))
    return np.asarray(scores.argmax(1))


def bank(features: Features, layers: tuple[int, ...] = (0, 1, 2)) -> Bank:
    return Bank(features, layers, CPU, torch.float64)


def trained_alone(x_ND: Tensor, label_N: Tensor, classes: int, lr: float, how: HeadSettings) -> nn.Module:
    """One head by torch's own parts."""
    norm, linear = nn.BatchNorm1d(x_ND.shape[1], eps=EPS, affine=False), nn.Linear(x_ND.shape[1], classes)
    model = nn.Sequential(norm, linear).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    groups = [{"params": [linear.weight], "weight_decay": how.weight_decay}, {"params": [linear.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    size = min(how.batch_size, len(x_ND))
    each = len(x_ND) // size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * each)
    for epoch in range(how.epochs):
        order = np.random.default_rng([how.seed, epoch]).permutation(len(x_ND))
        for start in range(0, each * size, size):
            batch = order[start : start + size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_ND[batch]), label_N[batch]).backward()
            optimizer.step()
            schedule.step()
    norm.running_mean, norm.running_var = x_ND.mean(0), x_ND.var(0, unbiased=False)
    return model.eval()


@pytest.mark.parametrize("batch_size", [16, 70, 300], ids=["some left over", "all", "more than there are"])
def test_heads_trained_together_are_those_trained_alone(batch_size: int) -> None:
    features, how = some_features(), replace(HOW, batch_size=batch_size)
    label_N, x_NLD = some_labels(features), torch.from_numpy(features.gather(np.arange(70), [0, 1, 2])).double()
    steps: list[int] = []
    heads = train_heads(bank(features), label_N, 4, how, steps.append)
    assert steps == list(range(1, 4 * max(70 // batch_size, 1) + 1))
    logits_RLBC = heads.logits(x_NLD)
    scores = score(heads, bank(features), label_N)
    for r, lr in enumerate(how.lrs):
        for layer in range(3):
            alone = trained_alone(x_NLD[:, layer], torch.from_numpy(label_N), 4, lr, how)
            logits_BC = alone(x_NLD[:, layer]).detach()
            torch.testing.assert_close(logits_RLBC[r, layer], logits_BC, rtol=1e-6, atol=1e-6)
            assert scores.correct_RL[r, layer] == (logits_BC.argmax(1).numpy() == label_N).sum()
            loss = nn.functional.cross_entropy(logits_BC, torch.from_numpy(label_N))
            assert math.isclose(scores.loss_RL[r, layer], float(loss), rel_tol=1e-6)


def test_a_head_knows_nothing_of_the_others() -> None:
    features = some_features(1)
    label_N = some_labels(features)
    together = train_heads(bank(features), label_N, 4, HOW)
    for r, lr in enumerate(HOW.lrs):
        alone = train_heads(bank(features, (1,)), label_N, 4, replace(HOW, lrs=(lr,)))
        torch.testing.assert_close(together.weight_RLDC[r, 1], alone.weight_RLDC[0, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.bias_RL1C[r, 1], alone.bias_RL1C[0, 0], rtol=1e-9, atol=1e-9)
    other_order = train_heads(bank(features), label_N, 4, replace(HOW, seed=6))
    assert not torch.allclose(together.weight_RLDC, other_order.weight_RLDC)


def test_float32_learns_what_is_there_to_learn() -> None:
    features = some_features(2, samples=400)
    label_N = some_labels(features)
    part, rest = np.arange(300), np.arange(300, 400)
    how = replace(HOW, epochs=30, lrs=(1e-7, 0.03))
    heads = train_heads(Bank(features.at(part), [0, 1, 2], CPU), label_N[part], 4, how)
    scores = score(heads, Bank(features.at(rest), [0, 1, 2], CPU), label_N[rest])
    assert scores.best() == (1, 2)
    assert scores.correct_RL[1, 2] > 80 > 45 > scores.correct_RL[1, :2].max()
    only = Bank(features.at(rest), [2], CPU)
    chosen = train_heads(Bank(features.at(part), [2], CPU), label_N[part], 4, replace(how, lrs=(0.03,)))
    ranked = predict(chosen, only)
    assert ranked.shape == (100, 4)
    assert (np.sort(ranked, axis=1) == np.arange(4)).all()
    assert (ranked[:, 0] == label_N[rest]).sum() == score(chosen, only, label_N[rest]).correct_RL[0, 0]


def test_of_equally_right_heads_the_surer_one_is_chosen() -> None:
    correct = np.array([[3, 9, 9], [9, 9, 2]])
    assert Scores(correct, np.array([[0.0, 0.5, 0.4], [0.41, 0.6, 0.0]])).best() == (0, 2)
    assert Scores(correct, np.array([[0.0, np.nan, np.nan], [0.41, 0.6, 0.0]])).best() == (1, 0)


def test_heads_that_are_as_they_began_say_nothing() -> None:
    """Weights of zero: every class is as likely, and the loss is the logarithm of their number."""
    features = some_features(3)
    heads = Heads(torch.zeros(1, 3, 12, 4), torch.zeros(1, 3, 1, 4), torch.zeros(3, 12), torch.ones(3, 12))
    scores = score(heads, Bank(features, [0, 1, 2], CPU), some_labels(features))
    np.testing.assert_allclose(scores.loss_RL, math.log(4))


@pytest.mark.gpu
def test_a_gpu_keeps_the_features_and_finds_the_same() -> None:
    features, cuda = some_features(4), torch.device("cuda")
    label_N = some_labels(features)
    there = Bank(features, [0, 1, 2], cuda, torch.float64)
    assert there.resident
    heads = train_heads(there, label_N, 4, HOW)
    torch.testing.assert_close(heads.weight_RLDC.cpu(), train_heads(bank(features), label_N, 4, HOW).weight_RLDC)
