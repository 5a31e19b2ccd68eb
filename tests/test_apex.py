"""NVIDIA's apex: told from the other project of that name, asked for where it is not, and its optimizers' updates.

apex can be compiled only with CUDA's compiler. Where it is installed the tests marked gpu run its own optimizers. Its
FusedAdam's rules for counting, skipping and dividing are kept here by a stand-in in plain torch, so that what this
project adds to them is tested without a GPU as well.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import OptimConfig
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.train import apex
from mvp_fast.train.apex import Apex, ApexKind, find_apex
from mvp_fast.train.optim import (
    apply_update,
    build_optimizer,
    clear_gradients,
    clip_scale,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from tests.conftest import TINY, arguments, run_verb

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1, reference_batch_size=1)

OTHER = {"apex/__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig\n"}
NVIDIAS = {
    "apex/__init__.py": "from . import optimizers\n",
    "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam\nfrom .fused_lamb import FusedLAMB\n",
    "apex/optimizers/fused_adam.py": "class FusedAdam: pass\n",
    "apex/optimizers/fused_lamb.py": "class FusedLAMB: pass\n",
}
PACKAGES = {
    ApexKind.OTHER: OTHER,
    ApexKind.PYTHON_ONLY: NVIDIAS,
    ApexKind.COMPILED: {**NVIDIAS, "amp_C.py": ""},
    ApexKind.BROKEN: {**NVIDIAS, "amp_C.py": "raise ImportError('undefined symbol: _ZN3c10')\n"},
}


def write(folder: Path, files: dict[str, str]) -> Path:
    """Files by their path, in a folder for PYTHONPATH."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def found_with(folder: Path) -> dict[str, str]:
    """What `find_apex` finds in a process that has `folder` first on its path."""
    code = (
        "import json\nfrom mvp_fast.train.apex import describe, find_apex, remedy\nfound = find_apex()\n"
        "print(json.dumps([found.kind.name, found.reason, str(found.folder), describe(found), remedy(found)]))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=path_first(folder), timeout=300, check=True)
    keys = ("kind", "reason", "folder", "words", "remedy")
    return dict(zip(keys, json.loads(done.stdout.splitlines()[-1]), strict=True))


def path_first(folder: Path) -> dict[str, str]:
    """An environment in which Python looks there before anywhere else."""
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


# --- Which apex this is


@pytest.mark.parametrize("kind", PACKAGES, ids=lambda kind: kind.name)
def test_the_kinds_are_told_apart(tmp_path: Path, kind: ApexKind) -> None:
    found = found_with(write(tmp_path, PACKAGES[kind]))
    assert found["kind"] == kind.name
    assert found["folder"] == str(tmp_path / "apex")
    assert str(kind) in found["words"]
    assert str(tmp_path) in found["words"]
    assert ("undefined symbol" in found["reason"]) == (kind is ApexKind.BROKEN)
    assert ("pip uninstall apex" in found["remedy"]) == (kind is ApexKind.OTHER)
    assert "github.com/NVIDIA/apex" in found["remedy"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({**NVIDIAS, "amp_C.py": "raise SystemExit('no CUDA')"}, "no CUDA"),
        ({**NVIDIAS, "amp_C.py": "", "apex/optimizers/fused_lamb.py": "import not_there"}, "not_there"),
        ({**NVIDIAS, "amp_C.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass"}, "has no FusedLAMB"),
    ],
)
def test_one_that_does_not_load_is_broken_and_says_why(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    found = found_with(write(tmp_path, files))
    assert found["kind"] == "BROKEN"
    assert reason in found["reason"]
    assert reason in found["words"]


def test_a_plain_folder_of_that_name_is_no_apex(tmp_path: Path) -> None:
    """Such as the sources of NVIDIA's, cloned beside and not built."""
    write(tmp_path, {"apex/setup.py": "", "apex/apex/__init__.py": ""})
    code = (
        "import sys\nsys.path[:] = [sys.argv[1], *[p for p in sys.path if 'site-packages' not in p]]\n"
        "sys.path.append(sys.argv[2])\nfrom mvp_fast.train.apex import find_apex\nprint(find_apex().kind.name)"
    )
    repo = Path(__file__).resolve().parents[1]
    words = [sys.executable, "-S", "-c", code, str(tmp_path), str(repo)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "MISSING"


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert find_apex() == Apex(ApexKind.MISSING)


# --- Asked for where it can't be had


@pytest.mark.parametrize("name", ["fusedadamw", "fusedadam", "fusedlamb", "FusedSGD"])
def test_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(EnvironmentProblem) as raised:
        build_optimizer(nn.Linear(2, 2), OptimConfig(name=name))
    told = raised.value.paragraph()
    for words in (f"`{name}`", "NVIDIA's apex", "not installed", "another project", "adamw", apex.BUILD):
        assert words in told
    assert told.count("\n") == 0


def test_the_other_project_is_named_and_the_run_ends_with_4(tmp_path: Path) -> None:
    other = write(tmp_path / "path", OTHER)
    settings = {**TINY, "data.loader": "synthetic", "run.dir": tmp_path / "run", "optim.name": "fusedlamb"}
    done = run_verb("train", *arguments(settings), "--train.steps", 1, check=False, env={"PYTHONPATH": str(other)})
    assert done.returncode == 4
    assert "environment error: The optimizer `fusedlamb` needs NVIDIA's apex" in done.stderr
    assert "another project of that name" in done.stderr
    assert "pip uninstall apex" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_even_a_whole_apex_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "find_apex", lambda: Apex(ApexKind.COMPILED))
    with pytest.raises(EnvironmentProblem, match="runs on GPUs alone; this run's device is cpu"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name="fusedadamw"))


