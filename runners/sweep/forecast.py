"""Forecasts of sweeps: FLOPs, hours and disk of each stage, without weights, facts or a network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from causalcone.analysis.tables.names import counted
from causalcone.engine.compute import as_device, as_dtype
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Architecture
from causalcone.runners.show.forecast import USUAL_EFFICIENCY, matmul_rate
from causalcone.runners.sweep.inputs.model_outline import model_outline
from causalcone.runners.sweep.inputs.planned_facts import facts_of
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Selection
from causalcone.runners.sweep.stages import FilterStage, later_units, stages_of
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.stage import EFFICIENCY, StageCost


@dataclass(frozen=True)
class Forecast:
    """The forecast of a sweep. rate: FLOP/s of the device's matrix products; lines: in words, what was assumed."""

    stages: Sequence[StageCost]
    rate: float
    lines: tuple[str, ...]

    @property
    def hours(self) -> float:
        return sum(stage.hours(self.rate) for stage in self.stages)

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages)

    def show(self, console: Console) -> None:
        table = Table(show_footer=True)
        total = ("total", f"{sum(len(cost.work.units) for cost in self.stages):,}", "")
        numbers = (f"{sum(cost.flops for cost in self.stages):.3g}", _hours(self.hours), _bytes(self.disk))
        for name, footer in zip(("stage", "units", "items", "FLOP", "hours", "disk"), (*total, *numbers), strict=True):
            table.add_column(name, footer, justify="left" if name == "stage" else "right")
        for cost in self.stages:
            work = cost.work
            numbers = (f"{cost.flops:.3g}", _hours(cost.hours(self.rate)), _bytes(cost.disk))
            table.add_row(
                work.title, f"{len(work.units):,}", counted(work.items, work.stage.item.removesuffix("s")), *numbers
            )
        console.print(table)
        for line in self.lines:
            console.print(line, highlight=False, markup=False)


def forecast(sweep: Sweep, rate: float | None = None, known: int | None = None) -> Forecast:
    """How long a sweep will take, and how much disk.

    rate: FLOP/s of the device's matrix products, measured here and now by default; known: how many facts pass the
    filter, all by default. Raises ``ExperimentError`` naming a layer or state that the model does not have, and
    ``shape`` where the model's config cannot be had.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise ExperimentError(f"--rate is {rate:g}; give operations per second, such as 300e12")
    architecture = model_outline(sweep)
    counts = Counts(architecture, facts_of(sweep, architecture.sizes), known)
    costs = stage_costs(sweep, counts)
    source, pace = (
        ("a given rate", rate) if rate is not None else ("measured here", _measured_rate(sweep, architecture))
    )
    hours = (
        f"hours: at {pace / 1e12:.4g} TFLOP/s ({source}), of which {USUAL_EFFICIENCY:.0%} are reached in tracing and "
        f"{EFFICIENCY:.0%} in editing; that was measured on two CPU cores"
    )
    lines = (*counts.facts.lines, *_assumed(sweep, known), hours)
    return Forecast(costs, pace, lines)


def stage_costs(sweep: Sweep, counts: Counts) -> list[StageCost]:
    """The costs of all stages, in the order in which they are carried out. Raises ``ExperimentError`` for layers or
    states that the model does not have."""
    numbers = tuple(range(counts.selected))
    later = later_units(stages_of(sweep).values(), Selection(numbers, numbers), counts.architecture.sizes.depth)
    first = FilterStage(sweep, sweep.filter).all_units(counts.facts.count)
    return [work.stage.cost(work, counts) for work in (first, *later)]


def _measured_rate(sweep: Sweep, architecture: Architecture) -> float:
    device = as_device(sweep.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = sweep.dtype or getattr(architecture.model.config, "dtype", None) or torch.float32
    return matmul_rate(architecture.sizes.hidden, as_dtype(dtype), device)


def _assumed(sweep: Sweep, known: int | None) -> list[str]:
    lines = ["filter: all facts are taken to go on, which is the most it can be; --known N says how many do"]
    if known is not None:
        lines = [f"filter: {known:,} facts are taken to go on (--known), all of them to be erased where that is asked"]
    if any(getattr(sweep, name, None) is not None for name in ("edit", "sequence")):
        steps = "every one takes all its steps, though it may stop early; inverting second moments is left out"
        lines.append(f"edits: {steps}")
        if sweep.moments.tokens == "all":
            tokens = "of ten tokens for every component of a key, since it is not known how many there are"
            lines.append(f"second moments: {tokens}")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 or not hours else f"{hours:.1g}"


def _bytes(count: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB"
