"""The time and memory that a plan will take on this machine."""

import time

import torch
from rich.table import Table

from causalcone.engine.localize.tracer import TracePlan, Tracer
from causalcone.kernels.linear import Linear

USUAL_EFFICIENCY = 0.7
VERIFYING = 2
"""Times that the weights are read to compare the engine with the model's own forward."""
_ROWS = 1024
_SECONDS = 0.3


def matmul_rate(hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of products with a (hidden, hidden) weight, measured for a moment."""
    weight = torch.randn(hidden, hidden, device=device).to(dtype)
    rows = torch.randn(_ROWS, hidden, device=device).to(dtype)
    product = Linear(weight, None)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        _wait(device)
        started = time.perf_counter()
        product(rows)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _ROWS * hidden * hidden / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forecast_table(tracer: Tracer, plan: TracePlan) -> Table:
    """A plan's numbers, and the time they predict at this machine's measured rates."""
    with tracer.session.computing():
        rate = matmul_rate(tracer.session.sizes.hidden, tracer.dtype, tracer.device)
    read_rate = tracer.session.architecture.read_rate()
    table = Table(show_header=False)
    table.add_row("facts", f"{plan.facts:,}")
    table.add_row("passes", f"{plan.passes:,}")
    table.add_row("rows (all layers)", f"{plan.rows:,}")
    table.add_row("operations", f"{plan.flops:.4g} FLOP")
    table.add_row("of published code", f"{plan.naive_flops:.4g} FLOP ({plan.naive_flops / max(1, plan.flops):.1f}x)")
    extent = "beside the model" if read_rate is None else "in all"
    table.add_row("peak memory", f"{plan.peak_bytes / 2**20:,.0f} MiB {extent}")
    rates = f"{rate / 1e9:,.0f} GFLOP/s and {USUAL_EFFICIENCY:.0%} efficiency"
    if read_rate is not None:
        read = (plan.passes + VERIFYING) * plan.read_bytes
        table.add_row("reading", f"{plan.read_bytes / 2**20:,.0f} MiB a pass, {read / 2**30:,.1f} GiB in all")
        rates += f", reading {read_rate / 2**20:,.0f} MiB/s"
    table.add_row("time", f"about {_duration(predicted_seconds(plan, rate, read_rate))} at {rates}")
    return table


def predicted_seconds(plan: TracePlan, rate: float, read_rate: float | None = None) -> float:
    """Seconds at ``rate`` operations and ``read_rate`` bytes per second. Streamed weights are read while a pass
    computes, the longer counts; reads that verify the engine have no computation beside them."""
    computing = plan.flops / (USUAL_EFFICIENCY * rate)
    if read_rate is None:
        return computing
    reading = plan.read_bytes / read_rate
    return VERIFYING * reading + max(computing, plan.passes * reading)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
