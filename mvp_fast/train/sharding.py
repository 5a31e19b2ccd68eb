"""A student spread over the ranks by torch's `fully_shard` (ZeRO stage 3, arXiv 1910.02054; PyTorch FSDP, 2304.11277).

Each rank keeps its part of every parameter, and so of every gradient and of the optimizer's state. What is computed is
what DistributedDataParallel computes:

- The matrices of a block are gathered when it is called, given back behind it, and gathered again for its backward
  pass. In bf16 they are rounded before they travel: to the very values that autocast would make of them. Their
  gradients are summed in float32.
- All else (vectors, tables, tokens, patch embedding, predictor: a few per cent) is gathered once a step, in float32,
  since the residual stream, the norms and the layer scale work in it.

A checkpoint holds whole tensors under the same names, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mvp_fast.errors import ConfigError
from mvp_fast.models.student import Student
from mvp_fast.train.distributed import Ranks, all_reduce

# Those that take each weight by itself, or measure a weight's norm over all ranks (lamb), as the tests know them.
OPTIMIZERS = ("adamw", "adam", "nadamw", "lion", "lamb")


def check_optimizer(name: str) -> None:
    """Only optimizers that are known to take the same step with parts of the weights as with all of them.

    Raises:
        ConfigError: the optimizer is not one of them.
    """
    if name.lower() not in OPTIMIZERS:
        raise ConfigError(
            f"The optimizer `{name}` may need whole weights, of which a rank has its part alone",
            where="train.sharding is full",
            fix=f"Choose {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}, or set train.sharding to none",
        )


def shard(student: Student, ranks: Ranks, *, bf16: bool) -> None:
    """Spread a student over all ranks, in place, and bring each rank's part onto its device.

    Every rank must call this with the same weights. The student must then be called as a module, or by `encode`.

    Args:
        student: whole; may be on the CPU, so that a device never holds more of it than its part and one block.
        bf16: the student is called under bf16 autocast, and only there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    matrices = {weight for block in student.blocks for weight in block.parameters() if weight.ndim >= 2}
    # The root first: what is left of a block is then known by being spread already.
    fully_shard(student, mesh=mesh, ignored_params=matrices)
    for number, block in enumerate(student.blocks, start=1):
        fully_shard(
            block,
            mesh=mesh,
            ignored_params={weight for weight in block.parameters() if isinstance(weight, DTensor)},
            mp_policy=narrow if bf16 else MixedPrecisionPolicy(),
            reshard_after_forward=number < len(student.blocks),  # the backward pass begins with the last
        )
    register_fsdp_forward_method(student, "encode")


def sync_gradients(student: nn.Module, *, last: bool) -> None:
    """Say before a micro-batch whether its backward pass is the last, in which gradients are summed over the ranks.

    Until then each rank holds its whole gradient.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(last)
    student.set_is_last_backward(last)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied to a module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def norm_of_shards(gradients: Sequence[Tensor]) -> Tensor:
    """What `get_total_norm` computes, of gradients of which each rank has its part.

    Returns:
        float32 (), the same on all ranks: NaN or infinite where any part is.
    """
    squared = nn.utils.get_total_norm([local_part(gradient) for gradient in gradients]).square()
    all_reduce(squared, dist.ReduceOp.SUM)
    return squared.sqrt()


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, spread as `like` is; as it is where `like` is whole."""
    if not isinstance(like, DTensor):
        return whole
    # No source rank: each takes its part of its own copy, nothing travels.
    return distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the host, one after the other, so that a device holds one of them at a time.

    Every rank must call this. Tensors that are not spread are passed on as they are.

    Args:
        keep: False on ranks that need none; they get an empty dictionary.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            with torch.no_grad():
                gathered = tensor.full_tensor()
            tensor = gathered.cpu()
        if keep:
            whole[name] = tensor
    return whole


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is spread; any other as it is."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local
