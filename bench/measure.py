"""Times the engine and, beside it, the naive ways, and measures the memory and the matrix-product rate they had."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from naive import SEARCH_SECONDS, Limits, NaiveRun, fastest, timed
from studies import Study, Values, key_of

from causalcone import Tracer
from causalcone.engine.localize.tracer import TracePlan
from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Sizes
from causalcone.kernels.linear import Linear
from causalcone.kernels.tiles import Tiles

EFFICIENCY = (
    "FLOPs of all projections and the unembedding as executed / (seconds x matmul rate); the rate is the best measured "
    "in the same run over the model's projection shapes, in the same dtype and on the same device"
)


def measure_both(
    model: Any,
    tokenizer: Any,
    study: Study,
    limits: Limits,
    *,
    row_counts: Sequence[int],
    warm_up: Study | None,
    repeats: int = 1,
    memory: str | None = None,
) -> tuple[dict[str, Any], Values]:
    """One result in the model's dtype and on its device, as it goes into the JSON, and the engine's values. The engine
    does ``warm_up`` first, if it is not warm; of the naive ways, batched and as published, which repeat themselves,
    ``limits`` say how much is timed."""
    sizes, dtype, device = read_architecture(model).sizes, model.dtype, model.device
    rates = [matmul_rate(sizes, dtype, device, row_counts)]
    result, values = measure_engine(model, tokenizer, study, warm_up, repeats, memory)
    ways = measure_naive(model, tokenizer, study, limits, values)
    rates.append(matmul_rate(sizes, dtype, device, row_counts))

    best = max(rates, key=lambda rate: rate["flops_per_second"])
    result["matmul"] = best
    for way in (result, *ways.values()):
        way["efficiency"] = way["flops"] / (way["seconds"] * best["flops_per_second"]) if "flops" in result else None
    for name, way in ways.items():
        result[f"ratio_to_{name}_same_dtype"] = way["seconds"] / result["seconds"]
    return result | ways, values


def measure_engine(
    model: Any, tokenizer: Any, study: Study, warm_up: Study | None, repeats: int, memory: str | None
) -> tuple[dict[str, Any], Values]:
    """Each timed run has a tracer of its own, so that it compiles its plans and checks the model itself."""
    device = model.device
    say(f"  engine, {_name(model.dtype)}: {len(study.facts)} facts")
    peak = PeakMemory(device)
    seconds = []
    with peak:
        if warm_up:
            warm_up.compute(Tracer(model, tokenizer, memory=memory))
        for _ in range(repeats):
            tracer = Tracer(model, tokenizer, memory=memory)
            synchronize(device)
            began = time.perf_counter()
            table = study.compute(tracer)
            seconds.append(time.perf_counter() - began)
    tracer = Tracer(model, tokenizer, memory=memory)
    began = time.perf_counter()
    plan = study.plan(tracer)
    planning = time.perf_counter() - began

    typical = statistics.median(seconds)
    values = study.values(table)
    result = {
        "dtype": _name(model.dtype),
        "facts": len(study.facts),
        "restorations": len(values),
        "seconds": typical,
        "seconds_of_repeats": seconds,
        "facts_per_second": len(study.facts) / typical,
        "peak_bytes": peak.growth,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "largest_relative_effect": study.effect(table),
    }
    if plan:
        result |= {"planning_seconds": planning, **planned(plan)}
    say(f"    {typical:.1f} s")
    return result, values


def planned(plan: TracePlan) -> dict[str, Any]:
    return {
        "passes": plan.passes,
        "rows": plan.rows,
        "flops": plan.flops,
        "attention_flops": plan.attention_flops,
        "naive_flops": plan.naive_flops,
        "flops_ratio": plan.naive_flops / plan.flops,
        "predicted_peak_bytes": plan.peak_bytes,
    }


def measure_naive(
    model: Any, tokenizer: Any, study: Study, limits: Limits, values: Values
) -> dict[str, dict[str, Any]]:
    """The naive way, batched as is fastest, and as published: a result of each."""
    few = partial(study.typical().naive_work, model, tokenizer)
    longest = (limits.get("seconds") or 4 * SEARCH_SECONDS) / 4
    results = {}
    for name, search in (("naive", partial(fastest, few, longest)), ("published", lambda: None)):
        say(f"  {name}, {_name(model.dtype)}")
        peak = PeakMemory(model.device)
        with peak:
            together = search()
            run = timed(study.naive_work(model, tokenizer, together), **limits)
        results[name] = {"dtype": _name(model.dtype), "together": together, **measured(run, model, study, values)}
        results[name]["peak_bytes"] = peak.growth
    return results


def measured(run: NaiveRun, model: Any, study: Study, values: Values) -> dict[str, Any]:
    """flops: of the projections and of the unembedding in forwards."""
    sizes = read_architecture(model).sizes
    layers, unembedding = sizes.depth * sizes.layer_weights, sizes.hidden * sizes.vocabulary
    theirs = {key_of(fact, restoration): value for (fact, restoration), value in run.p_patched.items()}
    sequences = max(task.sequences for task in run.work)
    say(f"    {run.projected_seconds:.1f} s, from {len(theirs)} of {run.restorations} values, {sequences} sequences")
    return {
        "sequences": sequences,
        "restorations": run.restorations,
        "restorations_timed": len(theirs),
        "scaled": len(theirs) < run.restorations,
        "seconds_timed": run.seconds,
        "seconds": run.projected_seconds,
        "facts_per_second": len(study.facts) / run.projected_seconds,
        "flops": 2 * sum(task.tokens * layers + task.logits * unembedding for task in run.work),
        "engine_difference": deviation(values, theirs),
    }


def deviation(values: Values, reference: Values) -> dict[str, Any]:
    """The largest differences over the restorations that both hold. With random weights a target's probability is
    about one in the vocabulary's size, so that only the relative one says something. Zero is to be met exactly."""
    pairs = [(values[key], p) for key, p in reference.items() if key in values]
    return {
        "restorations": len(pairs),
        "largest": max(abs(ours - p) for ours, p in pairs),
        "largest_relative": max(abs(ours - p) / max(abs(p), sys.float_info.min) for ours, p in pairs),
    }


def matmul_rate(sizes: Sizes, dtype: torch.dtype, device: torch.device, row_counts: Sequence[int]) -> dict[str, Any]:
    """The highest rate of a matrix product over the model's projections, by the engine's product and by torch's. A CPU
    may be shared, so that it is measured anew each time; a GPU's rate is measured once."""
    measured = _measured_rate if device.type == "cpu" else _measured_rate_once
    return measured(sizes, dtype, device, tuple(row_counts))


def _measured_rate(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, row_counts: tuple[int, ...]
) -> dict[str, Any]:
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
            forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"engine": prepared}
            if prepared.packed is not None:  # else it is torch's
                forms["torch"] = lambda x, w=weight, b=bias: F.linear(x, w, b)
            for form, product in forms.items():
                rate = 2 * count * wide * out / _best_seconds(product, rows)
                if rate > best["flops_per_second"]:
                    best = {"flops_per_second": rate, "product": form, "rows": count, "in": wide, "out": out}
    return best


_measured_rate_once = cache(_measured_rate)


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
