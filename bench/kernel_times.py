"""Times each operation that has a Triton form in both forms, in the sizes of a pass of a large model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import say, synchronize
from report import device_name, environment, measured, not_measured, where
from torch import Tensor

from causalcone.kernels.adam import AdamState
from causalcone.kernels.backends import TORCH, Backends, backends_of
from causalcone.kernels.gathering import NormedRows, RowSum
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import LayerNorm
from causalcone.kernels.rotary import RotaryFrequencies
from causalcone.kernels.row_attention import RunRows, ScoreRule, run_rows
from causalcone.kernels.transfer import Packet

TRITON = backends_of("triton", "triton")
LEAST_SECONDS, REPEATS = 0.2, 5


@dataclass(frozen=True)
class Shape:
    """Rows of a pass of width ``heads * head_dim``, of runs of ``tokens``; the MLP's keys are ``inner`` wide."""

    rows: int = 65_536
    heads: int = 16
    head_dim: int = 256
    tokens: int = 10
    inner: int = 16_384
    logit_rows: int = 8192
    vocabulary: int = 8192

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


TOY = Shape(rows=32, heads=2, head_dim=8, tokens=4, inner=24, logit_rows=8, vocabulary=16)


@dataclass(frozen=True)
class Operation:
    """What is timed: ``make`` gives, for a backend, a function without arguments, and the tensor that it fills. moved:
    bytes that have to be read and written."""

    name: str
    make: Callable[[Backends], tuple[Callable[[], None], Tensor]]
    moved: int


def kernels_about(device: torch.device, toy: bool) -> dict[str, Any]:
    """A report without its results."""
    shape = TOY if toy else Shape()
    return {
        "title": f"Kernels against their torch forms, {device_name(device)}{', toy' * toy}",
        **environment(device),
        "shape": {**vars(shape), "width": shape.width},
        "matmul_flops_per_second": matmul_rates(shape, device),
    }


def kernel_results(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Seconds of every operation in both forms; in torch alone where there is no CUDA device."""
    backends = {"torch": TORCH} | ({"triton": TRITON} if device.type == "cuda" else {})
    for dtype in (torch.float32, torch.bfloat16):
        for operation in operations(TOY if toy else Shape(), dtype, device):
            say(f"  {operation.name}, {dtype}")
            yield {"dtype": str(dtype).removeprefix("torch."), **compared(operation, backends, device)}


def matmul_rates(shape: Shape, device: torch.device) -> dict[str, float]:
    """FLOPs per second of the MLP's first product, by what multiplies: TF32 where there is such a thing."""
    ways = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False)}
    if device.type == "cuda":
        ways["TF32"] = (torch.float32, True)
    rates, before = {}, torch.backends.cuda.matmul.allow_tf32
    for name, (dtype, allowed) in ways.items():
        rows = torch.randn(min(shape.rows, 16_384), shape.width, device=device).to(dtype)
        weight = torch.randn(shape.width, shape.inner, device=device).to(dtype)
        out = torch.empty(len(rows), shape.inner, device=device, dtype=dtype)
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            seconds = timed(partial(torch.mm, rows, weight, out=out), device)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        rates[name] = 2 * len(rows) * shape.width * shape.inner / seconds
    return rates


