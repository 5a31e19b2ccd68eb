"""What the operations accept: shapes, types and ranges, checked before an implementation is chosen.

Nothing here makes the host wait for a GPU. Values on a GPU are looked at in debug mode alone (MVP_KERNELS_DEBUG=1), by
assertions that the device evaluates.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours; in attention
H heads, D channels of a head, R rows of the table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("l2", "layernorm", "none")
REDUCTIONS = ("mean", "none")
LAYOUTS = ("NHWC", "NCHW")
EPS = 1e-6
DEBUG = "MVP_KERNELS_DEBUG"
WIDEST_HEAD = 128  # channels of a head: a tile of more would not stay in registers
INDICES = (torch.int64, torch.int32, torch.int16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Normalization(NamedTuple):
    """How a model wants its colours: (x / 255 - mean) / std, as `dtype`.

    Attributes:
        mean, std: a number for each colour, of values in [0, 1].
        dtype: type of the result; the arithmetic is float32 (float64 for float64).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype = torch.float32


def debug() -> bool:
    """Whether values on a GPU are checked too."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def check_floats(**tensors: Tensor | None) -> None:
    """All given tensors are of a floating type that the operations compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be of a floating type, is {tensor.dtype}")


def check_index(x_BND: Tensor, index_BM: Tensor) -> None:
    """`index_BM` takes tokens of `x_BND`."""
    if x_BND.ndim != 3 or index_BM.ndim != 2 or x_BND.shape[0] != index_BM.shape[0]:
        raise ValueError(f"want tokens (B, N, D) and index (B, M), got {shapes(x_BND, index_BM)}")
    if index_BM.dtype != torch.int64:
        raise TypeError(f"index must be int64, is {index_BM.dtype}")
    if index_BM.device != x_BND.device:
        raise ValueError(f"index is on {index_BM.device}, the tokens are on {x_BND.device}")
    # A compiler can't trace the check, and a fake tensor has no values.
    if index_BM.numel() and not torch.compiler.is_compiling() and type(index_BM) is Tensor:
        _check_range(index_BM, x_BND.shape[1])


def _check_range(index_BM: Tensor, tokens: int) -> None:
    if index_BM.device.type == "cpu":
        low, high = int(index_BM.min()), int(index_BM.max())
        if low < -1 or high >= tokens:
            raise IndexError(f"index holds {low if low < -1 else high}; the range is -1 (padding) to {tokens - 1}")
    elif debug():
        torch._assert_async(((index_BM >= -1) & (index_BM < tokens)).all(), "mvp_kernels: an index is out of range")
    if debug():
        sorted_BM = index_BM.sort(dim=1).values
        repeated = (sorted_BM[:, 1:] == sorted_BM[:, :-1]) & (sorted_BM[:, 1:] >= 0)
        torch._assert_async(~repeated.any(), "mvp_kernels: a row of the index holds a token twice")


def check_norm(x_MD: Tensor, kind: str) -> None:
    """`kind` names a normalisation, and there is a dimension to normalise over."""
    check_floats(x=x_MD)
    if kind not in NORMS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(NORMS)}")
    if x_MD.ndim == 0:
        raise ValueError("want tokens (..., D), got a single number")


def check_cosine(pred_MD: Tensor, target_MD: Tensor, weight_M: Tensor | None, reduction: str) -> None:
    """Predictions, targets and weights belong together."""
    check_floats(prediction=pred_MD, target=target_MD)
    if pred_MD.shape != target_MD.shape or pred_MD.ndim == 0:
        raise ValueError(f"prediction and target differ in shape: {shapes(pred_MD, target_MD)}")
    if weight_M is not None and weight_M.shape != pred_MD.shape[:-1]:
        raise ValueError(f"want a weight for each token, got {shapes(pred_MD, weight_M)}")
    if weight_M is not None and weight_M.requires_grad:
        raise ValueError("weights are constants: detach them")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}")


def check_guided(pred: Tensor, target_BND: Tensor, index_BM: Tensor | None, kind: str, reduction: str) -> Tensor:
    """Everything fits; returns the predictions as (B, M, D)."""
    check_floats(prediction=pred, target=target_BND)
    if index_BM is not None:
        check_index(target_BND, index_BM)
        wanted = (*index_BM.shape, target_BND.shape[2])
    else:
        if target_BND.ndim != 3:
            raise ValueError(f"want targets (B, M, D) where there is no index, got {shapes(target_BND)}")
        wanted = tuple(target_BND.shape)
    flat = (wanted[0] * wanted[1], wanted[2])
    if tuple(pred.shape) not in (wanted, flat):
        raise ValueError(f"want predictions {wanted} or {flat}, got {shapes(pred)}")
    if kind not in NORMS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(NORMS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}")
    return pred.reshape(wanted)


