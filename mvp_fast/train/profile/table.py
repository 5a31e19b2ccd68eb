"""The profile on the terminal: a table of stages, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mvp_fast.train.profile.numbers import Numbers, figure
from mvp_fast.train.profile.timeline import quantile
from mvp_fast.train.profile.verdict import Verdict
from mvp_fast.train.stages import STAGES


def in_order(stages: Iterable[str]) -> list[str]:
    """Stages in the order of a step."""
    order = {str(stage): number for number, stage in enumerate(STAGES)}
    return sorted(stages, key=lambda stage: order.get(stage, len(order)))


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def milliseconds(seconds: float) -> str:
    """Three digits or more."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.001 else "0"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def stage_rows(numbers: Numbers) -> list[list[str]]:
    """A row a stage: its name, ms a step, of it on the critical path, share of the step, with resident batches, shares
    of the measured rates."""
    real, synthetic = numbers.real, numbers.synthetic
    rows = []
    for stage in in_order({*real.critical, *real.busy}):
        rates = numbers.stage_rates(stage)
        critical = real.critical.get(stage, 0.0)
        rows.append(
            [
                stage,
                milliseconds(real.busy.get(stage, critical)),
                milliseconds(critical) if critical else "",
                share(real.share(stage)) if critical else "beside",
                milliseconds(synthetic.critical.get(stage, 0.0)) if synthetic and critical else "",
                share(rates.get("matmul")),
                share(rates.get("copy")),
            ]
        )
    return rows


COLUMNS = ("stage", "ms a step", "critical", "of the step", "resident", "of matmul", "of copy")


def show(numbers: Numbers, verdict: Verdict, console: Console) -> None:
    """Print all of it."""
    real, synthetic = numbers.real, numbers.synthetic
    table = Table(title=f"Where a step's time goes, {len(real.steps)} steps, {numbers.settings.device_name}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for row in stage_rows(numbers):
        table.add_row(*row)
    table.add_section()
    resident = milliseconds(synthetic.step) if synthetic else ""
    table.add_row("step", "", milliseconds(real.step), "100 %", resident, share(numbers.matmul_share), "")
    console.print(table)
    for line in summary(numbers):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()
    for line in verdict.text.splitlines():
        console.print(Text(line))


def summary(numbers: Numbers) -> list[str]:
    """What stands beside the table."""
    settings, real, rates = numbers.settings, numbers.real, numbers.rates
    ceiling = "" if numbers.ceiling is None else f", {figure(numbers.ceiling)} with resident batches"
    low, middle, high = (milliseconds(quantile(real.steps, share)) for share in (0.05, 0.5, 0.95))
    matmul = ", ".join(f"{figure(rate / 1e12)} TFLOP/s {name}" for name, rate in rates.matmul.items())
    upload = "" if rates.upload is None else f", {figure(rates.upload / 1e9)} GB/s from the host"
    lines = [
        f"rate      {figure(numbers.images_per_second)} images/s{ceiling}",
        f"step      5 % {low} ms, median {middle} ms, 95 % {high} ms",
        f"measured  matmul {matmul}; copy {figure(rates.copy / 1e9)} GB/s, read and written{upload}",
        "memory    " + ", ".join(f"{name} {size(count)}" for name, count in numbers.memory.items()),
    ]
    if real.skipped:
        lines.append(f"skipped   {real.skipped} of {len(real.steps)} updates, for a non-finite loss or gradient")
    if settings.world > 1:
        for rank in numbers.ranks:
            slowest = ", the slowest" if rank == numbers.straggler else ""
            before = f"{milliseconds(rank.alone)} ms before the ranks meet{slowest}"
            lines.append(f"rank {rank.rank:<4} {figure(rank.images_per_second)} images/s, {before}")
    return lines
