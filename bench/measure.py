"""Times the engine and, beside it, the naive way, and measures the memory and the matrix-product rate they had."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from naive import NaiveRun, oracle
from naive import measure as naive_run

from causalcone import Fact, Tracer
from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Sizes
from causalcone.kernels.linear import Linear
from causalcone.kernels.tiles import Tiles

NAIVE = (
    "for every state, layer and prompt token one forward of the clean and all corrupted sequences, with hooks, "
    "all layers, all tokens and all logits"
)
EFFICIENCY = (
    "FLOPs of all projections and the unembedding as executed / (seconds x matmul rate); the rate is the best measured "
    "in the same run over the model's projection shapes, in the same dtype and on the same device"
)

Values = dict[tuple[str, str, int, int, int], float]
"""Restored probabilities by (fact id, kind, window, layer, token)."""


@dataclass(frozen=True)
class Study:
    """What is traced: all prompt tokens of the facts, in every layer. ``sigma`` is a number, so that every dtype and
    every way gets the same noise."""

    facts: Sequence[Fact]
    sigma: float
    states: tuple[tuple[str, int], ...] = (("hidden", 1), ("mlp", 10), ("attn", 10))
    samples: int = 10

    @property
    def arguments(self) -> dict[str, Any]:
        return {"facts": self.facts, "states": self.states, "samples": self.samples, "sigma": self.sigma}


NaiveWay = Callable[[Any, Any, Study], NaiveRun]


def measure_both(
    model: Any,
    tokenizer: Any,
    study: Study,
    naive: NaiveWay | None,
    *,
    row_counts: Sequence[int],
    warm_up: Study | None = None,
    repeats: int = 1,
    memory: str | None = None,
) -> tuple[dict[str, Any], Values]:
    """One result in the model's dtype and on its device, as it goes into the JSON, and the engine's values.
    ``warm_up`` is traced first, the study itself if there is none."""
    sizes, dtype, device = read_architecture(model).sizes, model.dtype, model.device
    rates = [matmul_rate(sizes, dtype, device, row_counts)]
    result, values = measure_engine(model, tokenizer, study, warm_up or study, repeats, memory)
    measured = measure_naive(model, tokenizer, study, naive, values) if naive else None
    rates.append(matmul_rate(sizes, dtype, device, row_counts))

    best = max(rates, key=lambda rate: rate["flops_per_second"])
    result["matmul"] = best
    result["efficiency"] = result["flops"] / (result["seconds"] * best["flops_per_second"])
    if measured:
        measured["efficiency"] = result["naive_flops"] / (measured["seconds"] * best["flops_per_second"])
        result["ratio_to_naive_same_dtype"] = measured["seconds"] / result["seconds"]
    result["naive"] = measured
    return result, values


def measure_engine(
    model: Any, tokenizer: Any, study: Study, warm_up: Study, repeats: int, memory: str | None
) -> tuple[dict[str, Any], Values]:
    """Each timed trace has a tracer of its own, so that it compiles its plans and checks the model itself."""
    device = model.device
    say(f"  engine, {_name(model.dtype)}: {len(study.facts)} facts")
    peak = PeakMemory(device)
    seconds = []
    with peak:
        Tracer(model, tokenizer, memory=memory).trace(**warm_up.arguments)
        for _ in range(repeats):
            tracer = Tracer(model, tokenizer, memory=memory)
            synchronize(device)
            began = time.perf_counter()
            table = tracer.trace(**study.arguments)
            seconds.append(time.perf_counter() - began)
    tracer = Tracer(model, tokenizer, memory=memory)
    began = time.perf_counter()
    plan = tracer.plan(**study.arguments)
    planning = time.perf_counter() - began

    typical = statistics.median(seconds)
    columns = [table[name].to_pylist() for name in ("fact_id", "kind", "window", "layer", "token")]
    values = dict(zip(zip(*columns, strict=True), table["p_patched"].to_pylist(), strict=True))
    effects = table["p_patched"].to_numpy() / table["p_corrupted"].to_numpy() - 1
    result = {
        "dtype": _name(model.dtype),
        "facts": plan.facts,
        "restorations": len(values),
        "seconds": typical,
        "seconds_of_repeats": seconds,
        "facts_per_second": plan.facts / typical,
        "planning_seconds": planning,
        "passes": plan.passes,
        "rows": plan.rows,
        "flops": plan.flops,
        "attention_flops": plan.attention_flops,
        "naive_flops": plan.naive_flops,
        "flops_ratio": plan.naive_flops / plan.flops,
        "peak_bytes": peak.growth,
        "predicted_peak_bytes": plan.peak_bytes,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "largest_relative_effect": float(abs(effects).max()),
    }
    return result, values


def measure_naive(model: Any, tokenizer: Any, study: Study, naive: NaiveWay, values: Values) -> dict[str, Any]:
    say(f"  naive, {_name(model.dtype)}")
    peak = PeakMemory(model.device)
    with peak:
        run = naive(model, tokenizer, study)
    theirs = {(fact, r.kind, r.window, r.layer, r.token): p for (fact, r), p in run.p_patched.items()}
    return {
        "dtype": _name(model.dtype),
        "restorations": run.restorations,
        "restorations_timed": len(theirs),
        "scaled": len(theirs) < run.restorations,
        "seconds_timed": run.seconds,
        "seconds": run.projected_seconds,
        "facts_per_second": len(study.facts) / run.projected_seconds,
        "peak_bytes": peak.growth,
        "engine_difference": deviation(values, theirs),
    }


def naive_fraction(fraction: float) -> NaiveWay:
    """The naive way on an evenly spaced part of the restorations; on all of them for 1."""

    def run(model: Any, tokenizer: Any, study: Study) -> NaiveRun:
        if fraction == 1:
            return naive_run(model, tokenizer, **study.arguments)
        work = []
        for fact in study.facts:
            case = oracle.encode(model, tokenizer, fact, "label")
            noise = study.sigma * oracle.draw(model, case, study.samples, seed=1)
            work += [(case, noise, each) for each in oracle.restorations(model, case, study.states, "all")]
        count = max(1, round(fraction * len(work)))
        chosen = [work[index * len(work) // count] for index in range(count)]

        oracle.probabilities(model, *chosen[0])  # warm up
        timed = NaiveRun(restorations=len(work))
        began = time.perf_counter()
        for case, noise, restoration in chosen:
            _, *patched = oracle.probabilities(model, case, noise, restoration)
            timed.p_patched[case.fact_id, restoration] = sum(patched) / len(patched)
        timed.seconds = time.perf_counter() - began
        return timed

    return run


def naive_seconds(seconds: float) -> NaiveWay:
    """The naive way on restorations in random order until the time is up."""
    return lambda model, tokenizer, study: naive_run(model, tokenizer, **study.arguments, seconds=seconds)


def deviation(values: Values, reference: Values) -> dict[str, Any]:
    """The largest differences over the restorations that both hold. With random weights a target's probability is
    about one in the vocabulary's size, so that only the relative one says something."""
    pairs = [(values[key], p) for key, p in reference.items() if key in values]
    return {
        "restorations": len(pairs),
        "largest": max(abs(ours - p) for ours, p in pairs),
        "largest_relative": max(abs(ours - p) / p for ours, p in pairs),
    }


