"""What a probe computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.features import Extraction
from mvp_fast.evaluate.linear import HeadSettings


@dataclass(frozen=True)
class ProbeSettings:
    """What is computed.

    Attributes:
        extraction: how features are made.
        heads: how linear classifiers are trained.
        k: numbers of neighbours.
        temperature: of their votes.
        label_fraction: share of the training set that is used.
        held_out: share of that by which layer and learning rate are chosen.
        seed: draws these parts, and the order of training.
    """

    extraction: Extraction = field(default_factory=Extraction)
    heads: HeadSettings = field(default_factory=lambda: HeadSettings(lrs=(1e-4, 4e-4, 1e-3, 4e-3, 1e-2, 4e-2)))
    k: tuple[int, ...] = (10, 20)
    temperature: float = 0.07
    label_fraction: float = 1.0
    held_out: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """ConfigError where a number can't be."""
        heads = self.heads
        wrong = [
            f"{flag} {value}"
            for flag, value, sound in (
                ("--k", " ".join(map(str, self.k)), self.k and min(self.k) >= 1),
                ("--temperature", self.temperature, 0 < self.temperature < float("inf")),
                ("--label-fraction", self.label_fraction, 0 < self.label_fraction <= 1),
                ("--held-out", self.held_out, 0 < self.held_out < 1),
                ("--seed", self.seed, 0 <= self.seed < 1 << 63),
                ("--epochs", heads.epochs, heads.epochs >= 1),
                ("--head-batch-size", heads.batch_size, heads.batch_size >= 2),
                ("--weight-decay", heads.weight_decay, 0 <= heads.weight_decay < float("inf")),
                ("--lr", " ".join(map(str, heads.lrs)), heads.lrs and all(0 < lr < float("inf") for lr in heads.lrs)),
                ("--batch-size", self.extraction.batch_size, self.extraction.batch_size >= 1),
                ("--crop-share", self.extraction.share, 0 < self.extraction.share <= 1),
            )
            if not sound
        ]
        if wrong:
            raise ConfigError(
                f"There is no probing with {', '.join(wrong)}", fix="`mvp-fast probe --help` says what is"
            )