def compared(operation: Operation, backends: dict[str, Backends], device: torch.device) -> dict[str, Any]:
    seconds, filled = {}, {}
    for name, own in backends.items():
        function, out = operation.make(own)
        function()
        filled[name] = out.to(torch.float64, copy=True)  # before it is filled again
        seconds[name] = timed(function, device)
    result: dict[str, Any] = {"name": operation.name, "seconds": seconds}
    result["bytes_per_second"] = {name: operation.moved / each for name, each in seconds.items()}
    if "triton" in seconds:
        result["ratio"] = seconds["torch"] / seconds["triton"]
        size = filled["torch"].abs().max().item()
        result["difference"] = (filled["torch"] - filled["triton"]).abs().max().item() / size
    return result


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call: the median of several runs of as many calls as take a while."""
    calls = 1
    while True:
        took = _seconds(function, calls, device)
        if took >= LEAST_SECONDS / REPEATS:
            break
        calls *= 2
    return statistics.median([took, *(_seconds(function, calls, device) for _ in range(REPEATS - 1))]) / calls


def _seconds(function: Callable[[], None], calls: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - began


@torch.inference_mode()
def operations(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Operation]:
    generator = torch.Generator(device).manual_seed(0)

    def rows(count: int, width: int) -> Tensor:
        return torch.randn(count, width, device=device, generator=generator).to(dtype)

    def places(*sizes: int) -> Tensor:
        return torch.randint(shape.rows, sizes, device=device, generator=generator)

    size, width, R = dtype.itemsize, shape.width, shape.rows
    for m in (1, shape.tokens // 2):
        yield attention(shape, m, rows, places)

    left, right, index = rows(R, width), rows(R, width), places(R)
    norm = LayerNorm(rows(1, width)[0], rows(1, width)[0], 1e-5)
    order = torch.arange(R, device=device)
    terms = RowSum(left, index, right, order)

    def add(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out = torch.empty_like(left)
        return lambda: own.add_rows(terms, out, R), out

    def add_normed(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out, normed = torch.empty_like(left), torch.empty_like(left)
        return lambda: own.add_normed(terms, out, NormedRows(order, order, norm, normed), R), normed

    def gather(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out = torch.empty_like(left)

        def run() -> None:
            out.copy_(own.gather_normed(left, index, norm))

        return run, out

    yield Operation("residual sum of gathered rows", add, 3 * R * width * size)
    yield Operation("the same and its norm", add_normed, 4 * R * width * size)
    yield Operation("gathered and normed rows, and a copy", gather, 4 * R * width * size)

    rotary = RotaryFrequencies(torch.rand(shape.head_dim // 2, device=device, generator=generator), 1.0)
    tokens = order % shape.tokens
    fewer = left[: R // 4]
    gating, inner = Linear(rows(shape.inner, width) / width**0.5, None, "silu"), rows(len(fewer), shape.inner)

    def turn(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out = torch.empty_like(left)

        def run() -> None:
            out.copy_(left)
            own.turn(out, tokens, rotary, shape.head_dim)

        return run, out

    def gate(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out = torch.empty_like(inner)

        def run() -> None:
            out.copy_(inner)
            own.gate(out, gating, fewer)

        return run, out

    yield Operation("a copy, and its heads turned by their positions", turn, 4 * R * width * size)
    yield Operation("a copy, and its gate with the product", gate, 6 * inner.nbytes)

    logits = rows(shape.logit_rows, shape.vocabulary)
    targets = torch.randint(shape.vocabulary, (shape.logit_rows,), device=device, generator=generator)

    def log_sums(own: Backends) -> tuple[Callable[[], None], Tensor]:
        total = torch.full((shape.logit_rows,), float("-inf"), dtype=torch.float64, device=device)
        found, spent = torch.zeros_like(total), logits.clone()

        def run() -> None:
            spent.copy_(logits)
            own.add_tile(spent, 0, None, targets, total, found)

        return run, total

    yield Operation("log-sums of a tile of logits, and a copy", log_sums, 3 * logits.nbytes)

    if dtype == torch.float32:
        slopes, keys = rows(R // 4096 or 1, width), rows(R // 4096 or 1, shape.inner)

        def step(own: Backends) -> tuple[Callable[[], None], Tensor]:
            # the mean is compared: Adam's first change is the gradient's sign, which rounding may turn near zero
            moving = AdamState.zeros_like(torch.empty(width, shape.inner, device=device), torch.float32)
            return lambda: own.step_weight(moving, slopes, keys, 5e-4, 1e-3), moving.mean

        yield Operation("step of fine-tuning", step, 6 * 4 * width * shape.inner)


def runs_together(query_rows: Tensor, key_rows: Tensor, tokens: tuple[int, ...]) -> RunRows[Tensor]:
    """Runs that query for the same tokens, from their query rows (B, m) and key rows (B, K)."""
    rows = run_rows([(query_rows.cpu().numpy(), key_rows.cpu().numpy(), tokens, True)])
    return Packet.of(rows, query_rows.device).send(query_rows.device)


def attention(shape: Shape, m: int, rows: Callable[..., Tensor], places: Callable[..., Tensor]) -> Operation:
    """Runs of which each has its last m tokens' rows for itself, and shares the others with nine runs more."""
    runs, K = shape.rows // shape.tokens, shape.tokens
    queries, keys_values = rows(shape.rows, shape.width), rows(shape.rows, 2 * shape.width)
    key_rows = places(runs, K)
    key_rows[:, : K - m] = key_rows[torch.arange(runs, device=key_rows.device) // 10 * 10, : K - m]
    query_rows = places(runs, m)
    together = runs_together(query_rows, key_rows, tuple(range(K - m, K)))
    scoring = ScoreRule(shape.head_dim, shape.head_dim**-0.5)
    tile = 262_144 if queries.device.type == "cuda" else 4096

    def make(own: Backends) -> tuple[Callable[[], None], Tensor]:
        out = queries.new_empty(runs * m, shape.width)
        return lambda: own.attend_rows(queries, keys_values, together, scoring, out, tile), out

    moved = (2 * runs * m + 2 * runs * m + 2 * runs // 10 * (K - m)) * shape.width * queries.element_size()
    return Operation(f"attention of {m} queries over {K} keys", make, moved)


def kernel_table(report: dict[str, Any]) -> str:
    """Milliseconds, and which share of the bytes that have to move is moved in a second."""
    shape = report["shape"]
    sizes = f"{shape['rows']:,} rows of width {shape['width']:,}, {shape['heads']} heads"
    lines = [
        f"### {report['title']}",
        "",
        f"{report['date']}, {where(report['machine'])}. {sizes}, runs of {shape['tokens']} tokens.",
        "",
        "| operation | dtype | torch, ms | Triton, ms | Triton against torch | Triton, GB/s | largest difference |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for result in measured(report):
        times, rates = result["seconds"], result["bytes_per_second"]
        cells = ["", "", "", ""]
        if "triton" in times:
            ratio, difference = f"{result['ratio']:.1f}x", f"{result['difference']:.1e}"
            cells = [f"{1e3 * times['triton']:.3f}", ratio, f"{rates['triton'] / 1e9:,.0f}", difference]
        lines.append(f"| {result['name']} | {result['dtype']} | {1e3 * times['torch']:.3f} | {' | '.join(cells)} |")
    note = "GB/s: bytes that have to be read and written, whatever a form moves besides. Differences: relative to the "
    rates = report["matmul_flops_per_second"].items()
    products = ", ".join(f"{rate / 1e12:,.3g} TFLOP/s in {name}" for name, rate in rates)
    products = f"Products of these rows with the MLP's weight: {products}. {note}largest value."
    return "\n".join([*lines, "", products, *not_measured(report), ""])
