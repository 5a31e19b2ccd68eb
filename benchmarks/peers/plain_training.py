"""The peer stack end to end, as a program: PyTorch's DataLoader over Pillow, timm, open_clip, autocast.

    python plain_training.py --config FILE --data.index DIR --run.dir DIR ...    (the settings of `mvp-fast train`)

The same images, sizes, weights, optimizer settings and schedule as `mvp-fast train` with these settings; pixels are
normalised on the device. Masks are drawn uniformly, which costs less than BEiT's block-wise ones. Writes metrics.jsonl
as `mvp-fast train` does, and no checkpoint.

Shape legend: B images, H and W pixels, C channels, N patches, M masked patches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file: the peers are found here

from peers.image_loaders import Crops
from peers.plain_step import PlainStep

from mvp_fast.config.load import load_config, parse_overrides
from mvp_fast.config.schema import Config
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.samples.index import Index
from mvp_fast.train.distributed import choose_device
from mvp_fast.train.optim import learning_rate, set_learning_rate


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Crops with a mask each: image (C, H, W), masked patches (M,), ascending."""

    def __init__(self, config: Config) -> None:
        length = config.train.steps * config.train.batch_size
        self.crops = Crops(Index.open(config.data.index), length, config.data)
        self.patches, self.masked = (config.data.image_size // 16) ** 2, config.mask.patches

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.crops[i], torch.randperm(self.patches)[: self.masked].sort().values


def train(config: Config, workers: int) -> None:
    device = choose_device(config.train)
    side = config.data.image_size // 16
    teacher = build_teacher(config.teacher, grid=(side, side), image_size=config.data.image_size)
    student = Student(config.student, target_width=teacher.width, image_size=config.data.image_size, seed=config.seed)
    step = PlainStep(student, teacher, config, device)
    loader = DataLoader(
        Samples(config),
        config.train.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    folder = Path(config.run.dir)
    folder.mkdir(parents=True)
    batches, results, waited, since = iter(loader), [], 0.0, time.perf_counter()
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(1, config.train.steps + 1):
            asked = time.perf_counter()
            images_BCHW, masked_BM = next(batches)
            waited += time.perf_counter() - asked
            rate = learning_rate(number - 1, config.train.steps, config.optim, config.train.batch_size)
            set_learning_rate(step.optimizer, rate)
            images_BCHW, masked_BM = (x.to(device, non_blocking=True) for x in (images_BCHW, masked_BM))
            results.append(step(images_BCHW.permute(0, 2, 3, 1), masked_BM))
            if number % config.train.log_every and number < config.train.steps:
                continue
            now = time.perf_counter()  # the loss was read: the device is done
            losses, norms = zip(*results, strict=True)
            line = {
                "step": number,
                "loss": sum(losses) / len(losses),
                "grad_norm": sum(norms) / len(norms),
                "images_per_second": len(losses) * config.train.batch_size / (now - since),
                "data_wait": waited / (now - since),
                "skipped_updates": 0,
                "bad_samples": 0,
            }
            if device.type == "cuda":
                line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            file.write(json.dumps(line) + "\n")
            results, waited, since = [], 0.0, now


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--workers", type=int, required=True, help="DataLoader's worker processes")
    own, rest = parser.parse_known_args()
    train(parse_overrides(load_config(own.config) if own.config else Config(), rest, "plain_training", ""), own.workers)


if __name__ == "__main__":
    main()