def test_one_whose_state_would_be_lost_is_refused() -> None:
    with pytest.raises(ConfigError, match="keeps a part of its state where checkpoints don't reach"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name="fusednovograd"))


# --- FusedAdam's update, by a stand-in that keeps its rules


class StandIn(torch.optim.Optimizer):
    """AdamW by FusedAdam's rules in its capturable form: the rate and the counter are tensors, one counter a group.

    A group counts its step first, unless the flag says 1 as it was left; then the scaler's answer is put into the flag;
    where that is 1, weights and moments stay. Gradients are multiplied by one over the scale, and written back.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": torch.tensor(0.0), "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.capturable = True
        for group in self.param_groups:
            group["lr"] = group["lr"].clone()
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("it does not take set_to_none")

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            device = group["params"][0].device
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int, device=device)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            factor = grad_scaler._get_scale_async().double().reciprocal().float()
            assert factor.shape == (1,)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if self._dummy_overflow_buf.item() == 1:
                    continue
                parameter.grad *= factor
                self._one(parameter, state, group)

    def _one(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (first, second), count = group["betas"], group["step"].item()
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        root = (state["exp_avg_sq"] / (1 - second**count)).sqrt() + group["eps"]
        update = state["exp_avg"] / (1 - first**count) / root + group["weight_decay"] * parameter
        parameter -= group["lr"] * update


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def grouped(model: nn.Sequential) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": weights, "weight_decay": 0.2},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def stand_in(model: nn.Sequential) -> StandIn:
    optimizer = StandIn(grouped(model), betas=(0.9, 0.98), eps=1e-8)
    apex.prepare(optimizer)
    return optimizer


POISONED = (0, 4, 5, 11)


def take_step(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """One step of a run; whether it was taken."""
    clear_gradients(optimizer)
    generator = torch.Generator().manual_seed(step)
    x_BD = torch.randn(16, 6, generator=generator).to(next(model.parameters()).device)
    (model(x_BD) - x_BD[:, :2]).square().mean().backward()
    if step in POISONED:
        model[0].bias.grad[0] = torch.nan
    set_learning_rate(optimizer, learning_rate(step, 20, OPTIM, 1) / 20)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    finite = torch.isfinite(norm)
    apply_update(optimizer, finite, clip_scale(norm, 0.5))
    return finite


def run(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        before = copy.deepcopy(model.state_dict())
        assert bool(take_step(model, optimizer, step)) == (step not in POISONED)
        moved = any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        assert moved == (step not in POISONED)


def names_of(model: nn.Sequential) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def check_against_plain(make: Callable[[nn.Sequential], torch.optim.Optimizer], device: str) -> None:
    """Twenty steps with skipped ones, the first among them, are plain AdamW's over those that were taken."""
    model, reference = make_model().to(device), make_model().to(device)
    optimizer, plain = make(model), torch.optim.AdamW(grouped(reference), betas=(0.9, 0.98), foreach=False)
    run(model, optimizer, range(20))
    run(reference, plain, range(20))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for group in optimizer.param_groups:
        assert int(group["step"]) == 20 - len(POISONED)


