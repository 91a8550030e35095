"""What a sweep will take: FLOPs, hours and disk of each stage, without weights, facts or a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from causalcone.engine.compute import as_device, as_dtype
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Architecture
from causalcone.runners.show.forecast import USUAL_EFFICIENCY, matmul_rate
from causalcone.runners.sweep import units
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.forecast.facts import facts_of
from causalcone.runners.sweep.forecast.flop_counts import Counting, StageCost
from causalcone.runners.sweep.forecast.model_outline import model_outline

EDITING_EFFICIENCY = 0.4
"""Of editing, of scoring, and of what models write: FLOPs / (seconds x the rate of matrix products). Like
``USUAL_EFFICIENCY``, of tracing, it was measured on two CPU cores with GPT-2's shape (bench/RESULTS.md): fine-tuning
reached less (29% and 15%), and a model too small to fill the cores does too. On a GPU it was not measured."""

EFFICIENCIES = dict.fromkeys((units.MOMENTS, units.TRACE, units.SEVER, units.ZERO), USUAL_EFFICIENCY)
"""By stage; of the others, that of editing."""

ROW_BYTES = {
    "facts": 1100, "filter": 140, "traces": 16, "gradients": 26, "edits": 160, "probes": 30, "metrics": 16,
}  # fmt: skip
"""Of a row of each table in zstd-compressed Parquet, measured on a sweep of the demo model."""

FILE_BYTES = 2500
"""Of a Parquet file besides its rows, measured likewise."""


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take. flops: floating-point operations; hours: of the device; disk: bytes of results."""

    name: str
    units: int
    items: int
    unit: str
    flops: float
    hours: float
    disk: float


@dataclass(frozen=True)
class Forecast:
    """What a sweep will take. rate: FLOP/s of the device's matrix products; lines: in words, what was assumed."""

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
    """What a sweep will take.

    rate: FLOP/s of the device's matrix products, measured here and now by default; known: how many facts pass the
    filter, all by default. Raises ``ExperimentError`` naming what the sweep asks and the model does not have, and
    ``shape`` where the model's config cannot be had.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise ExperimentError(f"--rate is {rate:g}; give operations per second, such as 300e12")
    architecture = model_outline(sweep)
    facts = facts_of(sweep, architecture.sizes)
    taken = Counting(sweep, architecture, facts, known).stages()
    told = "a given rate" if rate is not None else "measured here"
    found = rate if rate is not None else _measured_rate(sweep, architecture)
    pace = (
        f"hours: at {found / 1e12:.4g} TFLOP/s ({told}), of which {USUAL_EFFICIENCY:.0%} are reached in tracing and "
        f"{EDITING_EFFICIENCY:.0%} in editing; that was measured on two CPU cores"
    )
    lines = (*facts.lines, _going_on(sweep, known), *_more(sweep), pace)
    return Forecast(tuple(_forecast(each, found) for each in taken), found, lines)


def _forecast(taken: StageCost, rate: float) -> StageForecast:
    stage = taken.stage
    efficiency = EFFICIENCIES.get(stage.name, EDITING_EFFICIENCY)
    rows = sum(ROW_BYTES[table] * count for table, count in (taken.rows or {}).items())
    files = FILE_BYTES * sum(len(unit.files) for unit in stage.units)
    return StageForecast(
        stage.title, len(stage.units), stage.items, stage.unit, taken.flops, taken.flops / (efficiency * rate) / 3600,
        rows + files + taken.other_bytes,
    )  # fmt: skip


def _measured_rate(sweep: Sweep, architecture: Architecture) -> float:
    device = as_device(sweep.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = sweep.dtype or getattr(architecture.model.config, "dtype", None) or torch.float32
    return matmul_rate(architecture.sizes.hidden, as_dtype(dtype), device)


def _going_on(sweep: Sweep, known: int | None) -> str:
    if known is not None:
        return f"filter: {known:,} facts are taken to go on (--known), all of them to be erased where that is asked"
    return "filter: all facts are taken to go on, which is the most it can be; --known N says how many do"


def _more(sweep: Sweep) -> list[str]:
    """What else was assumed."""
    if sweep.edit is None:
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
