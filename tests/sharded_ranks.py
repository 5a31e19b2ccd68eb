"""A rank of those that test_sharding starts by torchrun: trains with DDP and sharded, and writes down both.

sharded_ranks.py INDEX OUT    writes OUT/rank0.pt and so on: tensors, numbers, strings
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvp_fast.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from mvp_fast.train.build import PretrainRun, build_run
from mvp_fast.train.distributed import Ranks, join_ranks
from mvp_fast.train.optim import clip_scale
from mvp_fast.train.sharding import gather, local_part, norm_of_shards

STEPS = 4
POISONED = 2  # the step in which the last rank's loss is infinite
CLIP = 0.05  # less than the gradient's norm, so that every update is clipped
BASE = Config(
    run=RunConfig(tensorboard=False),
    data=DataConfig(loader="torchvision", threads=1, image_size=64),
    mask=MaskConfig(patches=6, min_block=2),
    student=StudentConfig(width=60, depth=3, heads=2, drop_path=0.3),
    teacher=TeacherConfig(name="ViT-S-16", pretrained="random"),
    optim=OptimConfig(lr=1e-3, reference_batch_size=8, clip_grad=CLIP),
    train=TrainConfig(steps=STEPS, batch_size=8, device="cpu", ema_decay=0.5),
)
# A poisoned loss whose gradient is finite: that of smooth L1 of an infinite target.
SMOOTH = ObjectiveConfig(target_norm="none", loss="smooth_l1")
FP32 = replace(BASE.train, precision="fp32")
SUBSET = replace(BASE.student, drop_path_mode="subset")
CASES: dict[str, tuple[Config, bool]] = {
    "fp32": (replace(BASE, train=replace(BASE.train, precision="fp32", accumulate=2)), False),
    "bf16": (replace(BASE, train=replace(BASE.train, precision="bf16")), False),
    "poisoned": (replace(BASE, objective=SMOOTH, train=FP32), True),
    "recomputed": (replace(BASE, student=SUBSET, train=replace(FP32, recompute=True)), False),
    "compiled": (replace(BASE, student=SUBSET, train=replace(FP32, recompute=True, compile="blocks")), False),
}


class Exchanges(TorchDispatchMode):
    """Counts what the ranks exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors on this rank, with whole storages: a view of a larger tensor counts as that."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values())


def whole(run: PretrainRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in gather(run.student.state_dict(), keep=True).items()}


def infinite(module: Any, inputs: Any, features_BMD: Tensor) -> Tensor:
    return features_BMD + torch.inf


def trained(run: PretrainRun, poison: bool) -> dict[str, Any]:
    """Some steps of a run: each step's figures and exchanges, then all tensors, whole, and what memory they take."""
    found: dict[str, Any] = {name: [] for name in ("losses", "norms", "finite", "changed", "exchanges")}
    found["types"], found["compiled"] = {}, run.student.compiled

    def note(block: Any, *_: Any) -> None:
        assert not any(isinstance(weight, DTensor) for weight in block.parameters())
        found["types"] |= {name: str(weight.dtype) for name, weight in block.named_parameters()}

    # After the hook that gathers the weights, which puts itself first.
    handle = run.student.blocks[1].register_forward_pre_hook(note)
    loader = run.build_loader(None)
    for number, batch in enumerate(islice(loader.batches(run.plan, 0), STEPS)):
        before = whole(run)
        last_rank = run.ranks.rank == run.ranks.world - 1
        spoilt = run.teacher.register_forward_hook(infinite) if poison and number == POISONED and last_rank else None
        with Exchanges() as exchanges:
            result = run.step(batch)
        if spoilt is not None:
            spoilt.remove()
        after = whole(run)
        found["losses"].append(float(result.loss))
        found["norms"].append(float(result.grad_norm))
        found["finite"].append(bool(result.finite))
        found["changed"].append([name for name in after if not torch.equal(before[name], after[name])])
        found["exchanges"].append(dict(exchanges.counts))
        if number == 0:
            gradients = {name: weight.grad for name, weight in run.student.named_parameters()}
            found["gradients"] = {name: tensor.clone() for name, tensor in gather(gradients, keep=True).items()}
            found["first"] = after
        run.ema.update(run.student, step=number + 1)
    handle.remove()
    loader.close()
    found["held"] = {
        "student": held(run.student.parameters()),
        "ema": held(run.ema.module.parameters()),
        "optimizer": held(value for state in run.optimizer.state.values() for value in state.values()),
        "buffers": held(run.student.buffers()),
    }
    found["parts"] = run.checkpoint_parts()
    if run.step.sharded:
        bf16 = run.config.train.precision == "bf16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found["encoded"] = run.student.encode(run.student.patches(batch.images_BHWC))
        found["images"] = batch.images_BHWC
    return found


def clipped(ranks: Ranks) -> list[dict[str, Any]]:
    """The norm of gradients of which each rank has a part, and the parts divided by what clipping makes of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.world,))
    results = []
    for limit, poison in ((0.5, 0.0), (1e6, 0.0), (0.0, 0.0), (0.5, torch.inf), (0.5, torch.nan)):
        generator = torch.Generator().manual_seed(3)
        tensors = [torch.randn(shape, generator=generator) for shape in ((7, 5), (1, 1, 6), (4,))]
        tensors[1][0, 0, 0] += poison  # on the first rank alone: the dimension that is split has one row
        parts = [distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) for tensor in tensors]
        norm = norm_of_shards(parts)
        scale = clip_scale(norm, limit)
        if scale is not None:
            torch._foreach_div_([local_part(part) for part in parts], scale)
        results.append(
            {"limit": limit, "before": tensors, "norm": norm, "after": [part.full_tensor() for part in parts]}
        )
    return results


def main(index: str, out: Path) -> None:
    with join_ranks(BASE.train) as ranks:
        found: dict[str, Any] = {"clipped": clipped(ranks)}
        for name, (config, poison) in CASES.items():
            config = replace(config, data=replace(config.data, index=index))
            for sharding in ("none", "full"):
                train = replace(config.train, sharding=sharding)
                found[f"{name}.{sharding}"] = trained(build_run(replace(config, train=train), ranks, None), poison)
        torch.save(found, out / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
