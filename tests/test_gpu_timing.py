"""How single operations are timed (benchmarks/gpu_timing.py), and what benchmarks/test_kernels.py times.

Clocks that say what they are told stand in for real ones where a test is about what is timed, not how long it took.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mvp_kernels

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU Triton's interpreter runs


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def timing(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("gpu_timing")


@pytest.fixture(scope="module")
def kernels(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("test_kernels")


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in each run; pytest shows the seed where a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"numpy seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


class TellingClock:
    """Says what it was given, call by call, and whether work is under way."""

    def __init__(self, *says: float | None) -> None:
        self.says, self.running = list(says), False

    def __call__(self, work: Callable[[], None]) -> float | None:
        self.running = True
        work()
        self.running = False
        return self.says.pop(0)


class Result:
    """Something that can be asked for by weak reference."""


# ---- the rotation


def test_copies_cover_the_working_set(timing: ModuleType, rng: np.random.Generator) -> None:
    wanted = timing.working_set(HERE)
    assert wanted == 4 * timing.cache_bytes(HERE) >= 1 << 20
    for read in (1, wanted - 1, wanted, 3 * wanted, *rng.integers(1, wanted, 20).tolist()):
        copies = timing.copies_to_cover(read, HERE)
        assert copies >= 2
        assert copies * read >= wanted
        assert copies == 2 or (copies - 1) * read < wanted


def test_every_call_gets_the_entry_that_rested_longest(timing: ModuleType) -> None:
    seen: list[int] = []
    rotation = timing.Rotation(range(5), CPU, calls=3)
    for _ in range(4):
        for _ in range(2):
            rotation.seconds(timing.Contender(seen.append), TellingClock(1.0))
    assert seen == [call % 5 for call in range(4 * 2 * 3)]


def test_work_is_timed_and_preparation_is_not(timing: ModuleType) -> None:
    clock, timed = TellingClock(6.0), []
    contender = timing.Contender(
        lambda state: timed.append(("work", state, clock.running)),
        lambda entry: timed.append(("prepare", entry, clock.running)) or -entry,
    )
    assert timing.Rotation([1, 2], CPU, calls=3).seconds(contender, clock) == 2.0
    prepared = [("prepare", entry, False) for entry in (1, 2, 1)]
    assert timed == [*prepared, *(("work", -entry, True) for entry in (1, 2, 1))]


def test_results_live_while_others_fill_other_memory(timing: ModuleType) -> None:
    made: list[weakref.ref[Result]] = []

    def work(entry: int) -> Result:
        result = Result()
        made.append(weakref.ref(result))
        return result

    rotation = timing.Rotation(range(3), CPU, calls=8)
    rotation.seconds(timing.Contender(work), TellingClock(1.0))
    assert [ref() is not None for ref in made] == [False] * 5 + [True] * 3


def test_a_time_that_cannot_be_told_is_taken_again(timing: ModuleType) -> None:
    seen: list[int] = []
    rotation, contender = timing.Rotation(range(4), CPU, calls=2), timing.Contender(seen.append)
    assert rotation.seconds(contender, TellingClock(None, None, 3.0)) == 1.5
    assert seen == [0, 1, 2, 3, 0, 1]
    with pytest.raises(RuntimeError, match=r"did not get ahead .* in 11 attempts"):
        rotation.seconds(contender, TellingClock(*[None] * timing.ATTEMPTS, 1.0))


def test_a_variant_warms_up_once_and_has_a_clock_of_its_own(timing: ModuleType) -> None:
    clocks: list[TellingClock] = []

    def clock(device: torch.device) -> TellingClock:
        clocks.append(TellingClock(2.0, 4.0))
        return clocks[-1]

    seen: list[int] = []
    rotation = timing.Rotation(range(3), CPU, clock, calls=2)
    variants = [rotation.variant(timing.Contender(seen.append)) for _ in range(2)]
    assert [variants[0].seconds(), variants[0].seconds(), variants[1].seconds()] == [1.0, 2.0, 1.0]
    assert seen == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 1, 2]
    assert [len(clock.says) for clock in clocks] == [0, 1]


@pytest.mark.parametrize("name", ["DeviceClock", "WallClock"])
def test_both_clocks_run_the_work_once(timing: ModuleType, name: str) -> None:
    done: list[int] = []
    seconds = getattr(timing, name)(CPU)(lambda: done.append(1))
    assert done == [1]
    assert seconds >= 0


@pytest.mark.gpu
def test_the_device_clock_knows_when_the_host_fell_behind(timing: ModuleType) -> None:
    device = torch.device("cuda")
    clock, x = timing.DeviceClock(device), torch.ones(1 << 20, device=device)
    x.add_(1)
    assert clock(torch.cuda.synchronize) is None
    assert clock.cycles == 2 * timing.FIRST_SLEEP
    clock.cycles = 1 << 28
    short, long = (clock(lambda cycles=cycles: torch.cuda._sleep(cycles)) for cycles in (1 << 22, 1 << 26))
    assert 0 < 8 * short < long  # 16 times the cycles; with the sleep before them both would be about the same


# ---- passes and agreement


def differentiable(timing: ModuleType) -> tuple[Any, Callable[[Tensor], Tensor], list[str]]:
    """An entry of 3 x^2, the function, and a list of what it did."""
    x, upstream, calls = torch.randn(5, requires_grad=True), torch.randn(5), []

    def function(x: Tensor) -> Tensor:
        calls.append("forward")
        return 3 * x * x

    return timing.Entry(timing.Inputs((x,), x, upstream), torch.ones(4), torch.zeros(4)), function, calls


def test_passes(timing: ModuleType, rng: np.random.Generator) -> None:
    entry, function, calls = differentiable(timing)
    (x,), _, upstream = entry.inputs
    gradient = 6 * x.detach() * upstream

    forward = timing.contender(function, "forward")
    torch.testing.assert_close(forward.work(forward.prepare(entry)).detach(), 3 * x.detach() ** 2)
    out, (grad,) = timing.contender(function, "both").work(entry)
    torch.testing.assert_close(out.detach(), 3 * x.detach() ** 2)
    torch.testing.assert_close(grad, gradient)

    backward, before = timing.contender(function, "backward"), len(calls)
    state = backward.prepare(entry)
    assert len(calls) == before + 1
    torch.testing.assert_close(backward.work(state)[0], gradient)
    assert len(calls) == before + 1

    timing.copying().work(entry)
    assert entry.source.all()
    assert torch.equal(entry.destination, entry.source)


def scaled(function: Callable[..., Any], value: float, gradient: float) -> Callable[..., Any]:
    """The function with both of its results off by a factor."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: Tensor) -> Tensor:
            return out * value

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            return upstream * gradient

    return lambda *given: Off.apply(function(*given))