def matmul_rate(sizes: Sizes, dtype: torch.dtype, device: torch.device, row_counts: Sequence[int]) -> dict[str, Any]:
    """The highest rate of a matrix product over the model's projections, by the engine's product and by torch's."""
    D, heads, inner = sizes.hidden, sizes.heads * sizes.head_dim, sizes.inner
    readout = min(sizes.vocabulary, Tiles().vocabulary)
    projections = [(D, heads), (D, 2 * heads), (D, inner), (inner, D), (D, readout)]
    best: dict[str, Any] = {"flops_per_second": 0.0}
    for wide, out in dict.fromkeys(projections):
        weight = torch.randn(out, wide, device=device).to(dtype)
        bias = torch.zeros(out, dtype=dtype, device=device)
        prepared = Linear(weight.t().contiguous().t(), bias)  # as GPT-2 lays its weights out
        for count in row_counts:
            rows = torch.randn(count, wide, device=device).to(dtype)
            for form, product in (("engine", prepared), ("torch", lambda x, w=weight, b=bias: F.linear(x, w, b))):
                rate = 2 * count * wide * out / _best_seconds(product, rows)
                if rate > best["flops_per_second"]:
                    best = {"flops_per_second": rate, "product": form, "rows": count, "in": wide, "out": out}
    return best


@torch.inference_mode()
def _best_seconds(product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> float:
    calls = 5 if rows.device.type == "cuda" else 1  # launches are not to be waited for one by one
    product(rows)
    times = []
    for _ in range(3):
        synchronize(rows.device)
        began = time.perf_counter()
        for _ in range(calls):
            product(rows)
        synchronize(rows.device)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


class PeakMemory:
    """Growth of memory in use, while inside, over that at creation: the GPU's allocations, or the process's resident
    set, sampled every few milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._done = threading.Event()
        gc.collect()
        if sys.platform == "linux":  # glibc keeps freed memory, which would hide growth
            ctypes.CDLL(None).malloc_trim(0)
        self.baseline = self.peak = self._in_use()

    @property
    def growth(self) -> int:
        return self.peak - self.baseline

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._in_use())

    def _in_use(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._process.memory_info().rss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(text: str) -> None:
    """Progress, beside the table on standard output."""
    print(text, file=sys.stderr, flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
