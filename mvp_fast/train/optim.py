"""Optimizer, learning rate schedule and the update that skips itself on the device.

Everything here is a pure function of the configuration and the step, so that resuming needs no scheduler state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvp_fast.config.schema import OptimConfig
from mvp_fast.errors import ConfigError
from mvp_fast.train import apex
from mvp_fast.train.sharding import local_part, shard_like


def learning_rate(step: int, total_steps: int, optim: OptimConfig, batch_size: int) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then half a cosine or a line to `min_lr`.

    The cosine ends at `min_lr` with the last step, the line (poly, power 1) one step later, so that where `min_lr` is 0
    the last step still moves the weights. The peak is `optim.lr` scaled linearly by batch_size / reference_batch_size
    (Goyal et al., arXiv 1706.02677).
    """
    peak = optim.lr * batch_size / optim.reference_batch_size
    floor = min(optim.min_lr, peak)
    warmup = round(total_steps * optim.warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "poly":
        return floor + (peak - floor) * max(1.0 - (step - warmup) / max(total_steps - warmup, 1), 0.0)
    progress = min((step - warmup) / max(total_steps - warmup - 1, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, optim: OptimConfig, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """An optimizer from timm's factory; torch's fused implementation where it has one.

    Biases, norms, layer scales and everything in `model.no_weight_decay()` have no weight decay. None clips by itself.

    Args:
        model: whose parameters it updates.
        optim: kind and settings.
        layer_decay: factor of the learning rate from each layer of timm's `model.group_matcher()` to the one before it
            (BEiT, arXiv 2106.08254): it becomes the groups' `lr_scale`.

    Raises:
        ConfigError: timm knows no optimizer of that name, or it takes no such setting.
        EnvironmentProblem: it is one of NVIDIA apex's, and that is not installed, or the model is not on a GPU.
    """
    import timm.optim

    name = optim.name.lower()
    if name not in timm.optim.list_optimizers():
        import difflib

        near = difflib.get_close_matches(name, timm.optim.list_optimizers(), n=1)
        hint = f"Did you mean `{near[0]}`?" if near else "timm.optim.list_optimizers() has the names"
        raise ConfigError(f"There is no optimizer `{optim.name}`", where="optim.name", fix=hint)
    settings: dict[str, object] = {"lr": optim.lr, "weight_decay": optim.weight_decay, "eps": optim.eps}
    settings["betas"] = optim.betas
    if layer_decay != 1:
        settings["layer_decay"] = layer_decay
    kind = timm.optim.get_optimizer_info(name).opt_class
    if name in FUSED:
        settings["fused"] = True
    elif isinstance(kind, str) and kind.startswith("apex."):
        settings |= apex.settings_of(kind, optim.name, next(model.parameters()).device)
    elif kind is timm.optim.Lamb:
        settings["max_grad_norm"] = None  # its own default would clip a second time, at 1
    try:
        # timm groups by weight decay only where there is some; one group without it trains the same.
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(model, opt=name, **settings)
        apex.prepare(optimizer)
        return optimizer
    except (TypeError, ValueError, IndexError, AssertionError, ImportError) as error:
        # Each optimizer has its own way to refuse: a package or GPU it lacks, or betas of another number.
        raise ConfigError(
            f"The optimizer `{optim.name}` can't be built here: {error}",
            where="optim.name",
            fix="Choose one that needs nothing else and takes two betas, such as adamw, nadamw, lamb or lion",
        ) from error


# torch's fused implementations take `found_inf` (they skip the whole update where it is 1, without a host sync) and
# `grad_scale` (they divide the gradients by it in the pass that they make anyway).
FUSED = frozenset({"adamw", "adam"})


def clip_scale(grad_norm: Tensor, limit: float) -> Tensor | None:
    """By what the gradients must be divided so that their norm is at most `limit`: float32 (), 1 or more.

    None where `limit` is 0, for no clipping. The host reads nothing.
    """
    if limit <= 0:
        return None
    return ((grad_norm + 1e-6) / limit).clamp(min=1.0).to(torch.float32)  # 1e-6: as torch's clip_grad_norm_ has it


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give the gradients back, as `zero_grad(set_to_none=True)` does; apex's optimizers do not take that argument."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def apply_update(optimizer: torch.optim.Optimizer, finite: Tensor, grad_scale: Tensor | None = None) -> None:
    """Take an optimizer step where `finite` holds; otherwise change neither weights nor state.

    torch's fused optimizers and apex's FusedAdam decide on the device, and divide the gradients in their own pass.
    With others the host waits for `finite` here, and clipping is a pass of its own.

    Args:
        finite: bool ().
        grad_scale: from `clip_scale`; the gradients are divided by it first, and are so when this returns.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).to(torch.float32).reshape(())  # type: ignore[attr-defined]
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.step()
    elif apex.decides_on_device(optimizer):
        apex.update(optimizer, finite, grad_scale)
    elif bool(finite):
        if grad_scale is not None:
            held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_([local_part(gradient) for gradient in held], grad_scale)
        optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every group; groups with an `lr_scale` (layer decay) keep their share."""
    for group in optimizer.param_groups:
        rate = value * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # apex's FusedAdam reads it on the device
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<state>.<parameter>`, and `group_*.<number>` for groups' counters.

    Args:
        names: the name of each parameter.

    Returns:
        The tensors; this rank's parts of those that are spread over the ranks as the parameters are.
    """
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}.{names[parameter]}"] = torch.as_tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        if "step" in group:  # some of timm's optimizers count in the group, as a tensor or as a number
            kind = "group_tensor" if isinstance(group["step"], Tensor) else "group_number"
            tensors[f"{kind}.{number}"] = torch.as_tensor(group["step"])
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned, whole; scalars that were Python numbers come back as such."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, parameter = name.partition(".")
        if key in ("group_tensor", "group_number"):
            group = optimizer.param_groups[int(parameter)]
            if isinstance(group.get("step"), Tensor):  # it counts on the device from the start
                group["step"].copy_(tensor.reshape(group["step"].shape))
            else:
                group["step"] = tensor.clone() if key == "group_tensor" else tensor.item()
        else:
            by_parameter.setdefault(parameter, {})[key] = tensor
    fused = bool(optimizer.defaults.get("fused"))
    for parameter, name in ((p, names[p]) for group in optimizer.param_groups for p in group["params"]):
        state = {}
        for key, tensor in by_parameter.get(name, {}).items():
            # torch keeps `step` on the host unless the update is fused, where it lies beside the weights
            stays = key == "step" and not fused
            tensor = tensor.to("cpu" if stays else parameter.device, copy=True)
            state[key] = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        if state:
            optimizer.state[parameter] = state
