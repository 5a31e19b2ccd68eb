"""The objective: which tokens, which normalisation, which loss, against loops in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvp_kernels
from mvp_fast.config.schema import ObjectiveConfig
from mvp_fast.objective.guided import SMOOTH_L1_BETA, Objective

NORMS = ["l2", "layernorm", "none"]


def pair(
    images: int = 3, tokens: int = 5, width: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    pred, features = torch.randn(images, tokens, width), 3 * torch.randn(images, tokens, width) + 1
    return pred.to(dtype).requires_grad_(), features.to(dtype)


def slow_loss(config: ObjectiveConfig, pred: Tensor, features: Tensor) -> Tensor:
    """(B, K), a token at a time in float64."""
    losses = torch.zeros(pred.shape[:2], dtype=torch.float64)
    for b, k in itertools.product(*map(range, pred.shape[:2])):
        p, t = pred[b, k].detach().double(), features[b, k].double()
        if config.target_norm == "l2":
            t = t / t.norm()
        elif config.target_norm == "layernorm":
            t = (t - t.mean()) / (t.var(correction=0) + 1e-6).sqrt()
        if config.loss == "cosine":
            losses[b, k] = 1 - (p @ t) / (p.norm() * t.norm())
        elif config.loss == "mse":
            losses[b, k] = sum((p[d] - t[d]) ** 2 for d in range(len(p))) / len(p)
        else:
            d = (p - t).abs()
            each = torch.where(d < SMOOTH_L1_BETA, d * d / (2 * SMOOTH_L1_BETA), d - SMOOTH_L1_BETA / 2)
            losses[b, k] = each.sum() / len(each)
    return losses


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "mse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_slow_one(norm: str, kind: str, dtype: torch.dtype) -> None:
    config = ObjectiveConfig(target_norm=norm, loss=kind)
    pred, features = pair(dtype=dtype)
    want = slow_loss(config, pred, features)
    found = Objective(config)(pred, features)
    found.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    torch.testing.assert_close(found.detach().double(), want.mean(), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(pred.grad).all()
    assert (pred.grad != 0).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "mse"])
def test_gradient(norm: str, kind: str) -> None:
    objective = Objective(ObjectiveConfig(target_norm=norm, loss=kind))
    pred, features = pair(2, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda p: objective(p, features), (pred,))


def test_the_choices_differ() -> None:
    """Each setting changes the loss; l2 and none give one cosine, for it does not see a length."""
    pred, features = pair(4, 6)
    losses = {
        (kind, norm): Objective(ObjectiveConfig(loss=kind, target_norm=norm))(pred, features).item()
        for kind, norm in itertools.product(("cosine", "smooth_l1", "mse"), NORMS)
    }
    assert losses["cosine", "l2"] == pytest.approx(losses["cosine", "none"], abs=1e-6)
    del losses["cosine", "none"]
    assert len({round(loss, 4) for loss in losses.values()}) == 8


@pytest.mark.parametrize("cls", [True, False])
def test_masked_tokens(cls: bool) -> None:
    masked_BM = torch.tensor([[0, 3, 8], [1, 2, 7]])
    index = Objective(ObjectiveConfig(tokens="masked", cls=cls)).token_index(masked_BM, 9)
    assert index.dtype == torch.int64
    assert index.tolist() == ([[0, 1, 4, 9], [0, 2, 3, 8]] if cls else [[1, 4, 9], [2, 3, 8]])


@pytest.mark.parametrize("cls", [True, False])
def test_all_tokens(cls: bool) -> None:
    masked_BM = torch.tensor([[0, 3], [1, 2]])
    index = Objective(ObjectiveConfig(tokens="all", cls=cls)).token_index(masked_BM, 4)
    assert index.dtype == torch.int64
    assert index.tolist() == [list(range(0 if cls else 1, 5))] * 2


def test_the_index_points_to_the_same_token_in_both_networks() -> None:
    """Patch n is token 1 + n: a gather of all tokens by the index is the CLS token and the masked patches."""
    cls_B1D, patches_BND = torch.randn(2, 1, 3), torch.randn(2, 9, 3)
    masked_BM = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(2)])
    index = Objective(ObjectiveConfig()).token_index(masked_BM, 9)
    taken = mvp_kernels.masked_gather(torch.cat([cls_B1D, patches_BND], 1), index)
    assert torch.equal(taken[:, :1], cls_B1D)
    for b in range(2):
        assert torch.equal(taken[b, 1:], patches_BND[b, masked_BM[b]])


def test_no_masked_patch_leaves_cls() -> None:
    none_BM = torch.zeros(2, 0, dtype=torch.int64)
    assert Objective(ObjectiveConfig()).token_index(none_BM, 9).tolist() == [[0], [0]]


def test_autocast_does_not_lower_the_loss() -> None:
    for kind in ("cosine", "smooth_l1", "mse"):
        objective = Objective(ObjectiveConfig(loss=kind, target_norm="layernorm"))
        pred, features = pair(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            inside = objective(pred, features)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, objective(pred, features), rtol=0, atol=0)


def test_kernels_are_used_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pred, features = pair()
    mvp_kernels.reset_record()
    Objective(ObjectiveConfig())(pred, features)
    assert mvp_kernels.record() == {"guided_loss": "reference"}
    Objective(ObjectiveConfig(loss="smooth_l1"), impl="reference")(pred, features)
    assert mvp_kernels.record() == {"guided_loss": "reference", "token_norm": "reference"}
    for kind in ("cosine", "smooth_l1", "mse"):
        with pytest.raises(mvp_kernels.KernelUnavailable):
            Objective(ObjectiveConfig(loss=kind), impl="triton")(pred, features)


def test_shapes_must_agree() -> None:
    pred, features = pair()
    with pytest.raises(ValueError, match=r"predictions \(3, 5, 16\) and features \(3, 4, 16\) differ"):
        Objective(ObjectiveConfig())(pred, features[:, :4])


def test_perfect_prediction_costs_nothing() -> None:
    _, features = pair()
    for norm in NORMS:
        target = F.normalize(features, dim=-1) if norm == "l2" else features
        target = F.layer_norm(features, (16,), eps=1e-6) if norm == "layernorm" else target
        for kind in ("cosine", "smooth_l1", "mse"):
            found = Objective(ObjectiveConfig(target_norm=norm, loss=kind))(target, features)
            torch.testing.assert_close(found, torch.tensor(0.0), rtol=0, atol=1e-6)
