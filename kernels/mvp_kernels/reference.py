"""Every operation as plain torch: obvious, differentiable, on any device. What the kernels are tested against.

Arithmetic is float32 whatever the input's type, and float64 where the input is float64 (so that gradcheck means
something). Nothing here reads a value back to the host. Arguments are checked before, in `mvp_kernels.arguments`.

Shape legend: B images, N tokens, M tokens taken, D channels of a token, H and W pixels, C colours,
P = C * patch * patch; in attention H heads, M queries, N keys, D channels of a head, R rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_kernels.arguments import EPS, Normalization


def masked_gather(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Rows `x_BND[b, index_BM[b, m]]`, zeros where the index is -1; see `mvp_kernels.masked_gather`."""
    if x_BND.shape[1] == 0:  # every index is padding
        return x_BND.new_zeros(*index_BM.shape, x_BND.shape[2])
    rows_BMD = x_BND.gather(1, index_BM.clamp_min(0)[..., None].expand(-1, -1, x_BND.shape[2]))
    return rows_BMD.masked_fill(index_BM[..., None] < 0, 0)


def token_norm(x_MD: Tensor, kind: str = "l2", eps: float = EPS) -> Tensor:
    """Normalise over the last dimension; see `mvp_kernels.token_norm`."""
    return _normalised(x_MD, kind, eps).to(x_MD.dtype)


def cosine_loss(
    pred_MD: Tensor,
    target_MD: Tensor,
    weight_M: Tensor | None = None,
    reduction: str = "mean",
    eps: float = EPS,
    upstream: float = 1.0,
) -> Tensor:
    """1 - cosine similarity; see `mvp_kernels.cosine_loss`. `upstream` is of no use to it."""
    pred, target = _wide(pred_MD), _wide(target_MD)
    if weight_M is not None:  # a token of weight 0 takes no part, whatever it holds
        left_out_M1 = (weight_M == 0)[..., None]
        pred, target = pred.masked_fill(left_out_M1, 0), target.masked_fill(left_out_M1, 0)
    dot_M = (pred * target).sum(-1)
    loss_M = 1 - dot_M / (_norm(pred, eps) * _norm(target, eps)).squeeze(-1)
    if weight_M is None:
        return loss_M if reduction == "none" else loss_M.sum() / max(loss_M.numel(), 1)
    weight_M = weight_M.to(loss_M.dtype)
    weighted_M = loss_M * weight_M
    if reduction == "none":
        return weighted_M
    total = weight_M.sum()
    return weighted_M.sum() / total.masked_fill(total == 0, 1)


def guided_loss(
    pred_BMD: Tensor,
    target_BND: Tensor,
    index_BM: Tensor | None = None,
    kind: str = "l2",
    reduction: str = "mean",
    eps: float = EPS,
    upstream: float = 1.0,
) -> Tensor:
    """Gather, normalise the targets, score the predictions; see `mvp_kernels.guided_loss`."""
    weight_BM = None
    if index_BM is not None:
        target_BND = masked_gather(target_BND, index_BM)
        weight_BM = index_BM >= 0
    return cosine_loss(pred_BMD, _normalised(target_BND, kind, eps), weight_BM, reduction, eps)


def patchify(images_BHWC: Tensor, patch: int, normalizations: Sequence[Normalization]) -> list[Tensor]:
    """Normalise colours and cut into patches, once for each normalisation; see `mvp_kernels.patchify`."""
    return [_patchify(images_BHWC, patch, normalization) for normalization in normalizations]


def relpos_bias(table_RH: Tensor, index_NN: Tensor) -> Tensor:
    """`table_RH[index_NN[n, m], h]`; see `mvp_kernels.relpos_bias`."""
    tokens = index_NN.shape[0]
    return table_RH[index_NN.reshape(-1).long()].reshape(tokens, tokens, -1).permute(2, 0, 1).contiguous()


def relpos_attention(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None,
    index_NN: Tensor | None,
    scale: float,
    query_index_BM: Tensor | None,
) -> Tensor:
    """torch's scaled_dot_product_attention; see `mvp_kernels.relpos_attention`.

    The bias is rounded to the type of q, k and v, which is what that takes.
    """
    if bias is not None and index_NN is not None:
        bias = relpos_bias(bias, index_NN)
    if bias is not None:
        bias = bias.to(q_BHMD.dtype)
        if query_index_BM is not None:
            bias = bias[:, query_index_BM.clamp_min(0)].transpose(0, 1)  # rows of its own for each image
    out_BHMD = F.scaled_dot_product_attention(q_BHMD, k_BHND, v_BHND, attn_mask=bias, scale=scale)
    if query_index_BM is None:
        return out_BHMD
    return out_BHMD.masked_fill((query_index_BM < 0)[:, None, :, None], 0)


def relpos_attention_qkv(qkv_BN3HD: Tensor, bias: Tensor | None, index_NN: Tensor | None, scale: float) -> Tensor:
    """The same of a projection's output; see `mvp_kernels.relpos_attention_qkv`."""
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    return relpos_attention(q, k, v, bias, index_NN, scale, None).transpose(1, 2)


def _patchify(images_BHWC: Tensor, patch: int, normalization: Normalization) -> Tensor:
    mean, std, dtype = normalization
    images, height, width, colours = images_BHWC.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # A colour at a time: mean and std stay numbers of the host, for a tensor of them would have to be copied over.
    x_BCHW = torch.stack([(images_BHWC[..., c].to(wide) / 255 - mean[c]) / std[c] for c in range(colours)], dim=1)
    rows, columns = height // patch, width // patch
    x_BCRpKq = x_BCHW.to(dtype).reshape(images, colours, rows, patch, columns, patch)
    # With patches of a pixel, reshape alone would be a view of other strides.
    return x_BCRpKq.permute(0, 2, 4, 1, 3, 5).reshape(images, rows * columns, colours * patch * patch).contiguous()


def _wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _norm(x: Tensor, eps: float) -> Tensor:
    """Euclidean length over the last dimension, at least `eps`; its gradient is 0 below that."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.clamp_min(eps)


def _normalised(x_MD: Tensor, kind: str, eps: float) -> Tensor:
    x_MD = _wide(x_MD)
    if kind == "none":
        return x_MD
    if kind == "l2":
        return x_MD / _norm(x_MD, eps)
    return F.layer_norm(x_MD, x_MD.shape[-1:], eps=eps)
