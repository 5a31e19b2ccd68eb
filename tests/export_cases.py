"""Students and runs to export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_fast.config.load import config_to_dict
from mvp_fast.config.schema import Config, DataConfig, StudentConfig, TeacherConfig, TrainConfig
from mvp_fast.models.student import Student
from mvp_fast.train.checkpoint import Checkpointer

SMALL = StudentConfig(width=48, depth=3, heads=4)
SIZE = 64
INDEX, TEACHER = "ab" * 32, "cd" * 32  # fingerprints


def trained(config: StudentConfig = SMALL, image_size: int = SIZE) -> Student:
    """A student whose every weight differs from its initial value."""
    student = Student(config, target_width=24, image_size=image_size)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if parameter.ndim > 1 else 0.2)
        student.rel_pos_bias.relative_position_bias_table.normal_()
    return student


def pixels_of(student: Student, count: int = 2) -> tuple[Tensor, Tensor]:
    """Random crops, uint8 (B, H, W, C), and what a model takes of them, float32 (B, C, H, W)."""
    images = torch.randint(0, 256, (count, student.image_size, student.image_size, 3), dtype=torch.uint8)
    normal = (images / 255 - torch.tensor(student.mean)) / torch.tensor(student.std)
    return images, normal.permute(0, 3, 1, 2)


def write_run(folder: Path, teacher: TeacherConfig | None = None) -> dict[tuple[int, str], Student]:
    """A run's folder with the checkpoints of steps 3 and 12, as `mvp-fast train` leaves it; the students in them."""
    data = DataConfig(index="/secret/place/images/index.parquet", image_size=SIZE)
    settings = Config(
        student=SMALL,
        data=data,
        teacher=teacher or TeacherConfig(),
        train=TrainConfig(batch_size=32, ema_decay=0.99),
    )
    state: dict[str, Any] = {
        "config": config_to_dict(settings),
        "target_width": 24,
        "plan": {"index": INDEX, "seed": 0},
        "teacher": TEACHER,
        "total_steps": 12,
        "skipped": 1,
    }
    students = {(step, part): trained() for step in (3, 12) for part in ("student", "ema")}
    writer = Checkpointer(folder / "checkpoints", keep=0)
    for step in (3, 12):
        parts = {part: students[step, part].state_dict() for part in ("student", "ema")}
        writer.save(step, parts, state)
    writer.close()
    lines = [{"step": step, "loss": 1 / step, "epoch": step * 32 / 96} for step in (3, 6, 9, 12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    environment = {
        "mvp_fast": "0.0.9",
        "command": ["mvp-fast", "train", "--data.index", "/secret/place/images"],
        "versions": {"torch": "2.11.0", "triton": "not installed"},
        "device": "a device",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return students
