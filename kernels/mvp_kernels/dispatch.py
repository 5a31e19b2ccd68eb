"""The operations as they are called; each runs the implementation that `impl` asks for (see `mvp_kernels.registry`).

All compute in float32 whatever the input's type, and in float64 for float64 input.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours,
P = C * patch * patch; in attention H heads, M queries, N keys, D channels of a head, R rows of the table.
M of a name such as pred_MD stands for any number of leading dimensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mvp_kernels import arguments, reference
from mvp_kernels.arguments import EPS, Normalization
from mvp_kernels.availability import triton_is_automatic, triton_obstacle
from mvp_kernels.registry import KernelUnavailable, last_used, record, register, reset_record, resolve, run

__all__ = [
    "KernelUnavailable",
    "Normalization",
    "cosine_loss",
    "guided_loss",
    "last_used",
    "masked_gather",
    "patchify",
    "record",
    "relpos_attention",
    "relpos_attention_qkv",
    "relpos_bias",
    "reset_record",
    "resolve",
    "token_norm",
]


def _from(module: str, op: str) -> Callable[[], Callable[..., Any]]:
    """Imports the module when the operation is first chosen."""

    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), op)
        return function

    return load


_MODULES = {  # of mvp_kernels.operators, by operation
    **{op: op for op in ("masked_gather", "token_norm", "cosine_loss", "guided_loss", "patchify")},
    **{
        "relpos_bias": "relpos_bias",
        "relpos_attention": "relpos_attention",
        "relpos_attention_qkv": "relpos_attention",
    },
}
for _op, _module in _MODULES.items():
    register(_op, "reference", _from(reference.__name__, _op))
    register(_op, "triton", _from(f"mvp_kernels.operators.{_module}", _op), triton_obstacle, triton_is_automatic)


def masked_gather(x_BND: Tensor, index_BM: Tensor, *, impl: str = "auto") -> Tensor:
    """Take tokens by index: `out[b, m] = x_BND[b, index_BM[b, m]]`.

    Args:
        x_BND: tokens, any floating type.
        index_BM: int64 in [-1, N); -1 pads a row that takes fewer tokens, and yields zeros without a gradient. A row
            takes a token at most once: where it does not, Triton's gradient is that of the last time alone.

    Returns:
        (B, M, D) of x_BND's type.

    Raises:
        IndexError: an index is out of range; on the CPU. On a GPU the host does not look: Triton then yields a row of
            NaN, the reference trips torch's device-side assertion or takes what is below -1 for padding. With
            MVP_KERNELS_DEBUG=1 the device asserts range and distinctness, and still the host does not wait.
        TypeError, ValueError: types or shapes don't fit.
    """
    arguments.check_floats(tokens=x_BND)
    arguments.check_index(x_BND, index_BM)
    out: Tensor = run("masked_gather", impl, x_BND.device, x_BND, index_BM)
    return out


def token_norm(x_MD: Tensor, kind: str = "l2", eps: float = EPS, *, impl: str = "auto") -> Tensor:
    """Normalise each token over its channels.

    Args:
        x_MD: tokens (..., D).
        kind: `l2` divides by the Euclidean length, `layernorm` subtracts the mean and divides by the standard
            deviation without an affine part (as in Feature Distillation, arXiv 2205.14141), `none` leaves all as is.
        eps: least length (l2), or what is added to the variance (layernorm).

    Returns:
        x_MD's shape and type.
    """
    arguments.check_norm(x_MD, kind)
    out: Tensor = run("token_norm", impl, x_MD.device, x_MD, kind, eps)
    return out


def cosine_loss(
    pred_MD: Tensor,
    target_MD: Tensor,
    weight_M: Tensor | None = None,
    reduction: str = "mean",
    eps: float = EPS,
    *,
    upstream: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """1 - cos(prediction, target) of each token, and their mean.

    A length below `eps` counts as `eps`: a token of zeros has loss 1 and a finite gradient. Squares must stay within
    float32: values up to about 1e18.

    Args:
        pred_MD, target_MD: tokens (..., D).
        weight_M: weight of each token (...), a constant; the mean is then weighted, and a token of weight 0 takes no
            part.
        reduction: `mean`, or `none` for the (weighted) loss of each token.
        eps: least length of a token.
        upstream: the gradient that backward() is expected to bring for the result, such as 1 / accumulation steps.
            Triton prepares the gradient for it in the forward pass. Another one is right too: the gradient is then
            computed again.

    Returns:
        float32 (float64 for float64 input): () or (...). The mean over no token, or no weight, is 0.
    """
    arguments.check_cosine(pred_MD, target_MD, weight_M, reduction)
    out: Tensor = run("cosine_loss", impl, pred_MD.device, pred_MD, target_MD, weight_M, reduction, eps, upstream)
    return out


def guided_loss(
    pred_BMD: Tensor,
    target_BND: Tensor,
    index_BM: Tensor | None = None,
    kind: str = "l2",
    reduction: str = "mean",
    eps: float = EPS,
    *,
    upstream: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """masked_gather of the targets, token_norm of them, cosine_loss against the predictions: the loss of MVP.

    Args:
        pred_BMD: predictions, (B, M, D) or (B * M, D).
        target_BND: target features of all tokens; where `index_BM` is None, (B, M, D) of the tokens in the loss.
        index_BM: int64 token of each prediction, -1 for padding, which takes no part in the mean.
        kind, eps: as in `token_norm`; l2 and none give the same loss, for the cosine does not see a token's length.
        reduction: `mean`, or `none` for (B, M).
        upstream: as in `cosine_loss`.

    Returns:
        float32 (float64 for float64 input): () or (B, M).
    """
    pred_BMD = arguments.check_guided(pred_BMD, target_BND, index_BM, kind, reduction)
    given = (pred_BMD, target_BND, index_BM, kind, reduction, eps, upstream)
    out: Tensor = run("guided_loss", impl, pred_BMD.device, *given)
    return out


def patchify(
    images: Tensor, patch: int, normalizations: Sequence[Normalization], layout: str = "NHWC", *, impl: str = "auto"
) -> list[Tensor]:
    """Normalise colours, (x / 255 - mean) / std, and cut images into patches: one result for each normalisation.

    Args:
        images: uint8, (B, H, W, C), or (B, C, H, W) with layout NCHW; any strides.
        patch: side of a patch; divides H and W.
        normalizations: colour statistics and the result's type, a model each. The images are read once for two.
        layout: of `images`.

    Returns:
        patches_BNP for each of `normalizations`: N row-major over the grid, P ordered (colour, row, column), so that
        the weight of a convolutional patch embedding multiplies it as `weight.flatten(1)`.
    """
    normalizations = [Normalization(tuple(mean), tuple(std), dtype) for mean, std, dtype in normalizations]
    images_BHWC = arguments.check_images(images, patch, normalizations, layout)
    out: list[Tensor] = run("patchify", impl, images.device, images_BHWC, patch, normalizations)
    return out


def relpos_bias(table_RH: Tensor, index_NN: Tensor, *, impl: str = "auto") -> Tensor:
    """Spread a table of relative position biases out: `out[h, n, m] = table_RH[index_NN[n, m], h]`.

    For attention in several layers that share a table: spread out once, it is shared by their batches too.

    Args:
        table_RH: a bias for each relative position and head (BEiT, arXiv 2106.08254), any floating type.
        index_NN: int64, int32 or int16 row of the table for each pair of tokens. A row that the table has not is NaN
            with Triton; with the reference an error, on a GPU of the device.

    Returns:
        (H, N, N) of the table's type; Triton's rows start at multiples of 16 values. Its gradient is summed in float32
        (float64 for float64) in a fixed order: two runs give the same bits.
    """
    arguments.check_relpos_bias(table_RH, index_NN)
    out: Tensor = run("relpos_bias", impl, table_RH.device, table_RH, index_NN)
    return out


def relpos_attention(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None = None,
    index_NN: Tensor | None = None,
    scale: float | None = None,
    query_index_BM: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + bias) v, for the short sequences of images; the softmax is exact.

    Without a bias it is plain attention. Triton never holds scores in memory, nor a bias for each image.

    Args:
        q_BHMD, k_BHND, v_BHND: any strides (channels side by side, or they are copied), one type; D is 1 to 128. A
            copy-free way from a projection, gradient included, is `relpos_attention_qkv`.
        bias: bias_HNN, or with `index_NN` the table_RH (see `relpos_bias`); of any floating type, and added as it is
            (the reference rounds it to the type of q first).
        scale: of q k^T; D ** -0.5 where it is None.
        query_index_BM: int64 token that each query is of, which is its row of the bias; -1 pads a ragged row: it gets
            zeros and gives no gradient. A row has a token at most once. Left out, M is N, query m that of token m.

    Returns:
        (B, H, M, D) of q's type; Triton's is laid out as (B, M, H, D), which the next projection takes without a copy.

    Raises:
        IndexError: as `masked_gather`, and Triton yields NaN as there.
        TypeError, ValueError: types or shapes don't fit.
    """
    arguments.check_attention(q_BHMD, k_BHND, v_BHND, bias, index_NN, query_index_BM)
    scale = q_BHMD.shape[-1] ** -0.5 if scale is None else scale
    given = (q_BHMD, k_BHND, v_BHND, bias, index_NN, scale, query_index_BM)
    out: Tensor = run("relpos_attention", impl, q_BHMD.device, *given)
    return out


def relpos_attention_qkv(
    qkv_BN3HD: Tensor,
    bias: Tensor | None = None,
    index_NN: Tensor | None = None,
    scale: float | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """`relpos_attention` between a projection and the next, without a copy on either side.

    Args:
        qkv_BN3HD: what the projection wrote, as a view: q, k and v of a token one after the other. With Triton its
            gradient is one tensor like it, where slices of it would have to be put together.
        bias, index_NN, scale: as in `relpos_attention`.

    Returns:
        (B, N, H, D).
    """
    arguments.check_attention_qkv(qkv_BN3HD, bias, index_NN)
    scale = qkv_BN3HD.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = run("relpos_attention_qkv", impl, qkv_BN3HD.device, qkv_BN3HD, bias, index_NN, scale)
    return out
