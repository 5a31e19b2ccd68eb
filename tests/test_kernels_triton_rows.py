"""The Triton kernels at their edges: strides, what isn't finite, indices, cutting images; both runs the same bits.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvp_kernels
from mvp_kernels import Normalization
from mvp_kernels.operators import masked_gather as gather_operators
from tests.kernel_cases import CALLS, CPU_IMPLS, DEVICES, FLOATS, IMPLS, Call, assert_same, make_call, surroundings

__all__ = ["surroundings"]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "sliced": lambda x: F.pad(x, (3, 2, 1, 2))[:, 1:-2, 3:-2] if x.ndim == 3 else F.pad(x, (3, 2))[..., 3:-2],
    "one_token": lambda x: x[:, :1].expand_as(x),
    "one_channel": lambda x: x[..., :1].expand_as(x),
}


def with_inputs(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The same call on changed inputs."""
    return call._replace(inputs=tuple(change(x).detach().requires_grad_(x.requires_grad) for x in call.inputs))


@DEVICES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_strides_make_no_difference(device: str, name: str, layout: str) -> None:
    """Tokens, weights, index and images in any strides, also of 0."""

    def laid_out(x: Tensor) -> Tensor:
        # A row takes a token once, also where the layout would repeat it.
        return LAYOUTS["sliced" if x.dtype == torch.int64 and layout.startswith("one") else layout](x)

    call = with_inputs(make_call(name, device), laid_out)
    assert not any(x.is_contiguous() for x in call.inputs)
    assert_same(call.outcome(), with_inputs(call, Tensor.contiguous).outcome(), exact=False)
    assert mvp_kernels.record() == {call.op: "triton"}


@DEVICES
@pytest.mark.parametrize("layout", [*LAYOUTS, "sum"])
@pytest.mark.parametrize("name", ["masked_gather", "token_norm l2", "token_norm layernorm"])
def test_strides_of_the_upstream_gradient(device: str, name: str, layout: str) -> None:
    call = make_call(name, device)
    x_BND, out_BKD = call.inputs[0], call.run(*call.inputs)
    assert isinstance(out_BKD, Tensor)
    if layout == "sum":  # brings a gradient of stride 0
        assert_same(
            torch.autograd.grad(out_BKD.sum(), x_BND, retain_graph=True),
            torch.autograd.grad(out_BKD, x_BND, torch.ones_like(out_BKD)),
            exact=False,
        )
        return
    upstream_BKD = LAYOUTS[layout](torch.randn_like(out_BKD))
    assert_same(
        torch.autograd.grad(out_BKD, x_BND, upstream_BKD, retain_graph=True),
        torch.autograd.grad(out_BKD, x_BND, upstream_BKD.contiguous()),
        exact=False,
    )


@DEVICES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CALLS)
def test_two_runs_give_the_same_bits(device: str, name: str, dtype: torch.dtype) -> None:
    call = make_call(name, device, dtype)
    assert_same(call.outcome(), call.outcome())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
@DEVICES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "patchify" and not name.startswith("relpos")])
def test_what_is_not_finite_stays_in_its_token(device: str, name: str, value: float) -> None:
    """Other tokens, and their gradients, are as without it; in its own token it is seen as the reference sees it."""
    call = make_call(name, device)
    clean = call.outcome()
    slow_run = make_call(name, device, impl="reference").run
    for i, x in enumerate(call.inputs):
        if x.ndim < 3:  # index and weights
            continue
        bad_x = x.detach().clone()
        bad_x[2, 1 if x.shape[1] == 4 else 5, 3] = value  # prediction 1 of image 2 goes with token 5
        inputs = list(call.inputs)
        inputs[i] = bad_x.requires_grad_(x.requires_grad)
        bad = call._replace(inputs=tuple(inputs))
        for got, was, slow in zip(bad.outcome(), clean, bad.outcome(slow_run), strict=True):
            torch.testing.assert_close(got.isnan(), slow.isnan(), rtol=0, atol=0)
            torch.testing.assert_close(got.isinf(), slow.isinf(), rtol=0, atol=0)
            if got.ndim == 0:  # the mean
                assert got.isnan()
                continue
            others = torch.ones(got.shape[:2], dtype=torch.bool, device=device)
            others[2, 1 if got.shape[1] == 4 else 5] = False
            assert_same([got[others]], [was[others]])
            assert others.sum() == others.numel() - 1


def indexed(op: str, index_BM: Tensor, impl: str = "triton") -> Tensor:
    """An operation that takes 3 images of 5 tokens by an index."""
    x_BND = torch.randn(3, 5, 8, device=index_BM.device)
    if op == "masked_gather":
        return mvp_kernels.masked_gather(x_BND, index_BM, impl=impl)
    pred_BMD = torch.randn(3, index_BM.shape[1], 8, device=index_BM.device)
    return mvp_kernels.guided_loss(pred_BMD, x_BND, index_BM, impl=impl)


