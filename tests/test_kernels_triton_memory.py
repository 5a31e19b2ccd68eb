"""Which memory the kernels touch: none outside of their tensors, and each value they need once.

Triton's interpreter carries out every load and store at its real address, so that they can be looked at on the way.

Shape legend: B images, N tokens, M tokens taken, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import mvp_kernels
from mvp_kernels.operators import guided_loss as guided_operators
from mvp_kernels.operators import masked_gather as gather_operators
from tests.kernel_cases import CALLS, Shape, distinct_index, make_call, small_tiles, surroundings

__all__ = ["surroundings"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter does not run the kernels")


class Watch:
    """Every address that kernels load from and store to.

    Attributes:
        loaded, stored: addresses, an array an instruction.
        outside: how many of them were in none of the tensors that the kernel was given.
    """

    def __init__(self) -> None:
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []
        self.outside = 0
        self._extents: list[tuple[int, int]] = []

    def clear(self) -> None:
        """Forget what was touched so far."""
        self.loaded, self.stored = [], []

    def start(self, arguments: list[Any]) -> None:
        """A kernel is launched."""
        self._extents = []
        for x in tree_leaves(arguments):  # kernels may be given tuples of tensors
            if isinstance(x, Tensor) and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                self._extents.append((x.data_ptr(), x.data_ptr() + last * x.itemsize))

    def note(self, touched: list[np.ndarray], pointers: np.ndarray, mask: np.ndarray) -> None:
        """An instruction is carried out."""
        addresses = np.asarray(pointers)[np.asarray(mask, dtype=bool)].ravel()
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, last in self._extents:
            inside |= (addresses >= first) & (addresses <= last)
        self.outside += int((~inside).sum())
        touched.append(addresses)


def times(touched: list[np.ndarray], x: Tensor) -> Tensor:
    """How often each value of a tensor was touched."""
    offset = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offset = offset[..., None] + torch.arange(size) * stride
    wanted = (x.data_ptr() + offset * x.itemsize).numpy().astype(np.uint64)
    addresses, counts = np.unique(np.concatenate(touched), return_counts=True)
    place = np.searchsorted(addresses, wanted).clip(max=len(addresses) - 1)
    return torch.from_numpy(np.where(addresses[place] == wanted, counts[place], 0))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Looks on; the kernels run as they are."""
    watch = Watch()
    launch, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def noting_launch(self: Any, *args: Any, **named: Any) -> Any:
        watch.start([*args, *named.values()])
        return launch(self, *args, **named)

    def noting_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        watch.note(watch.loaded, pointers.data, mask.data)
        return load(self, pointers, mask, *others)

    def noting_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        watch.note(watch.stored, pointers.data, mask.data)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(GridExecutor, "__call__", noting_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noting_store)
    yield watch
    assert watch.outside == 0


