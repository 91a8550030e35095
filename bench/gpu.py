"""Times tracing and editing on a GPU in shapes of large models with random weights: ``python bench/gpu.py``.

Causal tracing in the shapes of GPT2-XL and GPT-J-6B, and ROME in that of GPT-J-6B. No files are needed: weights are
made on the device, prompts are random tokens with the lengths of CounterFact's. The GPT-J shape has GPT-J-6B's sizes in
GPT-2's architecture. How many facts are traced follows from ``--seconds`` and the device's speed. The naive way is
timed on a sample of its restorations, and of its edits, and scaled.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from pathlib import Path
from typing import Any

import torch
from editing_methods import METHODS, Setup
from editing_studies import EFFICIENCY as EDITING_EFFICIENCY
from editing_studies import NAIVE
from editing_studies import NOTE as EDITING_NOTE
from editing_studies import measure as measure_editing
from editing_workload import NOWHERE, editable_model, editing_workload, second_moments
from measure import EFFICIENCY, deviation, measure_both, say
from naive import RESTORING, Limits
from report import RESULTS, device_name, editing, environment, markdown, record, write_json
from studies import Tracing, Values
from workload import LENGTHS, SHAPES, describe_prompts, generated, gpt2, random_model

from causalcone import Tracer
from causalcone.engine.memory import free_bytes

MODELS = ("GPT2-XL", "GPT-J-6B sizes")
NOTE = (
    "GPT-J-6B sizes: its depth, width, heads and vocabulary in GPT-2's architecture (sequential blocks, learned "
    "positions, tied embeddings); the matrix products have GPT-J's sizes"
)
TOY = {
    "GPT2-XL": {"n_layer": 3, "n_embd": 20, "n_head": 5, "vocab_size": 211},
    "GPT-J-6B sizes": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 223},
}
SOURCE = "random tokens with the lengths of CounterFact's first 20"
EDITED = "GPT-J-6B sizes"
EDITED_LAYERS = (4, 12, 20)
FEW = 2
"""Facts traced to warm up and to learn the device's speed."""


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    for part in options.parts:
        PARTS[part](device, options)
        release(device)


def trace(device: torch.device, options: argparse.Namespace) -> None:
    results = []
    for name in options.models:
        say(f"{name} on {device_name(device)}")
        results += measure_model(name, device, options)
        release(device)

    facts, tokenizer = generated(len(LENGTHS), vocabulary=1000)
    report = {
        "title": f"Causal tracing in the shapes of large models, {device_name(device)}{', toy' * options.toy}",
        **environment(device),
        "note": NOTE,
        "shapes": {name: shape_of(name, options.toy) for name in options.models},
        "prompts": describe_prompts(facts, tokenizer, SOURCE),
        "states": Tracing.states,
        "samples": options.samples,
        "naive": RESTORING,
        "efficiency": EFFICIENCY,
        "results": results,
    }
    written(report, f"{markdown(report)}\n{NOTE}.\n", "gpu", device, options)


def edit(device: torch.device, options: argparse.Namespace) -> None:
    """ROME in the shape of GPT-J-6B, with a result per dtype."""
    say(f"ROME, {EDITED} on {device_name(device)}")
    shape, layers = shape_of(EDITED, options.toy), (0,) if options.toy else EDITED_LAYERS
    work = editing_workload(NOWHERE, options.edit_facts, shape["vocab_size"])
    results: list[dict[str, Any]] = []
    model, moments = None, None
    for dtype in (torch.float32, torch.bfloat16):
        named = {"name": f"ROME, {str(dtype).removeprefix('torch.')}"}
        reason = lacking(shape, dtype, device) if model is None else None
        if reason:
            results.append({**named, "skipped": reason})
            continue
        model = editable_model(gpt2(shape), dtype, device) if model is None else model.to(dtype)
        moments = moments or second_moments(model, layers)
        setup = Setup(model, work.tokenizer, work.facts, layers, work.contexts, moments, options.memory)
        limits: Limits = {"fraction": 0.0, "least": options.naive_edits}
        result, _ = measure_editing(METHODS["rome"], setup, limits, row_counts(options))
        results.append({**named, "seconds_per_edit": result["seconds"] / result["edits"], **result})
    report = {
        "title": f"ROME in the shape of a large model, {device_name(device)}{', toy' * options.toy}",
        **environment(device),
        "shape": shape,
        "prompts": describe_prompts(work.facts, work.tokenizer, SOURCE),
        "given": f"{EDITED}, random weights; {len(work.contexts.rome)} contexts",
        "naive": NAIVE,
        "efficiency": EDITING_EFFICIENCY,
        "note": f"{EDITING_NOTE}. {NOTE}",
        "results": results,
    }
    written(report, editing(report), "gpu-editing", device, options)


