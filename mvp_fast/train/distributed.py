"""Ranks: set-up from torchrun's environment, agreement between hosts, means over ranks.

Hosts agree over gloo on the CPU, so that an agreement never waits for a GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvp_fast.config.schema import TrainConfig
from mvp_fast.errors import EnvironmentProblem


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    """Reduce `tensor` in place over all ranks; on the CPU, return only when nobody else holds it any more.

    Gloo's thread lets go of a tensor a moment after the reduction, and needs the interpreter's lock for that. The main
    thread has that lock when it frees the process group, and there it waits for gloo's thread: a process whose last act
    is a reduction would hang at its end now and then.
    """
    holders = sys.getrefcount(tensor)
    dist.all_reduce(tensor, op=operation)
    give_up = time.monotonic() + 1
    while tensor.device.type == "cpu" and sys.getrefcount(tensor) > holders and time.monotonic() < give_up:
        time.sleep(0)  # gives the lock away


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, their number, those on this machine, and its device."""

    rank: int
    world: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """This rank's device, for people."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def agree(self, value: int) -> int:
        """The greatest `value` over all ranks; every rank gets the same answer."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        total = tensor.clone()
        if self.world > 1:
            all_reduce(total, dist.ReduceOp.SUM)
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree(0)

    def shares(self, train: TrainConfig) -> bool:
        """Whether the ranks hold a part of the student each; one rank has nobody to share with."""
        return train.sharding == "full" and self.world > 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call: `model`, in DistributedDataParallel where there are several ranks."""
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def choose_device(train: TrainConfig, local_rank: int = 0) -> torch.device:
    """The device that train.device asks for.

    Raises:
        EnvironmentProblem: a GPU was asked for and there is none for this rank.
    """
    gpus = torch.cuda.device_count()
    if train.device == "cpu" or (train.device == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise EnvironmentProblem(
            f"Rank {local_rank} of this machine has no GPU: torch sees {gpus}",
            where="train.device",
            fix="Start at most one rank a GPU, check the driver with nvidia-smi, or set train.device to cpu",
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join_ranks(train: TrainConfig) -> Iterator[Ranks]:
    """Join the ranks that torchrun started (one where it did not), and leave them at the end."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(train, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # Tensors on the host travel over gloo, those on the GPU over NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, local_world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
