"""The operations as they are called; each runs the implementation that `impl` asks for (see `mvp_kernels.registry`).

All compute in float32 whatever the input's type, and in float64 for float64 input.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours,
P = C * patch * patch.
M of a name such as pred_MD stands for any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvp_kernels import reference
from mvp_kernels.registry import KernelUnavailable, last_used, record, register, reset_record, resolve, run

__all__ = [
    "KernelUnavailable",
    "cosine_loss",
    "guided_loss",
    "last_used",
    "masked_gather",
    "patchify",
    "record",
    "reset_record",
    "resolve",
    "token_norm",
]

for _op in ("masked_gather", "token_norm", "cosine_loss", "guided_loss", "patchify"):
    register(_op, "reference", getattr(reference, _op))


def masked_gather(x_BND: Tensor, index_BM: Tensor, *, impl: str = "auto") -> Tensor:
    """Take tokens by index: `out[b, m] = x_BND[b, index_BM[b, m]]`.

    Args:
        x_BND: tokens, any floating type.
        index_BM: int64 in [-1, N); -1 pads a row that takes fewer tokens, and yields zeros without a gradient.

    Returns:
        (B, M, D) of x_BND's type.

    Raises:
        IndexError: an index is out of range; on the CPU only. On a GPU one too great trips a device-side assertion,
            and every negative one is padding.
        TypeError, ValueError: index is not int64, or the shapes don't fit.
    """
    out: Tensor = run("masked_gather", impl, x_BND.device, x_BND, index_BM)
    return out


def token_norm(x_MD: Tensor, kind: str = "l2", eps: float = reference.EPS, *, impl: str = "auto") -> Tensor:
    """Normalise each token over its channels.

    Args:
        x_MD: tokens (..., D).
        kind: `l2` divides by the Euclidean length, `layernorm` subtracts the mean and divides by the standard
            deviation without an affine part (as in Feature Distillation, arXiv 2205.14141), `none` leaves all as is.
        eps: least length (l2), or what is added to the variance (layernorm).

    Returns:
        x_MD's shape and type.
    """
    out: Tensor = run("token_norm", impl, x_MD.device, x_MD, kind, eps)
    return out


def cosine_loss(
    pred_MD: Tensor,
    target_MD: Tensor,
    weight_M: Tensor | None = None,
    reduction: str = "mean",
    eps: float = reference.EPS,
    *,
    impl: str = "auto",
) -> Tensor:
    """1 - cos(prediction, target) of each token, and their mean.

    A length below `eps` counts as `eps`: a token of zeros has loss 1 and a finite gradient. Squares must stay within
    float32: values up to about 1e18.

    Args:
        pred_MD, target_MD: tokens (..., D).
        weight_M: weight of each token (...); the mean is then weighted, and a token of weight 0 takes no part.
        reduction: `mean`, or `none` for the (weighted) loss of each token.
        eps: least length of a token.

    Returns:
        float32 (float64 for float64 input): () or (...). The mean over no token, or no weight, is 0.
    """
    out: Tensor = run("cosine_loss", impl, pred_MD.device, pred_MD, target_MD, weight_M, reduction, eps)
    return out


def guided_loss(
    pred_BMD: Tensor,
    target_BND: Tensor,
    index_BM: Tensor | None = None,
    kind: str = "l2",
    reduction: str = "mean",
    eps: float = reference.EPS,
    *,
    impl: str = "auto",
) -> Tensor:
    """masked_gather of the targets, token_norm of them, cosine_loss against the predictions: the loss of MVP.

    Args:
        pred_BMD: predictions, (B, M, D) or (B * M, D).
        target_BND: target features of all tokens; where `index_BM` is None, (B, M, D) of the tokens in the loss.
        index_BM: int64 token of each prediction, -1 for padding, which takes no part in the mean.
        kind, eps: as in `token_norm`; l2 and none give the same loss, for the cosine does not see a token's length.
        reduction: `mean`, or `none` for (B, M).

    Returns:
        float32 (float64 for float64 input): () or (B, M).
    """
    out: Tensor = run("guided_loss", impl, pred_BMD.device, pred_BMD, target_BND, index_BM, kind, reduction, eps)
    return out


def patchify(
    images_BHWC: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:
    """Normalise colours, (x / 255 - mean) / std, and cut images into patches.

    Args:
        images_BHWC: uint8.
        patch: side of a patch; divides H and W.
        mean, std: a number for each colour, of values in [0, 1].
        dtype: type of the result; the arithmetic is float32 (float64 for float64).

    Returns:
        patches_BNP: N row-major over the grid, P ordered (colour, row, column), so that the weight of a convolutional
        patch embedding multiplies it as `weight.flatten(1)`.
    """
    out: Tensor = run("patchify", impl, images_BHWC.device, images_BHWC, patch, tuple(mean), tuple(std), dtype)
    return out
