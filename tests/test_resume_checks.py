"""What a run may change when it goes on from a checkpoint, and what it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import (
    Config,
    KernelsConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mvp_fast.errors import ConfigError
from mvp_fast.train.resume import check_settings

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