def check_relpos_bias(table_RH: Tensor, index_NN: Tensor) -> None:
    """`index_NN` takes rows of `table_RH`."""
    check_floats(table=table_RH)
    if table_RH.ndim != 2 or index_NN.ndim != 2 or index_NN.shape[0] != index_NN.shape[1]:
        raise ValueError(f"want a table (R, H) and an index (N, N), got {shapes(table_RH, index_NN)}")
    if index_NN.dtype not in INDICES:
        raise TypeError(f"the table's index must be int64, int32 or int16, is {index_NN.dtype}")
    _same_device(table=table_RH, index=index_NN)


def check_attention(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None,
    index_NN: Tensor | None,
    query_index_BM: Tensor | None,
) -> None:
    """Queries, keys and values belong together, and the bias has a row for each query and a column for each key."""
    check_floats(q=q_BHMD, k=k_BHND, v=v_BHND)
    if not q_BHMD.dtype == k_BHND.dtype == v_BHND.dtype:
        raise TypeError(f"q, k and v differ in type: {q_BHMD.dtype}, {k_BHND.dtype}, {v_BHND.dtype}")
    images, heads, queries, width = q_BHMD.shape if q_BHMD.ndim == 4 else (0, 0, 0, 0)
    tokens = k_BHND.shape[2] if k_BHND.ndim == 4 else 0
    if q_BHMD.ndim != 4 or not k_BHND.shape == v_BHND.shape == (images, heads, tokens, width):
        raise ValueError(f"want q (B, H, M, D), k and v (B, H, N, D), got {shapes(q_BHMD, k_BHND, v_BHND)}")
    if not 1 <= width <= WIDEST_HEAD:
        raise ValueError(f"heads have 1 to {WIDEST_HEAD} channels here, not {width}")
    if tokens == 0:
        raise ValueError("attention to no key at all is undefined")
    _check_bias(q_BHMD, tokens, bias, index_NN)
    if query_index_BM is not None:
        if query_index_BM.shape != (images, queries):
            raise ValueError(f"want a token for each query, got {shapes(q_BHMD, query_index_BM)}")
        check_index(k_BHND[:, 0], query_index_BM)
    elif bias is not None and queries != tokens:
        raise ValueError(
            f"{queries} queries for {tokens} keys: query_index_BM must say which rows of the bias are theirs"
        )


def check_attention_qkv(qkv_BN3HD: Tensor, bias: Tensor | None, index_NN: Tensor | None) -> None:
    """The projection's output is three times as many heads, and the bias fits it."""
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(f"want qkv (B, N, 3, H, D), got {shapes(qkv_BN3HD)}")
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    check_attention(q, k, v, bias, index_NN, None)


def _check_bias(q_BHMD: Tensor, tokens: int, bias: Tensor | None, index_NN: Tensor | None) -> None:
    if bias is None:
        if index_NN is not None:
            raise ValueError("an index without a table: give the table (R, H) as the bias")
        return
    check_floats(bias=bias)
    _same_device(q=q_BHMD, bias=bias)
    heads = q_BHMD.shape[1]
    if index_NN is None:
        if bias.shape != (heads, tokens, tokens):
            raise ValueError(
                f"want a bias {(heads, tokens, tokens)}, or a table (R, H) with an index; got {shapes(bias)}"
            )
        return
    check_relpos_bias(bias, index_NN)
    if bias.shape[1] != heads or index_NN.shape[0] != tokens:
        raise ValueError(
            f"want a table (R, {heads}) and an index {(tokens, tokens)} for {heads} heads and {tokens} keys,"
            f" got {shapes(bias, index_NN)}"
        )


def _same_device(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors are on different devices: {where}")


def check_images(images: Tensor, patch: int, normalizations: Sequence[Normalization], layout: str) -> Tensor:
    """Everything fits; returns the images as a view (B, H, W, C)."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, not one of {', '.join(LAYOUTS)}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, are {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"want a batch of images, {layout}, got {shapes(images)}")
    images_BHWC = images if layout == "NHWC" else images.permute(0, 2, 3, 1)
    height, width, colours = images_BHWC.shape[1:]
    for mean, std, dtype in normalizations:
        if len(mean) != colours or len(std) != colours:
            raise ValueError(
                f"images of {colours} colours ({layout} {shapes(images)}) want as many means and stds,"
                f" got {len(mean)} and {len(std)}"
            )
        if dtype not in FLOATS:
            raise TypeError(f"patches must be of a floating type, not {dtype}")
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels can't be cut into patches of {patch} x {patch}")
    return images_BHWC


def shapes(*tensors: Tensor) -> str:
    """Shapes in words."""
    return " and ".join(str(tuple(t.shape)) for t in tensors)
