"""What a run says of itself: its overall rate is that of all its steps after the first, as the metric lines have it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mvp_fast.config.load import parse_overrides
from mvp_fast.config.schema import Config
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.loop import train


def test_overall_rate_agrees_with_the_metric_lines(
    scenes: Path, tmp_path: Path, tiny: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    words += ["--data.index", str(scenes), "--run.dir", str(tmp_path / "run"), "--train.steps", "9"]
    config = parse_overrides(Config(), words, "test", "")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, loader="torchvision"))
    outcome = train(config, Ranks(0, 1, 1, torch.device("cpu")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [config.train.batch_size / line["images_per_second"] for line in lines]
    whole = 8 * config.train.batch_size / sum(seconds[1:])
    fastest = max(line["images_per_second"] for line in lines)
    # Between two metric lines the run also writes them, so the overall rate is a little lower, never higher.
    assert 0.5 * whole < outcome.images_per_second <= 1.01 * whole < 1.02 * fastest
    assert outcome.steps == 9
    assert outcome.loss == lines[-1]["loss"]
    assert 0 <= outcome.data_wait < 1