PARTS = {"tracing": trace, "editing": edit}


def written(report: dict[str, Any], text: str, name: str, device: torch.device, options: argparse.Namespace) -> None:
    """Print the text and put it into the page, if asked for; the report goes into a file of its own."""
    print(text)
    slug = re.sub(r"\W+", "-", device_name(device)).lower()
    say(f"written to {write_json(report, options.out, f'{name}-{slug}' + '-toy' * options.toy)}")
    if options.record:
        record(text, f"{name.replace('-', ' ')} {slug}")


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_model(name: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A result per dtype. Bfloat16 weights are the float32 weights rounded, where the device has room for those."""
    shape = shape_of(name, options.toy)
    facts, tokenizer = generated(options.facts, shape["vocab_size"])
    results: list[dict[str, Any]] = []
    model, sigma, exact = None, 0.0, None
    for dtype in (torch.float32, torch.bfloat16):
        reason = lacking(shape, dtype, device) if model is None else None
        if reason:
            results.append({"model": name, "dtype": str(dtype).removeprefix("torch."), "skipped": reason})
            continue
        model = random_model(gpt2(shape), dtype, device) if model is None else model.to(dtype)
        sigma = sigma or Tracer(model, tokenizer).noise_level(facts)
        few = Tracing(facts[:FEW], sigma, samples=options.samples)
        count = facts_within(options.seconds, model, tokenizer, few, options.memory)
        study = Tracing(facts[:count], sigma, samples=options.samples)
        result, values = measure_both(
            model,
            tokenizer,
            study,
            {"seconds": options.naive_seconds},
            row_counts=row_counts(options),
            warm_up=few,
            memory=options.memory,
        )
        exact = exact or ((result, values) if dtype == torch.float32 else None)
        compare(result, values, exact)
        prompts = describe_prompts(study.facts, tokenizer, SOURCE)
        results.append({"model": name, "prompts": prompts, "sigma": sigma, **result})
    return results


def lacking(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the weights do not fit the device, if they do not."""
    needed, free = dtype.itemsize * parameters(shape), free_bytes(device)
    if 1.3 * needed <= free:
        return None
    return f"its weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"


def row_counts(options: argparse.Namespace) -> tuple[int, ...]:
    """Of the products whose rate is measured."""
    return (64, 256) if options.toy else (1024, 2048, 4096, 8192, 16384)


def facts_within(seconds: float, model: Any, tokenizer: Any, few: Tracing, memory: str | None) -> int:
    """How many facts can be traced in about that time, judged by a few: if possible whole rounds of ``LENGTHS``."""
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        few.compute(Tracer(model, tokenizer, memory=memory))
        took = time.perf_counter() - began
    count = len(few.facts) * seconds / took
    return len(LENGTHS) * round(count / len(LENGTHS)) or max(FEW, int(count))


def compare(result: dict[str, Any], values: Values, exact: tuple[dict[str, Any], Values] | None) -> None:
    """Put a result beside that in float32. That may be of fewer facts; the naive way takes as long per FLOP."""
    if exact is None:
        return
    reference, exact_values = exact
    seconds = reference["naive"]["seconds"] * result["naive_flops"] / reference["naive_flops"]
    result["ratio_to_naive_float32"] = seconds / result["seconds"]
    if result is not reference:
        result["deviation_from_float32"] = deviation(values, exact_values)


def shape_of(name: str, toy: bool) -> dict[str, int]:
    return TOY[name] if toy else SHAPES[name]


def parameters(shape: dict[str, int]) -> int:
    """Weights of the matrices and the embeddings, which is all that takes room."""
    width = shape["n_embd"]
    return shape["n_layer"] * 12 * width**2 + shape["vocab_size"] * width


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a torch device (cuda)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured (both)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--facts", type=int, default=400, help="the most facts to trace (400)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the engine, per model and dtype (60)")
    parser.add_argument("--naive-seconds", type=float, default=10.0, help="for the naive way, per model and dtype (10)")
    parser.add_argument("--edit-facts", type=int, default=20, help="facts that are edited at each layer (20)")
    parser.add_argument("--naive-edits", type=int, default=2, help="edits of the naive way, per dtype (2)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--memory", help="memory for a pass, such as 20GiB (half of what is free)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    parser.add_argument("--record", action="store_true", help="put the table into bench/RESULTS.md")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the script: --device cpu --toy")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; try the script with --device cpu --toy")
    if min(options.facts, options.samples, options.edit_facts, options.naive_edits) < 1:
        parser.error("--facts, --samples, --edit-facts and --naive-edits are whole numbers from 1 up")
    return options


if __name__ == "__main__":
    main()