@pytest.mark.parametrize(("value", "gradient", "message"), [(1.001, 1, "value"), (1, 1.001, "gradient")])
def test_a_disagreement_is_found(
    timing: ModuleType, rng: np.random.Generator, value: float, gradient: float, message: str
) -> None:
    entry, function, _ = differentiable(timing)
    same = {"eager": function, "other": scaled(function, 1 + 1e-6, 1 + 1e-6)}
    timing.check_agreement(same, entry.inputs)
    with pytest.raises(AssertionError, match=f"wrong and eager differ in the {message}"):
        timing.check_agreement(same | {"wrong": scaled(function, value, gradient)}, entry.inputs)


def test_a_wrong_type_nan_or_second_result_is_found(timing: ModuleType, rng: np.random.Generator) -> None:
    inputs = timing.Inputs((torch.randn(7),))

    def check(wrong: Callable[[Tensor], list[Tensor]]) -> None:
        timing.check_agreement({"eager": lambda x: [x, x + 1], "wrong": wrong}, inputs)

    check(lambda x: [x, 1 + x])
    with pytest.raises(AssertionError, match=r"wrong gives a result 1 of torch\.float16, eager of torch\.float32"):
        check(lambda x: [x, (x + 1).half()])
    with pytest.raises(AssertionError, match="wrong and eager differ in the result 0"):
        check(lambda x: [x * float("nan"), x + 1])
    with pytest.raises(AssertionError, match="wrong and eager differ in the result 1"):
        check(lambda x: [x, x])