@pytest.mark.parametrize("tiles", ["whole", "small"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_outside_of_the_tensors(name: str, tiles: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither past the last row of a tile that the rows don't fill, nor past a row's channels."""
    if tiles == "small":
        small_tiles(monkeypatch, 8)
    make_call(name, "cpu").outcome()
    assert watch.loaded
    assert watch.stored
    assert watch.outside == 0


@pytest.mark.parametrize("wrong", [-2, -100, 7, 8, 1 << 32, (1 << 32) + 3])
def test_an_index_out_of_range_reads_nothing(wrong: int, watch: Watch) -> None:
    x_BND, pred_BMD = torch.randn(3, 7, 13, requires_grad=True), torch.randn(3, 2, 13, requires_grad=True)
    index_BM = torch.tensor([[0, wrong], [wrong, 1], [6, wrong]])
    out_BMD = gather_operators.masked_gather(x_BND, index_BM)
    loss_BM = guided_operators.guided_loss(pred_BMD, x_BND.detach(), index_BM, "layernorm", "none", 1e-6, 1.0)
    torch.autograd.grad([out_BMD.sum(), 2 * loss_BM.sum()], [x_BND, pred_BMD])
    assert torch.equal(out_BMD.isnan().any(-1), index_BM == wrong)
    assert times(watch.loaded, x_BND).sum() == 3 * 3 * 13  # gathered, scored, and scored again
    assert watch.outside == 0


SHAPE = Shape(3, 11, 5, 24)


def test_masked_gather_touches_each_value_once(watch: Watch) -> None:
    """Backward, too: what nobody took is cleared in the same pass."""
    x_BND, index_BM = torch.randn(*SHAPE[:2], SHAPE.width, requires_grad=True), distinct_index(SHAPE, "cpu")
    out_BMD = mvp_kernels.masked_gather(x_BND, index_BM, impl="triton")
    taken_BN = torch.zeros(SHAPE[:2], dtype=torch.int64)
    b, m = (index_BM >= 0).nonzero(as_tuple=True)
    taken_BN[b, index_BM[b, m]] = 1
    assert torch.equal(times(watch.loaded, x_BND), taken_BN[..., None].expand_as(x_BND))
    assert (times(watch.stored, out_BMD) == 1).all()
    watch.clear()
    upstream_BMD = torch.randn_like(out_BMD)
    (grad_BND,) = torch.autograd.grad(out_BMD, x_BND, upstream_BMD)
    assert torch.equal(times(watch.loaded, upstream_BMD), (index_BM >= 0).long()[..., None].expand_as(upstream_BMD))
    assert (times(watch.stored, grad_BND) == 1).all()


@pytest.mark.parametrize("kind", ["l2", "layernorm"])
def test_token_norm_touches_each_value_once(kind: str, watch: Watch) -> None:
    x_MD = torch.randn(17, 24, requires_grad=True)
    out_MD = mvp_kernels.token_norm(x_MD, kind, impl="triton")
    assert (times(watch.loaded, x_MD) == 1).all()
    assert (times(watch.stored, out_MD) == 1).all()
    watch.clear()
    upstream_MD = torch.randn_like(out_MD)
    (grad_MD,) = torch.autograd.grad(out_MD, x_MD, upstream_MD)
    assert (times(watch.loaded, x_MD) == 1).all()
    assert (times(watch.loaded, upstream_MD) == 1).all()
    assert (times(watch.stored, grad_MD) == 1).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_guided_loss_touches_each_value_once(reduction: str, upstream: float, watch: Watch) -> None:
    """Forward, the tokens in the loss; backward, nothing but the upstream gradient where it is the expected one."""
    pred_BMD, target_BND = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 11, 24)
    index_BM = distinct_index(SHAPE, "cpu")
    loss = mvp_kernels.guided_loss(pred_BMD, target_BND, index_BM, "layernorm", reduction, impl="triton")
    once_BMD = (index_BM >= 0).long()[..., None].expand_as(pred_BMD)
    taken_BN = torch.zeros(3, 11, dtype=torch.int64)
    b, m = (index_BM >= 0).nonzero(as_tuple=True)
    taken_BN[b, index_BM[b, m]] = 1
    assert torch.equal(times(watch.loaded, pred_BMD), once_BMD)
    assert torch.equal(times(watch.loaded, target_BND), taken_BN[..., None].expand_as(target_BND))
    watch.clear()
    (grad_BMD,) = torch.autograd.grad(loss, pred_BMD, torch.full_like(loss, upstream))
    if upstream == 1.0:
        assert sum(map(len, watch.stored)) == 0
        assert sum(map(len, watch.loaded)) == index_BM.numel()
    else:
        assert (times(watch.stored, grad_BMD) == 1).all()
        assert torch.equal(times(watch.loaded, pred_BMD), once_BMD)


def test_patchify_reads_each_byte_once_for_two_models(watch: Watch) -> None:
    images_BHWC = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    normalizations = [mvp_kernels.Normalization((0.5,) * 3, (0.5,) * 3, dtype) for dtype in (torch.float32, torch.half)]
    outs = mvp_kernels.patchify(images_BHWC, 4, normalizations, impl="triton")
    assert (times(watch.loaded, images_BHWC) == 1).all()
    for out_BNP in outs:
        assert (times(watch.stored, out_BNP) == 1).all()