def check_round_trip(make: Callable[[nn.Sequential], torch.optim.Optimizer], device: str) -> None:
    """Stopped after a skipped step, which leaves the flag set, and gone on with: the same to the bit."""
    whole, first, second = (make_model().to(device) for _ in range(3))
    run(whole, make(whole), range(12))
    optimizer = make(first)
    run(first, optimizer, range(6))
    saved = {
        key: tensor.detach().cpu().clone() for key, tensor in optimizer_tensors(optimizer, names_of(first)).items()
    }
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    load_optimizer_tensors(resumed, names_of(second), saved)
    assert all(int(group.get("step", 3)) == 3 for group in resumed.param_groups)  # SGD does not count
    run(second, resumed, range(6, 12))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_updates_by_fusedadams_rules() -> None:
    check_against_plain(stand_in, "cpu")


def test_the_stand_in_counts_a_skipped_first_step_unless_prepared() -> None:
    """The reason for `prepare`: the counters would be one ahead for good."""
    model = make_model()
    unprepared = StandIn(grouped(model), betas=(0.9, 0.98), eps=1e-8)
    run(model, unprepared, range(3))
    assert [int(group["step"]) for group in unprepared.param_groups] != [2, 2]


def test_fusedadams_state_survives_a_checkpoint() -> None:
    check_round_trip(stand_in, "cpu")


def test_the_rate_stays_where_it_is_read() -> None:
    model = make_model()
    optimizer = stand_in(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == [0.25, 0.25]


def test_torchs_optimizers_are_not_taken_for_apexs() -> None:
    for name in ("adamw", "lamb", "nadamw", "sgd"):
        assert not apex.decides_on_device(build_optimizer(make_model(), OptimConfig(name=name)))
    assert apex.decides_on_device(stand_in(make_model()))


# --- NVIDIA's own, where it is compiled


def need_compiled() -> None:
    found = find_apex()
    if found.kind is not ApexKind.COMPILED:
        pytest.skip(f"apex is {apex.describe(found)}")


def from_factory(name: str) -> Callable[[nn.Sequential], torch.optim.Optimizer]:
    return lambda model: build_optimizer(model, OptimConfig(name=name, weight_decay=0.2))


@pytest.mark.gpu
def test_fusedadamw_is_plain_adamw() -> None:
    need_compiled()
    optimizer = from_factory("fusedadamw")(make_model().cuda())
    assert type(optimizer).__module__.startswith("apex.")
    check_against_plain(from_factory("fusedadamw"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fusedadamw", "fusedadam", "fusedlamb", "fusedsgd"])
def test_their_state_survives_a_checkpoint(name: str) -> None:
    need_compiled()
    check_round_trip(from_factory(name), "cuda")


@pytest.mark.gpu
def test_fusedadamw_does_not_make_the_host_wait() -> None:
    need_compiled()
    model = make_model().cuda()
    optimizer = from_factory("fusedadamw")(model)
    x_BD, finite = torch.randn(16, 6, device="cuda"), torch.tensor(True, device="cuda")

    def step() -> None:
        clear_gradients(optimizer)
        model(x_BD).square().mean().backward()
        set_learning_rate(optimizer, 1e-3)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        apply_update(optimizer, finite & torch.isfinite(norm), clip_scale(norm, 0.5))

    for _ in range(3):
        step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_fusedlamb_leaves_clipping_to_us() -> None:
    need_compiled()
    assert from_factory("fusedlamb")(make_model().cuda()).defaults["max_grad_norm"] == math.inf
