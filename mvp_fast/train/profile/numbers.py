"""The numbers of a profile: all that the table, the page and the verdict are made of, and what stages.json holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mvp_fast.train.profile.operations import Work, products
from mvp_fast.train.profile.rates import Rates


def figure(value: float) -> str:
    """A rate for people: three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Stretch:
    """Some measured steps in a row. Seconds are a step's, of rank 0.

    Attributes:
        critical: by stage, on the critical path; they add up to the mean step.
        busy: by stage, wherever it ran, also beside others.
        steps: of each step.
        host_bound: of stages in which the GPU did nothing but wait for launches.
        loader: seconds and items of the loader's own stages (see `loaders.base.StageStats`), a step.
        skipped: steps whose update was skipped for a non-finite value.
    """

    critical: dict[str, float]
    busy: dict[str, float]
    steps: list[float]
    host_bound: float
    loader: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: int = 0

    @property
    def step(self) -> float:
        """The mean step."""
        return sum(self.steps) / len(self.steps)

    def share(self, *stages: str) -> float:
        """Share of the step that these stages have on the critical path."""
        return sum(self.critical.get(stage, 0.0) for stage in stages) / self.step


@dataclass(frozen=True)
class Settings:
    """What of the configuration and the machine the verdict speaks of.

    Attributes:
        loader: the backend that ran, `auto` resolved.
        decodes_on_gpu: whether it decodes there.
        threads: the setting data.threads, of a rank; 0 is all of `cores`.
        cores: of this machine, for one rank.
        peak_memory: share of the GPU's memory that a step needed at most; None on a CPU.
    """

    device: str
    device_name: str
    precision: str
    batch_size: int
    accumulate: int
    loader: str
    decodes_on_gpu: bool
    threads: int
    cores: int
    prefetch: int
    repeat: int
    optimizer: str
    kernels: str
    world: int = 1
    peak_memory: float | None = None


@dataclass(frozen=True)
class RankNumbers:
    """Of one rank.

    Attributes:
        images_per_second: of its own images.
        alone: seconds a step before the ranks first meet, which is in the backward pass: the slowest holds up all.
        data_wait: seconds a step on its critical path.
    """

    rank: int
    images_per_second: float
    alone: float
    data_wait: float


@dataclass(frozen=True)
class Numbers:
    """A whole profile.

    Attributes:
        real, synthetic: with the run's own loader, and with resident batches; None where the run's is that one.
        work: operations and bytes a step of a rank, by stage.
        memory: bytes by part.
        warm_up: steps before the measured ones.
        ranks: one for each, by rank.
    """

    settings: Settings
    real: Stretch
    synthetic: Stretch | None
    rates: Rates
    work: dict[str, Work]
    memory: dict[str, int]
    warm_up: int
    ranks: list[RankNumbers]

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.settings.batch_size / self.real.step

    @property
    def ceiling(self) -> float | None:
        """The same with resident batches."""
        return None if self.synthetic is None else self.settings.batch_size / self.synthetic.step

    @property
    def headroom(self) -> float:
        """How many times as fast the steps are with resident batches; 1 where that is not known."""
        return 1.0 if self.synthetic is None else self.real.step / self.synthetic.step

    @property
    def matmul_share(self) -> float:
        """Share of the measured rate of matrix products, in the run's precision, that the step reaches."""
        return products(self.work) / self.real.step / self.rates.matmul[self.settings.precision]

    @property
    def straggler(self) -> RankNumbers:
        """The rank that comes last to where the ranks meet."""
        return max(self.ranks, key=lambda rank: rank.alone)

    @property
    def straggling(self) -> float:
        """How many times as long the slowest rank takes until then as the median rank; 1 with one rank."""
        ordered = sorted(rank.alone for rank in self.ranks)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return self.straggler.alone / middle if middle > 0 else 1.0

    def stage_rates(self, stage: str) -> dict[str, float]:
        """Of a stage while it runs: "matmul" and "copy", as shares of the measured rates; what is not known is left
        out."""
        seconds, work = self.real.busy.get(stage, 0.0), self.work.get(stage)
        if work is None or seconds <= 0:
            return {}
        found = {"copy": work.bytes / seconds / self.rates.copy}
        if stage in ("teacher", "student forward", "backward"):
            found["matmul"] = work.flops / seconds / self.rates.matmul[self.settings.precision]
        return found

    def as_dict(self) -> dict[str, Any]:
        """For stages.json: what was measured, and what follows from it."""
        stages = {
            stage: {
                "milliseconds": 1e3 * self.real.busy.get(stage, 0.0),
                "critical_milliseconds": 1e3 * self.real.critical.get(stage, 0.0),
                "share_of_step": self.real.share(stage),
                **{f"share_of_{rate}": share for rate, share in self.stage_rates(stage).items()},
            }
            for stage in dict.fromkeys([*self.real.critical, *self.real.busy])
        }
        return {
            "step_milliseconds": 1e3 * self.real.step,
            "images_per_second": self.images_per_second,
            "synthetic_images_per_second": self.ceiling,
            "share_of_matmul": self.matmul_share,
            "stages": stages,
            "measured": asdict(self),
        }
