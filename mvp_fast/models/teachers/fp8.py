"""Linear layers of a frozen tower in FP8 (E4M3, arXiv 2209.05433): weights and tokens in eight bits, sums in float32.

Each output channel of a weight and each token has a scale of its own, by which its greatest magnitude is the greatest
number of the format. On a GPU of compute capability 8.9 or higher tensor cores multiply (torch._scaled_mm); elsewhere
the same numbers are multiplied in float32.

Shape legend: T tokens, K channels in, N channels out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.errors import ConfigError, EnvironmentProblem

GREATEST = torch.finfo(torch.float8_e4m3fn).max  # 448
MULTIPLE = 16  # of channels in and out, for the tensor cores
LEAST_SCALE = 1e-12  # of a token or a weight of zeros


class Fp8Linear(nn.Module):
    """`x @ weight.T + bias` in FP8, without a gradient; its result has x's type.

    Args:
        weight_NK, bias_N: as of nn.Linear.
    """

    values_NK: Tensor
    scale_N1: Tensor
    bias_N: Tensor | None

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        values_NK, scale_N1 = quantise(weight_NK.detach())
        self.register_buffer("values_NK", values_NK, persistent=False)
        self.register_buffer("scale_N1", scale_N1, persistent=False)
        self.register_buffer("bias_N", None if bias_N is None else bias_N.detach(), persistent=False)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The product; with `start` and `stop`, of those output channels alone.

        Args:
            x: (..., K), float16, bfloat16 or float32.
        """
        values_NK, scale_N1 = self.values_NK[start:stop], self.scale_N1[start:stop]
        x8_TK, scale_T1 = quantise(x.reshape(-1, x.shape[-1]))
        if x.device.type == "cuda":
            # With a scale a row it yields bfloat16 alone.
            product_TN = torch._scaled_mm(
                x8_TK, values_NK.t(), scale_T1, scale_N1.t().contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            product_TN = F.linear(x8_TK.float() * scale_T1, values_NK.float() * scale_N1)
        product_TN = product_TN.to(x.dtype)
        if self.bias_N is not None:
            product_TN = product_TN + self.bias_N[start:stop].to(x.dtype)
        product: Tensor = product_TN.unflatten(0, x.shape[:-1])
        return product


def project(linear: Any, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Some output channels of a linear layer, in FP8 or not."""
    if isinstance(linear, Fp8Linear):
        some: Tensor = linear(x, start, stop)
        return some
    return F.linear(x, linear.weight[start:stop], None if linear.bias is None else linear.bias[start:stop])


def quantise(rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (T, K) and a float32 scale (T, 1) for each row; their product is the rows, rounded."""
    rows_TK = rows_TK.float()
    scale_T1 = rows_TK.abs().amax(1, keepdim=True).clamp(min=LEAST_SCALE) / GREATEST
    return (rows_TK / scale_T1).to(torch.float8_e4m3fn), scale_T1


def quantise_linears(blocks: list[nn.Module]) -> int:
    """Put `Fp8Linear` in place of every linear layer of some blocks, open_clip's joint projection included.

    Returns:
        How many there were.

    Raises:
        ConfigError: a layer has channels that tensor cores don't take.
        EnvironmentProblem: the blocks are on a GPU that has no FP8.
    """
    device = next(blocks[0].parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise EnvironmentProblem(
            f"{torch.cuda.get_device_name(device)} has no FP8: that needs compute capability 8.9 or higher",
            where="teacher.fp8",
            fix="Leave it off on this GPU",
        )
    count = 0
    for block in blocks:
        for module in list(block.modules()):
            if isinstance(module, nn.MultiheadAttention):
                module.add_module("fp8_in", _checked(module.in_proj_weight, module.in_proj_bias))
                for name in ("in_proj_weight", "in_proj_bias"):
                    module.register_parameter(name, None)
                count += 1
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, _checked(child.weight, child.bias))
                    count += 1
    return count


def _checked(weight_NK: Any, bias_N: Any) -> Fp8Linear:
    if any(size % MULTIPLE for size in weight_NK.shape):
        raise ConfigError(
            f"A linear layer of the teacher has {weight_NK.shape[1]} channels in and {weight_NK.shape[0]} out, and FP8"
            f" takes multiples of {MULTIPLE}",
            where="teacher.fp8",
            fix="Leave it off with this teacher",
        )
    return Fp8Linear(weight_NK, bias_N)
