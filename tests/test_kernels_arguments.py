"""What the operations refuse, in which words, whichever implementation is asked for.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mvp_kernels as k
from mvp_kernels import Normalization
from tests.kernel_cases import CPU_IMPLS, surroundings

__all__ = ["surroundings"]

X_BND, INDEX_BM = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int64)
IMAGES_BHWC = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
GREY = Normalization((0.5,) * 3, (0.5,) * 3)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[str], Any]]] = {
    "gather whole numbers": (
        TypeError,
        "tokens must be of a floating type, is torch.int64",
        lambda i: k.masked_gather(X_BND.long(), INDEX_BM, impl=i),
    ),
    "gather by int32": (
        TypeError,
        "index must be int64, is torch.int32",
        lambda i: k.masked_gather(X_BND, INDEX_BM.int(), impl=i),
    ),
    "gather of another batch": (
        ValueError,
        "want tokens (B, N, D) and index (B, M), got (2, 5, 4) and (1, 3)",
        lambda i: k.masked_gather(X_BND, INDEX_BM[:1], impl=i),
    ),
    "gather out of range": (
        IndexError,
        "index holds 5; the range is -1 (padding) to 4",
        lambda i: k.masked_gather(X_BND, INDEX_BM + 5, impl=i),
    ),
    "norm of another kind": (
        ValueError,
        "kind is 'batch', not one of l2, layernorm, none",
        lambda i: k.token_norm(X_BND, "batch", impl=i),
    ),
    "norm of a number": (
        ValueError,
        "want tokens (..., D), got a single number",
        lambda i: k.token_norm(X_BND[0, 0, 0], impl=i),
    ),
    "norm of bytes": (
        TypeError,
        "x must be of a floating type, is torch.uint8",
        lambda i: k.token_norm(IMAGES_BHWC, impl=i),
    ),
    "cosine of other shapes": (
        ValueError,
        "prediction and target differ in shape: (2, 5, 4) and (2, 5, 3)",
        lambda i: k.cosine_loss(X_BND, X_BND[..., :3], impl=i),
    ),
    "cosine of complex numbers": (
        TypeError,
        "target must be of a floating type, is torch.complex64",
        lambda i: k.cosine_loss(X_BND, X_BND + 0j, impl=i),
    ),
    "weights of another shape": (
        ValueError,
        "want a weight for each token, got (2, 5, 4) and (5,)",
        lambda i: k.cosine_loss(X_BND, X_BND, X_BND[0, :, 0], impl=i),
    ),
    "weights that want a gradient": (
        ValueError,
        "weights are constants: detach them",
        lambda i: k.cosine_loss(X_BND, X_BND, X_BND[..., 0].clone().requires_grad_(), impl=i),
    ),
    "another reduction": (
        ValueError,
        "reduction is 'sum', not one of mean, none",
        lambda i: k.cosine_loss(X_BND, X_BND, reduction="sum", impl=i),
    ),
    "guided by another kind": (
        ValueError,
        "kind is 'batch', not one of l2, layernorm, none",
        lambda i: k.guided_loss(X_BND, X_BND, kind="batch", impl=i),
    ),
    "guided by another reduction": (
        ValueError,
        "reduction is 'sum', not one of mean, none",
        lambda i: k.guided_loss(X_BND, X_BND, reduction="sum", impl=i),
    ),
    "predictions of another number": (
        ValueError,
        "want predictions (2, 3, 4) or (6, 4), got (2, 5, 4)",
        lambda i: k.guided_loss(X_BND, X_BND, INDEX_BM, impl=i),
    ),
    "flat targets": (
        ValueError,
        "want targets (B, M, D) where there is no index, got (10, 4)",
        lambda i: k.guided_loss(X_BND, X_BND.flatten(0, 1), impl=i),
    ),
    "float images": (
        TypeError,
        "images must be uint8, are torch.float32",
        lambda i: k.patchify(IMAGES_BHWC.float(), 4, [GREY], impl=i),
    ),
    "one image": (
        ValueError,
        "want a batch of images, NHWC, got (8, 8, 3)",
        lambda i: k.patchify(IMAGES_BHWC[0], 4, [GREY], impl=i),
    ),
    "a patch that does not fit": (
        ValueError,
        "8 x 8 pixels can't be cut into patches of 3 x 3",
        lambda i: k.patchify(IMAGES_BHWC, 3, [GREY], impl=i),
    ),
    "a patch of nothing": (
        ValueError,
        "8 x 8 pixels can't be cut into patches of 0 x 0",
        lambda i: k.patchify(IMAGES_BHWC, 0, [GREY], impl=i),
    ),
    "the other layout": (
        ValueError,
        "images of 8 colours (NCHW (1, 8, 8, 3)) want as many means and stds, got 3 and 3",
        lambda i: k.patchify(IMAGES_BHWC, 1, [GREY], "NCHW", impl=i),
    ),
    "too few statistics": (
        ValueError,
        "images of 3 colours (NHWC (1, 8, 8, 3)) want as many means and stds, got 3 and 2",
        lambda i: k.patchify(IMAGES_BHWC, 4, [GREY, Normalization((0.5,) * 3, (0.5,) * 2)], impl=i),
    ),
    "patches of bytes": (
        TypeError,
        "patches must be of a floating type, not torch.uint8",
        lambda i: k.patchify(IMAGES_BHWC, 4, [GREY._replace(dtype=torch.uint8)], impl=i),
    ),
    "no such layout": (
        ValueError,
        "layout is 'HWC', not one of NHWC, NCHW",
        lambda i: k.patchify(IMAGES_BHWC, 4, [GREY], "HWC", impl=i),
    ),
}


@CPU_IMPLS
@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_do_not_fit(impl: str, what: str) -> None:
    error, message, run = REFUSED[what]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run(impl)
    assert k.record() == {}
