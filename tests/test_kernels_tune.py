"""The tuner: what it tries, and when it keeps it. The clock is scripted, save where a real one runs.

Shape legend: B images, M tokens, D channels of a token.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvp_kernels import launch, reference, tune
from mvp_kernels.arguments import Normalization
from mvp_kernels.launch import Launch
from mvp_kernels.operators import token_norm
from mvp_kernels.tune_cases import DTYPES, OPS, WIDTHS, Call, Case, Sizes, candidates_of, cases_of, prepare
from tests.kernel_cases import DEVICES, surroundings
from tests.test_kernels_launch import GPU_NAME, folder

__all__ = ["folder", "surroundings"]

SMALL = Sizes(footprint=1, tokens=5, taken=2, grid=1, sets=2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORM, GATHER = Case("token_norm", 16, torch.float32), Case("masked_gather", 16, torch.float32)


def scripted(op: str, seconds: Callable[[Launch, int], float]) -> tune.Measure:
    """A clock that runs nothing, and shows what is written for the launch that is tried and the times it was tried."""
    tried: dict[Launch, int] = {}

    def measure(before: Call, timed: Call) -> float:
        now = launch.launch_of(op, 16, torch.float32, DEVICE)
        tried[now] = tried.get(now, -1) + 1
        return seconds(now, tried[now])

    return measure


def run(measure: tune.Measure, *cases: Case, **options: Any) -> int:
    return tune.tune(list(cases), DEVICE, GPU_NAME, SMALL, measure, **options)


def kept() -> dict[launch.Key, Launch]:
    return launch.tuned_for(GPU_NAME)


def others_of(case: Case) -> list[Launch]:
    default, *others = candidates_of(case)
    assert default == launch.default_launch(*case.key)
    return others


def test_what_is_tuned() -> None:
    cases = cases_of(OPS, WIDTHS, DTYPES)
    assert {case.op for case in cases} == set(OPS)
    assert {case.dtype.itemsize for case in cases} == {2, 4}
    for op in OPS:
        widths = {case.width for case in cases if case.op == op}
        assert widths == ({196, 256, 1024} if op == "patchify" else {384, 512, 768, 1024})
    assert len({case.key for case in cases}) == len(cases)
    assert cases_of(["token_norm"], [8, 8], ["float16", "bfloat16"]) == [Case("token_norm", 8, torch.float16)]


@pytest.mark.parametrize("case", cases_of(OPS, [7, *WIDTHS, 4096], DTYPES), ids=lambda case: f"{case.op}-{case.width}")
def test_candidates(case: Case) -> None:
    default, *others = candidates_of(case)
    assert default == launch.default_launch(*case.key)
    assert default not in others
    assert len(set(others)) == len(others) >= 2
    for candidate in others:
        assert launch.sensible(candidate, case.width)
        assert candidate.rows * launch.block_of(case.width) * case.dtype.itemsize >= 16 * 32 * candidate.warps
    if case.width in WIDTHS:
        assert {candidate.rows > default.rows for candidate in others} == {True, False}
        assert {candidate.warps > default.warps for candidate in others} == {True, False}


@DEVICES
@pytest.mark.parametrize("op", OPS)
def test_what_is_timed_is_the_operation(op: str, device: str) -> None:
    """Each set of inputs is another; a call does what the reference does, and moves as many bytes as is said."""
    dtype = random.choice([torch.float32, torch.float16])
    case, sizes = Case(op, 256 if op == "patchify" else 24, dtype), SMALL._replace(grid=2, footprint=3000)
    calls, moved = prepare(case, torch.device(device), sizes)
    assert len(calls) == 2
    assert moved >= sizes.footprint
    results = []
    for call in calls:
        given, got = call.args, call()
        results.append(got)
        expected, read = expected_of(op, given)
        wide = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
        written = [got] if isinstance(got, Tensor) else got if op == "patchify" else [got[1].pred]
        values = [got[0]] if op.endswith("loss") else written
        for value, want in zip(values, expected, strict=True):
            torch.testing.assert_close(value, want, **wide)
        assert moved == read + sum(tensor.nbytes for tensor in written)
    assert not all(map(torch.equal, tune._tensors(results[0])[:1], tune._tensors(results[1])[:1]))


def expected_of(op: str, given: tuple[Any, ...]) -> tuple[list[Tensor], int]:
    """What the reference makes of a call's arguments, and the bytes that must be read for it."""
    if op == "masked_gather_backward":
        grad_BMD, index_BM, tokens = given
        x_BND = grad_BMD.new_zeros(grad_BMD.shape[0], tokens, grad_BMD.shape[2]).requires_grad_()
        return [torch.autograd.grad(reference.masked_gather(x_BND, index_BM), x_BND, grad_BMD)[0]], grad_BMD.nbytes
    if op == "token_norm_backward":
        grad, x, kind, eps = given
        x = x.clone().requires_grad_()
        return [torch.autograd.grad(reference.token_norm(x, kind, eps), x, grad)[0]], grad.nbytes + x.nbytes
    if op == "token_norm":
        return [reference.token_norm(*given)], given[0].nbytes
    if op == "masked_gather":
        out_BMD = reference.masked_gather(*given)
        return [out_BMD], out_BMD.nbytes
    if op == "cosine_loss":
        return [reference.cosine_loss(*given)], given[0].nbytes + given[1].nbytes
    if op == "guided_loss":
        pred, target, index = given
        return [reference.guided_loss(pred.reshape(*index.shape, -1), target, index)], 2 * pred.nbytes
    images, patch, _, _, names = given
    normalizations = [Normalization((0.5,) * 3, (0.5,) * 3, getattr(torch, name)) for name in names]
    return reference.patchify(images, patch, normalizations), images.nbytes


