"""Times tracing and editing on a GPU in shapes of large models with random weights: ``python bench/gpu.py``.

Causal tracing in the shapes of GPT2-XL, GPT-J-6B and Llama-3-8B; ROME, MEMIT, fine-tuning and scoring in that of
GPT-J-6B. No files are needed: weights are made on the device, prompts are random tokens with the lengths of
CounterFact's. How many facts are traced follows from ``--seconds`` and the device's speed. The naive way is timed on a
sample of its restorations, and of its edits, and scaled. At last each kernel, beside its torch form.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import torch
from editing_methods import METHODS, Setup
from editing_studies import (
    EFFICIENCY as EDITING_EFFICIENCY,
    NAIVE,
    NOTE as EDITING_NOTE,
    measure as measure_editing,
    measure_scoring,
)
from editing_workload import NOWHERE, editable_model, editing_workload, second_moments
from kernel_times import kernel_report, kernel_table
from large_models import MODELS, config_of, lacking, rounded, shape_of
from measure import EFFICIENCY, deviation, measure_both, say
from naive import RESTORING, Limits
from report import device_name, editing, environment, markdown, record, write_json
from studies import Tracing, Values
from workload import LENGTHS, describe_prompts, generated, random_model

from causalcone import Tracer
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.windows import Window

NOTE = "Architectures are the models' own, weights are random"
SOURCE = "random tokens with the lengths of CounterFact's first 20"
EDITED = "GPT-J-6B"
EDITED_LAYERS = {"rome": (4, 12, 20), "finetune": (4, 12, 20), "memit": (12,)}
"""By method: more layers of MEMIT would need the second moments of more windows than a device has room for."""
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
    results: list[dict[str, Any]] = []
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
    for name in options.models:
        say(f"{name} on {device_name(device)}")
        for result in measured(measure_model(name, device, options), {"model": name}):
            results.append(result)
            kept(report, "gpu", device, options)
        release(device)
    written(report, f"{markdown(report)}\n{NOTE}.\n", "gpu", device, options)


def edit(device: torch.device, options: argparse.Namespace) -> None:
    """Every method in the shape of GPT-J-6B, with a result per method and dtype."""
    say(f"Editing, {EDITED} on {device_name(device)}")
    config, shape = config_of(EDITED, options.toy), shape_of(EDITED, options.toy)
    work = editing_workload(NOWHERE, options.edit_facts, shape["vocab_size"])
    results: list[dict[str, Any]] = []
    report = {
        "title": f"Editing in the shape of a large model, {device_name(device)}{', toy' * options.toy}",
        **environment(device),
        "shape": shape,
        "prompts": describe_prompts(work.facts, work.tokenizer, SOURCE),
        "given": f"{EDITED}, random weights; {len(work.contexts.rome)} contexts",
        "naive": NAIVE,
        "efficiency": EDITING_EFFICIENCY,
        "note": f"{EDITING_NOTE}. {NOTE}",
        "results": results,
    }
    model: Any = None
    moments: dict[int, torch.Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        named = {"name": str(dtype).removeprefix("torch.")}
        reason = lacking(config, dtype, device) if model is None else None
        if reason:
            results.append({**named, "skipped": reason})
            continue
        model = editable_model(config, dtype, device) if model is None else rounded(model, dtype)
        moments = moments or second_moments(model, moment_layers(options.toy))
        setup = Setup(model, work.tokenizer, work.facts, (), work.contexts, moments, options.memory)
        for result in measured(measure_edits(setup, options), named):
            results.append(result)
            kept(report, "gpu-editing", device, options)
    written(report, editing(report), "gpu-editing", device, options)


def measured(results: Iterator[dict[str, Any]], named: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results, as far as they come; what ends them is one more, so that none that is there is lost."""
    try:
        yield from results
    except Exception as error:
        traceback.print_exc()
        yield {**named, "skipped": f"{type(error).__name__}: {error}"}


