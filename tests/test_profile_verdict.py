"""The verdict, on made-up numbers: what limits, how far from the limit, what to change, and what that would gain."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from mvp_fast.config.schema import Config
from mvp_fast.train.profile.numbers import Numbers, RankNumbers
from mvp_fast.train.profile.verdict import Advice, Verdict, judge
from tests.profile_cases import numbers, stretch

STEADY = {"teacher": 0.03, "student forward": 0.04, "loss": 0.002, "backward": 0.08, "optimizer": 0.008}


def advice(verdict: Verdict, setting: str) -> Advice:
    return next(each for each in verdict.advice if each.setting == setting)


def waiting(seconds: float, load: float, device: str = "cuda", **more: Any) -> Numbers:
    """Steps of 160 ms that wait for data on top of that."""
    real = stretch({**STEADY, "data wait": seconds}, busy={"load": load}, loader=more.pop("stages", {}))
    return numbers(real, stretch(STEADY), device, **more)


def test_a_step_that_waits_for_data_is_limited_by_data() -> None:
    verdict = judge(waiting(0.16, load=0.32, decodes_on_gpu=False))
    assert verdict.limit == "data"
    assert "waits for batches 50 % of its time" in verdict.text
    assert "50 % of the 1,600 images/s with resident batches" in verdict.text  # 256 images in 0.16 s
    found = advice(verdict, "data.decode")
    assert (found.now, found.to, found.at_most) == ("cpu", "gpu", True)
    assert found.gain == pytest.approx(2.0)
    assert "--data.decode gpu in place of cpu: at most +100 % images/s" in verdict.text


@pytest.mark.parametrize("seconds", [0.16, 0.02])
def test_more_threads_gain_what_the_step_can_use(seconds: float) -> None:
    """A batch takes 320 ms with 4 threads: 80 with 16, which is less than a step of 160; 200 with 6, which is not."""
    profile = waiting(seconds, load=0.16 + seconds, threads=4, cores=16)
    assert advice(judge(profile), "data.threads").gain == pytest.approx((0.16 + seconds) / 0.16)
    few = judge(waiting(0.16, load=0.32, threads=4, cores=6))
    assert advice(few, "data.threads").gain == pytest.approx(0.32 / (0.32 * 4 / 6))
    assert advice(few, "data.threads").to == "6"
    assert not [each for each in judge(waiting(0.16, 0.32, threads=16)).advice if each.setting == "data.threads"]


def test_a_queue_that_runs_dry_though_batches_are_made_fast_enough_is_lengthened() -> None:
    dry = judge(waiting(0.02, load=0.1))
    assert advice(dry, "data.prefetch").to == "4"
    assert not [each for each in judge(waiting(0.02, load=0.18)).advice if each.setting == "data.prefetch"]


def test_repeating_halves_what_decoding_takes_and_says_that_it_changes_the_training() -> None:
    stages = {name: {"seconds": seconds, "items": 8} for name, seconds in (("read", 0.1), ("decode", 0.6))}
    stages["transform"] = {"seconds": 0.4, "items": 8}
    found = advice(judge(waiting(0.16, load=0.32, device="cpu", stages=stages)), "data.repeat")
    assert found.gain == pytest.approx(0.32 / (0.32 * 0.7))  # 60 % of the work, halved
    assert "changes the training" in found.reason


def test_loading_that_only_takes_cores_is_told_from_waiting() -> None:
    slower = {stage: 1.5 * seconds for stage, seconds in STEADY.items()}  # by 80 ms
    work = {"decode": {"seconds": 0.1, "items": 8}, "transform": {"seconds": 0.04, "items": 8}}  # on two cores: 70 ms
    real = stretch(slower, busy={"load": 0.01}, loader=work)
    verdict = judge(numbers(real, stretch(STEADY), "cpu", loader="torchvision"))
    assert verdict.limit == "cores"
    assert "takes the cores from the step" in verdict.headline
    assert "reaches 67 % of the 50 images/s" in verdict.text
    assert advice(verdict, "data.loader").gain == pytest.approx(1.5)
    assert advice(verdict, "data.repeat").gain == pytest.approx(0.24 / (0.24 - 0.1 / 2 / 2))


def test_a_difference_that_loading_does_not_explain_is_not_blamed_on_it() -> None:
    slower = {stage: 1.5 * seconds for stage, seconds in STEADY.items()}
    real = stretch(slower, busy={"load": 0.01}, loader={"decode": {"seconds": 0.01, "items": 8}})
    verdict = judge(numbers(real, stretch(STEADY), "cpu"))
    assert verdict.limit == "compute"
    assert "which loading does not explain: it takes 10 ms of a core a step" in verdict.text
    assert "measure again" in verdict.text
    assert not [each for each in verdict.advice if each.setting.startswith("data.")]


def test_a_rank_that_comes_last_is_named() -> None:
    ranks = [RankNumbers(rank, 100.0, 0.15 if rank == 2 else 0.10, 0.05 if rank == 2 else 0.0) for rank in range(4)]
    verdict = judge(numbers(stretch(STEADY), stretch(STEADY), ranks=ranks, world=4))
    assert verdict.limit == "ranks"
    assert "Rank 2 holds up the others" in verdict.text
    assert "1.50 times the median rank's" in verdict.text
    assert "waits for data 50 ms" in verdict.text
    level = [replace(rank, alone=0.1) for rank in ranks]
    assert judge(numbers(stretch(STEADY), stretch(STEADY), ranks=level, world=4)).limit == "compute"


def test_launches_that_the_gpu_waits_for_are_the_hosts_limit() -> None:
    real = stretch({**STEADY, "host": 0.02}, host_bound=0.03)
    verdict = judge(numbers(real, real, accumulate=4))
    assert verdict.limit == "host"
    assert "28 % of the step" in verdict.text  # 50 of 180 ms
    found = advice(verdict, "train.accumulate")
    assert (found.now, found.to) == ("4", "2")
    assert found.gain == pytest.approx(0.18 / 0.155)
    whole = advice(judge(numbers(real, real)), "train.batch-size")
    assert whole.to == "512"
    assert "changes the training" in whole.reason


def test_a_full_gpu_is_not_told_to_take_larger_batches() -> None:
    real = stretch({**STEADY, "host": 0.02}, host_bound=0.03)
    assert judge(numbers(real, real, accumulate=4, peak_memory=0.6)).advice == []


def test_where_all_is_well_it_says_how_far_the_products_are_from_the_limit() -> None:
    verdict = judge(numbers(stretch(STEADY), stretch(STEADY)))
    assert verdict.limit == "compute"
    assert verdict.advice == []
    assert "run at 56 % of the 800 TFLOP/s" in verdict.text  # 90 of 160 ms
    assert "largest stage is backward, 50 % of the step" in verdict.text
    assert "No setting that this profile knows of" in verdict.text


@pytest.mark.parametrize(
    ("device", "now", "other", "ratio"), [("cuda", "fp32", "bf16", 2.0), ("cpu", "bf16", "fp32", 5 / 3)]
)
def test_the_faster_precision_of_those_measured_is_proposed(device: str, now: str, other: str, ratio: float) -> None:
    profile = numbers(stretch(STEADY), stretch(STEADY), device, precision=now)
    spent = 0.15  # at this rate the products alone would take longer than the stages that they are in
    found = advice(judge(profile), "train.precision")
    assert (found.now, found.to) == (now, other)
    assert found.gain == pytest.approx(0.16 / (0.16 - spent * (1 - 1 / ratio)))
    assert not judge(replace(profile, settings=replace(profile.settings, precision=other))).advice


def test_an_update_that_weighs_more_than_the_images_is_spread_over_more_of_them() -> None:
    real = stretch({**STEADY, "optimizer": 0.05, "clip": 0.01})
    found = advice(judge(numbers(real, real)), "train.batch-size")
    assert found.gain == pytest.approx(0.212 / (0.212 - 0.03))


def test_slow_kernels_on_a_gpu_are_told_without_a_figure() -> None:
    verdict = judge(numbers(stretch(STEADY), stretch(STEADY), kernels="reference"))
    assert advice(verdict, "kernels.impl").gain is None
    assert "this profile can't tell" in verdict.text


def test_the_greatest_gain_comes_first_and_none_below_a_percent_is_told() -> None:
    verdict = judge(waiting(0.16, load=0.32, decodes_on_gpu=False, threads=15, precision="fp32"))
    gains = [each.gain for each in verdict.advice if each.gain is not None]
    assert len(gains) >= 3
    assert gains == sorted(gains, reverse=True)
    assert min(gains) >= 1.01
    # Threads that would gain less than 1 %: a batch would hardly be made sooner.
    assert not [e for e in judge(waiting(0.16, 0.32, threads=999, cores=1000)).advice if e.setting == "data.threads"]


def test_a_run_on_resident_batches_gets_no_advice_on_loading() -> None:
    verdict = judge(numbers(stretch({**STEADY, "data wait": 0.1}), None, loader="synthetic"))
    assert verdict.limit == "data"
    assert "resident batches" not in verdict.text
    assert verdict.advice == []


def fields_of(config: Any, prefix: str = "") -> set[str]:
    """Every setting by its name on the command line."""
    found = set()
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        found |= fields_of(value, f"{name}.") if is_dataclass(value) else {name}
    return found


def test_advice_names_settings_that_there_are() -> None:
    host = stretch({**STEADY, "host": 0.02}, host_bound=0.03)
    stages = {"decode": {"seconds": 1.0, "items": 8}}
    profiles = [
        waiting(0.16, load=0.32, decodes_on_gpu=False, threads=4, stages=stages, precision="fp32", kernels="reference"),
        waiting(0.02, load=0.1, device="cpu", loader="torchvision"),
        numbers(host, host, accumulate=4),
        numbers(host, host),
    ]
    named = {each.setting for profile in profiles for each in judge(profile).advice}
    assert len(named) >= 8
    assert named <= fields_of(Config())
    for profile in profiles:
        assert not re.search(r"nan|inf|None", judge(profile).text)