@pytest.mark.parametrize("case", [NORM, GATHER], ids=lambda case: case.op)
def test_the_fastest_is_kept(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    best, second, *_ = random.sample(others_of(case), 3)
    speed = {best: 70e-6, second: 80e-6}
    noise = random.Random(5)
    assert run(scripted(case.op, lambda now, _: speed.get(now, 100e-6) * noise.uniform(0.99, 1.01)), case) == 0
    assert kept() == {case.key: best}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(GPU_NAME)
    assert lines[1].split() == ["op", "width", "type", "default", "us", "best", "us", "share", "parameters"]
    op, width, dtype, default_us, best_us, share, *parameters = lines[2].split()
    assert (op, width, dtype) == (case.op, "16", "float32")
    assert float(default_us) == pytest.approx(100, rel=0.01)
    assert float(best_us) == pytest.approx(70, rel=0.01)
    # The clock shows the same for two bytes copied as for the default.
    assert float(share.rstrip("%")) == pytest.approx(100 * prepare(case, DEVICE, SMALL).moved / 2 / 0.7, rel=0.05)
    assert " ".join(parameters) == f"rows {best.rows} warps {best.warps}"
    assert lines[3] == f"1 of 1 are in {launch.cache_file(GPU_NAME)}"


def test_share_is_of_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of as many bytes in the same time is all of it."""
    moved = prepare(NORM, DEVICE, SMALL).moved
    sizes = SMALL._replace(footprint=moved)
    assert tune.tune([NORM], DEVICE, GPU_NAME, sizes, lambda before, timed: 1e-5) == 0
    assert " 100%  " in capsys.readouterr().out.splitlines()[2]


def test_what_is_no_better_than_noise_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a steady 1 %, nor what comes and goes, nor a lucky first look. What was kept before goes."""
    default, lucky = launch.default_launch(*NORM.key), random.choice(others_of(NORM))
    waves = random.Random(7)
    for seconds in (
        lambda now, turn: 100e-6 if now == default else 99e-6,
        lambda now, turn: waves.uniform(60e-6, 140e-6) * (1 if now == default else 0.95),
        lambda now, turn: 50e-6 if now == lucky and turn < tune.SCREENING else 100e-6,
        lambda now, turn: 100e-6 if now == default else 101e-6,
    ):
        launch.save_tuned(GPU_NAME, {NORM.key: lucky, GATHER.key: lucky})
        assert run(scripted(NORM.op, seconds), NORM) == 0
        assert kept() == {GATHER.key: lucky}
        assert f"rows {default.rows} warps {default.warps} (default)" in capsys.readouterr().out


def test_the_rule() -> None:
    """2 % by the medians, and three quarters of the one below three quarters of the other."""
    for _ in range(200):
        default = [random.uniform(0.9, 1.1) for _ in range(25)]
        factor = random.uniform(0.6, 1.1)
        candidate = [factor * random.uniform(0.9, 1.1) for _ in range(25)]
        slow, fast = sorted(candidate)[18], sorted(default)[6]  # of 25, the quartiles are values themselves
        faster = statistics.median(candidate) < 0.98 * statistics.median(default)
        assert tune.beats(candidate, default) == (slow < fast and faster)
    assert not tune.beats([1.0] * 25, [1.0] * 25)
    assert not tune.beats([0.985] * 25, [1.0] * 25)
    assert tune.beats([0.975] * 25, [1.0] * 25)


def test_all_have_their_turn_in_every_round() -> None:
    """Each as often, on inputs in turn, and not always behind the same."""
    launches, calls = [Launch(2**k, 1) for k in range(4)], [lambda: 0, lambda: 1, lambda: 2]
    turns: list[tuple[Launch, int, int]] = []

    def measure(before: Call, timed: Call) -> float:
        turns.append((launch.launch_of("token_norm", 16, torch.float32, DEVICE), before(), timed()))
        return float(len(turns))

    times = tune.race("token_norm", launches, calls, measure, 25)
    rounds = [turns[k : k + 4] for k in range(0, 100, 4)]
    assert all({now for now, *_ in one} == set(launches) for one in rounds)
    assert {one[0][0] for one in rounds} == {one[3][0] for one in rounds} == set(launches)
    assert all(timed == (before + 1) % 3 for _, before, timed in turns)
    for which, now in enumerate(launches):
        assert times[which] == [place + 1.0 for place, turn in enumerate(turns) if turn[0] == now]
        assert {timed for turn, _, timed in turns if turn == now} == {0, 1, 2}


@DEVICES
def test_what_fails_or_differs_is_passed_over(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rows are no tile: Triton itself refuses them. A kernel that is wrong at one size is not kept there."""
    good, wrong = Launch(2, 1), Launch(4, 1)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def call(x: Tensor, grad: None, out: Tensor, *rest: Any, **named: Any) -> None:
                kernel[grid](x, grad, out, *rest, **named)
                if named["ROWS"] == wrong.rows:
                    out[-1] = 0.0

            return call

    kernel = token_norm.token_norm_kernel
    monkeypatch.setattr(token_norm, "token_norm_kernel", Kernel())
    monkeypatch.setattr(tune, "candidates_of", lambda case: [Launch(1, 1), Launch(3, 1), wrong, good])
    speed = {Launch(1, 1): 9e-5, wrong: 1e-5, good: 8e-5}
    measure = scripted("token_norm", lambda now, _: speed[now])
    monkeypatch.setattr(tune, "_copy_speed", lambda *_: 1e9)
    assert tune.tune([NORM], torch.device(device), GPU_NAME, SMALL, measure) == 0
    assert kept() == {NORM.key: good}
    said = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert len(said) == 2
    assert said[0].startswith("  passed over rows 3 warps 1: ")
    assert "power of 2" in said[0]
    assert said[1] == "  passed over rows 4 warps 1: another result than the default's"


def test_a_case_that_cannot_be_timed_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.save_tuned(GPU_NAME, {NORM.key: Launch(2, 2)})
    monkeypatch.setattr(tune, "candidates_of", lambda case: [Launch(3 if case == NORM else 2, 1), Launch(4, 1)])
    assert run(lambda before, timed: 1e-5, NORM, GATHER) == 0
    out = capsys.readouterr().out
    assert "token_norm                 16  float32    left as it was: " in out
    assert "1 of 2 are in" in out
    assert kept() == {NORM.key: Launch(2, 2)}
    assert run(lambda before, timed: 1e-5, NORM) == 4


def test_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """What is begun is finished; the rest is left, and said."""
    clock = iter([0.0, 0.0, 5.0, 11.0])
    cases = [NORM, GATHER, NORM._replace(width=8)]
    assert run(lambda before, timed: 1e-5, *cases, budget=10.0, clock=lambda: next(clock)) == 0
    out = capsys.readouterr().out
    assert "the budget is used up: 1 of 3 are left as they were" in out
    assert "2 of 3 are in" in out


def test_an_interruption_keeps_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    best = others_of(NORM)[0]
    steady = scripted(NORM.op, lambda now, _: 5e-5 if now == best else 1e-4)

    def measure(before: Call, timed: Call) -> float:
        if NORM.key in kept():
            raise KeyboardInterrupt
        return steady(before, timed)

    assert run(measure, NORM, GATHER) == 130
    assert kept() == {NORM.key: best}
    assert launch._tried == {}
    assert "interrupted: 1 of 2 are in" in capsys.readouterr().out


@DEVICES
@pytest.mark.parametrize("op", OPS)
def test_with_a_clock(
    op: str, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it, kernels run and timed; what comes out is for the clock to say, but must be one of the two."""
    monkeypatch.setattr(tune, "SCREENING", 2)
    monkeypatch.setattr(tune, "FINAL", 2)
    case = Case(op, 196 if op == "patchify" else 4, torch.float32)

    def measure(before: Call, timed: Call) -> float:
        before()
        start = time.perf_counter()
        timed()
        return time.perf_counter() - start

    real = tune.on_gpu if device == "cuda" else measure
    assert tune.tune([case], torch.device(device), GPU_NAME, SMALL, real) == 0
    out = capsys.readouterr().out
    assert "passed over" not in out
    assert out.splitlines()[2].startswith(f"{op:<23}{case.width:>6}  float32")
    assert launch.cache_file(GPU_NAME).exists()
    assert ("(default)" in out) == (case.key not in kept())
    assert kept().get(case.key) in [None, *others_of(case)]
