"""What a run may change when it goes on from a checkpoint, and what it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import (
    Config,
    DataConfig,
    KernelsConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mvp_fast.errors import ConfigError
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.resume import check_plan, check_settings

STATE = {"config": config_to_dict(Config())}
CHECKPOINT = Path("checkpoints/step-00000001")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(objective=ObjectiveConfig(loss="smooth_l1")), "objective.loss was cosine, is smooth_l1"),
        (Config(objective=ObjectiveConfig(tokens="all")), "objective.tokens was masked, is all"),
        (Config(optim=OptimConfig(name="lamb")), "optim.name was adamw, is lamb"),
    ],
)
def test_objective_and_optimizer_are_kept(config: Config, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_settings(STATE, config, CHECKPOINT)
    assert str(CHECKPOINT) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Config(), []),
        (Config(optim=OptimConfig(lr=1e-3)), ["optim.lr was 0.0015, is 0.001"]),
        (Config(train=TrainConfig(steps=7, precision="fp32")), ["train.steps", "train.precision"]),
        (Config(student=StudentConfig(drop_path=0.2)), ["student.drop_path"]),
        (replace(Config(), run=RunConfig(dir="elsewhere"), resume="auto", kernels=KernelsConfig("reference")), []),
        (Config(train=TrainConfig(log_every=1, checkpoint_every=3, device="cpu")), []),
    ],
)
def test_other_changes_are_told_where_they_change_the_training(config: Config, told: list[str]) -> None:
    found = check_settings(STATE, config, CHECKPOINT)
    assert len(found) == len(told)
    for text in told:
        assert any(line.startswith(text) for line in found)


def test_settings_that_came_after_the_checkpoint_had_their_defaults() -> None:
    before: dict[str, Any] = config_to_dict(Config())
    for name in ("order", "shuffle_window", "repeat"):
        del before["data"][name]
    assert check_settings({"config": before}, Config(), CHECKPOINT) == []
    told = check_settings({"config": before}, Config(data=DataConfig(shuffle_window=5)), CHECKPOINT)
    assert told == ["data.shuffle_window was 65536, is 5"]


def plan_with(**data: Any) -> SamplePlan:
    config = Config(data=DataConfig(**data))
    return SamplePlan(Index.synthetic(100), seed=1, batch_size=8, data=config.data, mask=config.mask)


def test_plans_from_before_there_were_repeats_and_shards_go_on() -> None:
    keys = {"version", "seed", "batch_size", "index", "image_size", "patch_size", "crop_scale", "crop_ratio", "flip"}
    state = {"plan": plan_with().state()}
    assert set(state["plan"]) == keys | {"mask_patches", "mask_min_block", "mask_min_aspect"}, "as in version 1"
    check_plan(state, plan_with(), CHECKPOINT)
    with pytest.raises(ConfigError, match="repeat was 1, is 2"):
        check_plan(state, plan_with(repeat=2), CHECKPOINT)
    with pytest.raises(ConfigError, match="repeat was 2, is 1"):
        check_plan({"plan": plan_with(repeat=2).state()}, plan_with(), CHECKPOINT)
