"""Forecasts of sweeps: FLOPs, hours and disk of each stage, without weights, facts or a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

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

FILE_BYTES = 2500
"""Of a Parquet file besides its rows, measured on a sweep of the demo model."""


@dataclass(frozen=True)
class StageForecast:
    """The forecast of a stage. flops: floating-point operations; hours: of the device; disk: bytes of results."""

    name: str
    units: int
    items: int
    unit: str
    flops: float
    hours: float
    disk: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a sweep. rate: FLOP/s of the device's matrix products; lines: in words, what was assumed."""

    stages: tuple[StageForecast, ...]
    rate: float
    lines: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages)

    def table(self) -> Table:
        table = Table(show_footer=True)
        total = ("total", f"{sum(stage.units for stage in self.stages):,}", "")
        numbers = (f"{self.flops:.3g}", _hours(self.hours), _bytes(self.disk))
        for name, footer in zip(("stage", "units", "items", "FLOP", "hours", "disk"), (*total, *numbers), strict=True):
            table.add_column(name, footer, justify="left" if name == "stage" else "right")
        for stage in self.stages:
            counts = (f"{stage.units:,}", f"{stage.items:,} {stage.unit}")
            table.add_row(stage.name, *counts, f"{stage.flops:.3g}", _hours(stage.hours), _bytes(stage.disk))
        return table

    def show(self, console: Console) -> None:
        console.print(self.table())
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
    source = "a given rate" if rate is not None else "measured here"
    pace = rate if rate is not None else _measured_rate(sweep, architecture)
    hours = (
        f"hours: at {pace / 1e12:.4g} TFLOP/s ({source}), of which {USUAL_EFFICIENCY:.0%} are reached in tracing and "
        f"{EFFICIENCY:.0%} in editing; that was measured on two CPU cores"
    )
    lines = (*counts.facts.lines, _going_on(known), *_more(sweep), hours)
    return Forecast(tuple(_forecast(cost, pace) for cost in costs), pace, lines)


def stage_costs(sweep: Sweep, counts: Counts) -> list[StageCost]:
    """The costs of all stages, in the order in which they are carried out. Raises ``ExperimentError`` for layers or
    states that the model does not have."""
    numbers = tuple(range(counts.selected))
    later = later_units(stages_of(sweep).values(), Selection(numbers, numbers), counts.architecture.sizes.depth)
    first = FilterStage(sweep, sweep.filter).all_units(counts.facts.count)
    return [work.stage.cost(work, counts) for work in (first, *later)]


def _forecast(cost: StageCost, rate: float) -> StageForecast:
    work, stage = cost.work, cost.work.stage
    rows = sum(table.row_bytes * cost.rows.get(table.name, 0) for table in stage.tables)
    return StageForecast(
        name=work.title,
        units=len(work.units),
        items=work.items,
        unit=stage.item,
        flops=cost.flops,
        hours=cost.flops / (stage.efficiency * rate) / 3600,
        disk=rows + FILE_BYTES * sum(len(unit.files) for unit in work.units) + cost.other_bytes,
    )


def _measured_rate(sweep: Sweep, architecture: Architecture) -> float:
    device = as_device(sweep.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = sweep.dtype or getattr(architecture.model.config, "dtype", None) or torch.float32
    return matmul_rate(architecture.sizes.hidden, as_dtype(dtype), device)


def _going_on(known: int | None) -> str:
    if known is not None:
        return f"filter: {known:,} facts are taken to go on (--known), all of them to be erased where that is asked"
    return "filter: all facts are taken to go on, which is the most it can be; --known N says how many do"


def _more(sweep: Sweep) -> list[str]:
    """All else that was assumed."""
    if getattr(sweep, "edit", None) is None:
        return []
    lines = ["edits: every one takes all its steps, though it may stop early; inverting second moments is left out"]
    if sweep.moments.tokens == "all":
        lines.append(
            "second moments: of ten tokens for every component of a key, since it is not known how many there are"
        )
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 or not hours else f"{hours:.1g}"


def _bytes(count: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB"