def test_a_target_says_by_how_much(timing: ModuleType) -> None:
    target = timing.Target("eager", 3.0, "3 times as fast as eager")
    met, missed = timing.judge(target, 3.3), timing.judge(target, 2.4)
    assert (met["met"], missed["met"]) == (True, False)
    assert (met["by"], missed["by"]) == (pytest.approx(0.1), pytest.approx(-0.2))
    assert timing.judge(target, 3.0)["met"]
    assert timing.judged_in_words(met) == "3 times as fast as eager: met by 10.0 %"
    assert timing.judged_in_words(missed) == "3 times as fast as eager: MISSED by 20.0 %"


# ---- the cases


def test_the_cases_are_those_that_have_targets(timing: ModuleType, kernels: ModuleType) -> None:
    cases = kernels.GPU_CASES
    assert len(set(cases)) == len(cases)
    passes = {(case.op, passed) for case, passed, _ in cases if not case.small}
    assert passes >= {(op, p) for op in ("masked_gather", "token_norm", "cosine_loss") for p in ("forward", "backward")}
    assert passes >= {("guided_loss", "forward"), ("guided_loss", "both"), ("patchify", "forward")}
    assert {clock for case, _, clock in cases if case.small} == {"device", "wall"}
    assert {case.op for case, _, clock in cases if clock == "wall"} == set(kernels.OPS)

    cuda = torch.device("cuda")
    for case, passed, _ in cases:
        wanted = {target.than for target in kernels.targets_of(case, passed, cuda)}
        of_all = (case.op, passed) == ("guided_loss", "both")
        assert wanted == ({"eager"} if case.small else {"copy", "eager", "compiled"} if of_all else {"copy"})
        assert kernels.targets_of(case, passed, CPU) == ()

    compiled = [case for i, (case, _, _) in enumerate(cases) if i == 0 or cases[i - 1][0] != case]
    assert len(set(compiled)) == len(compiled), "a case's passes must follow each other, or it is compiled again"


def test_large_cases_exceed_the_cache(timing: ModuleType, kernels: ModuleType) -> None:
    for case, passed, _ in kernels.GPU_CASES:
        work = kernels.OPS[case.op](case, passed, HERE)
        if case.op in ("masked_gather", "guided_loss"):
            assert work.sizes == {"B": 8 if case.small else 256, "N": 197, "M": 76}
        elif not case.small:
            assert sum(work.floors[passed]) >= timing.working_set(HERE)


SMALL = [
    ("masked_gather", "", torch.float32),
    ("token_norm", "l2", torch.bfloat16),
    ("token_norm", "layernorm", torch.float32),
    ("cosine_loss", "", torch.bfloat16),
    ("guided_loss", "l2", torch.bfloat16),
    ("patchify", "NHWC-2", torch.bfloat16),
    ("patchify", "NCHW-1", torch.bfloat16),
]


@pytest.mark.parametrize(("op", "kind", "dtype"), SMALL)
def test_triton_and_eager_agree_and_move_the_floor(
    timing: ModuleType, kernels: ModuleType, rng: np.random.Generator, op: str, kind: str, dtype: torch.dtype
) -> None:
    """What a GPU would time, in Triton's interpreter where there is none; its floors, counted in real tensors."""
    case = kernels.Case(op, kind, 384, dtype, small=True)
    for passed in ("forward",) if op == "patchify" else ("forward", "backward", "both"):
        work = kernels.OPS[op](case, passed, HERE)
        inputs = work.inputs()
        mvp_kernels.reset_record()
        timing.check_agreement({"eager": work.eager, "triton": work.triton}, inputs)
        assert mvp_kernels.record() == {op: "triton"}
        assert work.floors[passed] == floor_of(work.eager, inputs, op, passed)


def floor_of(function: Callable[..., Any], inputs: Any, op: str, passed: str) -> tuple[int, int]:
    """Bytes read and written, from the sizes of the tensors that a pass takes and gives."""
    out = function(*inputs.given)
    if op == "patchify":
        return inputs.given[0].nbytes, sum(each.nbytes for each in out)
    (grad,) = torch.autograd.grad(out, inputs.leaf, inputs.upstream)
    x = inputs.given[0]
    if op in ("cosine_loss", "guided_loss"):  # one pass does it all; as many targets as predictions
        return 2 * x.nbytes, grad.nbytes
    forward = (out.nbytes, out.nbytes)
    backward = (inputs.upstream.nbytes + (x.nbytes if op == "token_norm" else 0), grad.nbytes)
    return {"forward": forward, "backward": backward, "both": tuple(np.add(forward, backward).tolist())}[passed]