def measure_edits(setup: Setup, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result per method, and one of scoring ROME's edits, in the model's dtype."""
    limits: Limits = {"fraction": 0.0, "least": options.naive_edits}
    made: list[Edit] = []
    for key in EDITED_LAYERS:
        say(f"{METHODS[key].title}, {setup.dtype}")
        here = replace(setup, layers=edited_layers(key, options.toy))
        result, edits = measure_editing(METHODS[key], here, limits, row_counts(options))
        made = edits if key == "rome" else made
        yield per_edit({"name": f"{METHODS[key].title}, {setup.dtype}", **result})
        release(setup.device)
    here = replace(setup, layers=edited_layers("rome", options.toy))
    scored = measure_scoring(here, made, limits, row_counts(options))
    yield per_edit({"name": f"scoring ROME's edits, {setup.dtype}", **scored})


def per_edit(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "seconds_per_edit": result["seconds"] / result["edits"]}


def edited_layers(method: str, toy: bool) -> tuple[int, ...]:
    return (0,) if toy else EDITED_LAYERS[method]


def moment_layers(toy: bool) -> list[int]:
    """Those whose second moments ROME and MEMIT need."""
    depth = config_of(EDITED, toy).num_hidden_layers
    windows = [Window.around(layer, METHODS["memit"].window, depth).layers for layer in edited_layers("memit", toy)]
    return sorted({*edited_layers("rome", toy), *(layer for window in windows for layer in window)})


def kernels(device: torch.device, options: argparse.Namespace) -> None:
    """Every operation that has a kernel, in its two forms."""
    say(f"Kernels on {device_name(device)}")
    report = kernel_report(device, options.toy)
    written(report, kernel_table(report), "gpu-kernels", device, options)


PARTS = {"tracing": trace, "editing": edit, "kernels": kernels}


def written(report: dict[str, Any], text: str, name: str, device: torch.device, options: argparse.Namespace) -> None:
    """Print the text and put it into the page, if asked for; the report goes into a file of its own."""
    print(text)
    say(f"written to {kept(report, name, device, options)}")
    if options.record:
        record(text, f"{name.replace('-', ' ')} {slug(device)}")


def kept(report: dict[str, Any], name: str, device: torch.device, options: argparse.Namespace) -> Path:
    """Write the report as it is by now into its file."""
    return write_json(report, options.out, f"{name}-{slug(device)}" + "-toy" * options.toy)


def slug(device: torch.device) -> str:
    return re.sub(r"\W+", "-", device_name(device)).lower()


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_model(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result per dtype. Bfloat16 weights are the float32 weights rounded, where the device has room for those."""
    shape = shape_of(name, options.toy)
    facts, tokenizer = generated(options.facts, shape["vocab_size"])
    config = config_of(name, options.toy)
    model, sigma, exact = None, 0.0, None
    for dtype in (torch.float32, torch.bfloat16):
        reason = lacking(config, dtype, device) if model is None else None
        if reason:
            yield {"model": name, "dtype": str(dtype).removeprefix("torch."), "skipped": reason}
            continue
        model = random_model(config, dtype, device) if model is None else rounded(model, dtype)
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
        per_fact = {"seconds_per_fact": result["seconds"] / result["facts"]}
        yield {"model": name, "prompts": prompts, "sigma": sigma, **per_fact, **result}


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
    return int(count / len(LENGTHS)) * len(LENGTHS) or max(FEW, int(count))


def compare(result: dict[str, Any], values: Values, exact: tuple[dict[str, Any], Values] | None) -> None:
    """Put a result beside that in float32. That may be of fewer facts; the naive way takes as long per FLOP."""
    if exact is None:
        return
    reference, exact_values = exact
    seconds = reference["naive"]["seconds"] * result["naive_flops"] / reference["naive_flops"]
    result["ratio_to_naive_float32"] = seconds / result["seconds"]
    if result is not reference:
        result["deviation_from_float32"] = deviation(values, exact_values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a torch device (cuda)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured (all)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--facts", type=int, default=400, help="the most facts to trace (400)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the engine, per model and dtype (20)")
    parser.add_argument("--naive-seconds", type=float, default=8.0, help="for the naive way, per model and dtype (8)")
    parser.add_argument("--edit-facts", type=int, default=10, help="facts that are edited at each layer (10)")
    parser.add_argument("--naive-edits", type=int, default=2, help="edits of the naive way, per dtype (2)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--memory", help="memory for a pass, such as 20GiB (half of what is free)")
    command.add_output(parser, "tiny models, to try the script: --device cpu --toy")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; try the script with --device cpu --toy")
    if min(options.facts, options.samples, options.edit_facts, options.naive_edits) < 1:
        parser.error("--facts, --samples, --edit-facts and --naive-edits are whole numbers from 1 up")
    return options


if __name__ == "__main__":
    main()
