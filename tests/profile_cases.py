"""Made-up profiles: timelines of steps with everything on them, and the numbers of a run on a GPU or a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mvp_fast.train.profile.numbers import Numbers, RankNumbers, Settings, Stretch
from mvp_fast.train.profile.operations import Work
from mvp_fast.train.profile.rates import Rates
from mvp_fast.train.profile.timeline import HOST_TRACK, LOADER_TRACK, MAIN_STREAM, Span, Timeline

GPU_RATES = Rates({"fp32": 400e12, "bf16": 800e12}, copy=2.9e12, upload=50e9)
CPU_RATES = Rates({"fp32": 100e9, "bf16": 60e9}, copy=10e9)


def stretch(critical: dict[str, float], steps: int = 4, **more: Any) -> Stretch:
    """Steps that are all alike; what is on the critical path is all there is, but for what `busy` adds."""
    busy = {**critical, **more.pop("busy", {})}
    return Stretch(critical, busy, [sum(critical.values())] * steps, more.pop("host_bound", 0.0), **more)


def settings(device: str = "cuda", **more: Any) -> Settings:
    gpu = device == "cuda"
    values: dict[str, Any] = {
        "device": device,
        "device_name": "NVIDIA H100" if gpu else "CPU, 2 cores",
        "precision": "bf16" if gpu else "fp32",
        "batch_size": 256 if gpu else 8,
        "accumulate": 1,
        "loader": "dali" if gpu else "cpu",
        "decodes_on_gpu": gpu,
        "threads": 0,
        "cores": 16 if gpu else 2,
        "prefetch": 2,
        "repeat": 1,
        "optimizer": "adamw",
        "kernels": "triton" if gpu else "reference",
        "peak_memory": 0.2 if gpu else None,
    }
    return Settings(**{**values, **more})


def numbers(real: Stretch, synthetic: Stretch | None = None, device: str = "cuda", **more: Any) -> Numbers:
    """A profile; `more` replaces fields of it, and those of the settings."""
    of_settings = {name: more.pop(name) for name in list(more) if name in Settings.__dataclass_fields__}
    # Products of a tenth of a second at the full rate of bf16 on the GPU, of fp32 on the CPU.
    flops = 80e12 * 0.9 if device == "cuda" else 10e9 * 0.9
    work = {
        "teacher": Work(flops / 4, flops / 400),
        "student forward": Work(flops / 4, flops / 400),
        "backward": Work(flops / 2, flops / 200),
        "optimizer": Work(14e8, 28e8),
    }
    made = Numbers(
        settings=settings(device, **of_settings),
        real=real,
        synthetic=synthetic,
        rates=GPU_RATES if device == "cuda" else CPU_RATES,
        work=work,
        memory={"student weights": 350 << 20, "teacher": 180 << 20},
        warm_up=5,
        ranks=[RankNumbers(0, 8 / real.step, 0.5 * real.step, 0.0)],
    )
    return replace(made, **more)


def gpu_timeline(steps: int = 3) -> Timeline:
    """Steps of 100 ms on a GPU, of which nothing is left to chance; times of the first, in ms:

    host      data wait 0-2, copy 2-3, student forward 3-9, loss 9-10, backward 10-20, optimizer 20-22
    main      data wait 0-4 (batch in the host's hands at 2, on the device at 4), hole 4-10 (waits for the teacher),
              student forward 10-40, loss 40-42, backward 42-90, hole 90-92 (waits for nothing known),
              optimizer 92-98, hole 98-100
    teacher   teacher 1-10
    copy      copy 1-4
    """
    spans = []
    for step in range(steps):
        at = 0.1 * step

        def span(
            stage: str, track: str, start: float, end: float, launched: tuple[float, float] | None, at: float = at
        ) -> Span:
            queued = None if launched is None else (at + 1e-3 * launched[0], at + 1e-3 * launched[1])
            return Span(stage, track, at + 1e-3 * start, at + 1e-3 * end, queued)

        for stage, start, end in (
            ("data wait", 0, 2),
            ("student forward", 3, 9),
            ("loss", 9, 10),
            ("backward", 10, 20),
            ("optimizer", 20, 22),
        ):
            spans.append(span(stage, HOST_TRACK, start, end, None))
        spans += [
            span("data wait", MAIN_STREAM, 0, 4, (0, 2)),
            span("student forward", MAIN_STREAM, 10, 40, (3, 9)),
            span("loss", MAIN_STREAM, 40, 42, (9, 10)),
            span("backward", MAIN_STREAM, 42, 90, (10, 20)),
            span("optimizer", MAIN_STREAM, 92, 98, (20, 22)),
            span("teacher", "GPU stream 2 (teacher)", 1, 10, (0.5, 0.9)),
            span("copy", "GPU stream 3 (copy)", 1, 4, (0.2, 0.3)),
            span("load", LOADER_TRACK, 5, 60, None),
        ]
    spans.sort(key=lambda each: (each.start, -each.end))
    return Timeline(tuple(spans), tuple(0.1 * step for step in range(steps + 1)), MAIN_STREAM)