@IMPLS
@pytest.mark.parametrize("op", ["masked_gather", "guided_loss"])
@pytest.mark.parametrize("wrong", [-2, 5, 1 << 40])
def test_an_index_out_of_range_on_the_cpu(impl: str, op: str, wrong: int) -> None:
    """Looked at before an implementation is chosen, whether or not that is the CPU's."""
    index_BM = torch.zeros(3, 2, dtype=torch.int64)
    index_BM[1, 1] = wrong
    with pytest.raises(IndexError, match=rf"index holds {wrong}; the range is -1 \(padding\) to 4"):
        indexed(op, index_BM, impl)
    assert mvp_kernels.record() == {}


@CPU_IMPLS
@pytest.mark.parametrize("op", ["masked_gather", "guided_loss"])
def test_debug_mode_on_the_cpu(impl: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that a row takes twice; elsewhere, and padding, it may come again."""
    twice_BM = torch.tensor([[0, 1, -1, -1], [1, 2, 3, 4], [3, 1, 0, 3]])
    indexed(op, twice_BM, impl)
    monkeypatch.setenv("MVP_KERNELS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a row of the index holds a token twice"):
        indexed(op, twice_BM, impl)
    indexed(op, twice_BM[:, :3].contiguous(), impl)
    with pytest.raises(IndexError, match="index holds 5"):
        indexed(op, torch.full((3, 2), 5), impl)
    monkeypatch.setenv("MVP_KERNELS_DEBUG", "0")
    indexed(op, twice_BM, impl)


@DEVICES
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_index_out_of_range_past_the_host(device: str, dtype: torch.dtype) -> None:
    """A row of NaN, no gradient from it, no other row touched; 2^40 tokens away there is no memory to read."""
    wrong = [-2, -(1 << 40), 5, 6, 1 << 31, 1 << 32, (1 << 32) + 3, 1 << 40]
    around = torch.randn(5, 5, 8, device=device).to(dtype)
    x_BND = around[1:-1].requires_grad_()
    index_BM = torch.tensor([[0, bad, 2] for bad in wrong[:3]], device=device)
    for start in range(0, len(wrong), 3):
        for image, bad in enumerate(wrong[start : start + 3]):
            index_BM[image, 1] = bad
        out_BMD = gather_operators.masked_gather(x_BND, index_BM)
        assert_same([out_BMD[:, 0], out_BMD[:, 2]], [x_BND[:, 0], x_BND[:, 2]])
        assert out_BMD[:, 1].isnan().all()
        upstream_BMD = torch.randn_like(out_BMD)
        (grad_BND,) = torch.autograd.grad(out_BMD, x_BND, upstream_BMD)
        want_BND = torch.zeros_like(x_BND)
        want_BND[:, 0], want_BND[:, 2] = upstream_BMD[:, 0], upstream_BMD[:, 2]
        assert_same([grad_BND], [want_BND])


@DEVICES
def test_a_repeated_token_gets_the_last_gradient(device: str) -> None:
    """As documented: a row takes a token at most once, and Triton adds nothing up."""
    x_BND = torch.randn(1, 3, 4, device=device, requires_grad=True)
    out_BMD = mvp_kernels.masked_gather(x_BND, torch.tensor([[1, 2, 1]], device=device), impl="triton")
    upstream_BMD = torch.randn_like(out_BMD)
    (grad_BND,) = torch.autograd.grad(out_BMD, x_BND, upstream_BMD)
    assert_same(
        [grad_BND[0]], [torch.stack([torch.zeros_like(upstream_BMD[0, 0]), upstream_BMD[0, 2], upstream_BMD[0, 1]])]
    )


@DEVICES
@IMPLS
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_patchify_takes_views(device: str, impl: str, layout: str) -> None:
    """Crops, permuted and strided images, and one image many times."""
    normalizations = [Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), Normalization((0.0,) * 3, (1.0,) * 3)]
    whole_BHWC = torch.randint(0, 256, (2, 20, 26, 3), dtype=torch.uint8, device=device)
    views_BHWC = [
        whole_BHWC[:, 1:17, 3:19],
        whole_BHWC[:, :16, ::2][:, :, :8],
        whole_BHWC.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)[:, :8, :8],
        whole_BHWC[:1, :8, :8].expand(5, -1, -1, -1),
        whole_BHWC[:, :8, :8, :1].expand(-1, -1, -1, 3),
        whole_BHWC[:0, :8, :8],
        whole_BHWC[:, :0, :8],
    ]
    for view_BHWC in views_BHWC:
        images = view_BHWC if layout == "NHWC" else view_BHWC.permute(0, 3, 1, 2)
        assert not images.numel() or not images.is_contiguous()
        outs = mvp_kernels.patchify(images, 4, normalizations, layout, impl=impl)
        assert_same(outs, mvp_kernels.patchify(images.contiguous(), 4, normalizations, layout, impl=impl))
        batch, height, width, _ = view_BHWC.shape
        assert outs[1].shape == (batch, height // 4 * (width // 4), 48)
        if outs[1].numel():  # the first patch's first row of the last colour
            first_BW = outs[1][:, 0].unflatten(1, (3, 4, 4))[:, 2, 0]
            torch.testing.assert_close(first_BW, view_BHWC[:, 0, :4, 2].float() / 255)
    assert mvp_kernels.patchify(whole_BHWC, 2, [], impl=impl) == []
    assert mvp_kernels.record() == {"patchify": impl}
