"""Times tracing and editing on a GPU in shapes of large models with random weights: ``python bench/gpu.py``.

Causal tracing in the shapes of GPT-J-6B, GPT2-XL and Llama-3-8B; ROME, its scoring, fine-tuning and MEMIT in that of
GPT-J-6B; each kernel beside its torch form. What matters most goes first, in bfloat16, float32 last. No files are
needed: weights are made on the device, prompts are random tokens with the lengths of CounterFact's. How many facts are
traced follows from ``--seconds`` and the device's speed. The naive ways are timed on a sample of their forwards, and of
their edits, and scaled. Results are written as they come, and after ``--minutes`` nothing new is begun.

Neither causalcone nor what its commands and its analysis need has to be installed: ``PYTHONPATH=. python bench/gpu.py``
in a checkout takes torch, triton, transformers, numpy, pyarrow and psutil.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
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
from editing_workload import NOWHERE, EditingWorkload, editable_model, editing_workload, second_moments
from kernel_times import kernel_results, kernel_table, kernels_about
from large_models import MODELS, config_of, lacking, rounded, shape_of
from measure import EFFICIENCY, deviation, measure_both, say
from naive import BATCHED, PUBLISHED, Limits
from report import device_name, editing, environment, markdown, record, write_json
from studies import Tracing, Values
from workload import LENGTHS, describe_prompts, generated, random_model

from causalcone import Tracer
from causalcone.engine.edit.requests.windows import Window

NOTE = "Architectures are the models' own, weights are random"
SOURCE = "random tokens with the lengths of CounterFact's first 20"
EDITED = "GPT-J-6B"
EDITED_LAYERS = {"rome": (4, 12, 20), "finetune": (4, 12, 20), "memit": (12,)}
"""By method: more layers of MEMIT would need the second moments of more windows than a device has room for."""
FEW = 2
"""Facts traced to warm up and to learn the device's speed."""
DTYPES = (torch.bfloat16, torch.float32)
BEFORE_EDITING = 2
"""So many models are traced in a dtype before models are edited in it, the others after."""

Results = Iterator[dict[str, Any]]
Step = tuple[str, dict[str, str], Callable[[], Results]]
"""A part, what is measured for it by name, and the results."""


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    reports = {part: REPORTS[part](device, options) for part in options.parts}
    ends = time.perf_counter() + 60 * options.minutes
    try:
        for part, named, results in steps(device, options):
            if part not in reports:
                continue
            say(f"{part}: {', '.join(named.values())}, {ends - time.perf_counter():.0f} s are left")
            for result in within(ends, results(), named):
                reports[part].add(result)
            release(device)
    finally:
        for report in reports.values():
            report.publish()


def steps(
    device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, str], Callable[[], Results]]]:
    """What is to be measured, in the order in which it matters."""
    tracing = Traces(device, options)

    def trace(name: str, dtype: torch.dtype) -> Step:
        return "tracing", {"model": name, "dtype": dtype_name(dtype)}, partial(tracing.measure, name, dtype)

    for dtype in DTYPES:
        for name in options.models[:BEFORE_EDITING]:
            yield trace(name, dtype)
        yield "editing", {"name": f"editing, {dtype_name(dtype)}"}, partial(measure_edits, device, options, dtype)
        for name in options.models[BEFORE_EDITING:]:
            yield trace(name, dtype)
        if dtype == DTYPES[0]:
            yield "kernels", {"name": "kernels"}, partial(kernel_results, device, options.toy)


def within(ends: float, results: Results, named: dict[str, str]) -> Results:
    """The results, as far as they come in time; what ends them is one more, so that none that is there is lost."""
    try:
        while time.perf_counter() < ends:
            yield next(results)
        yield {**named, "skipped": "the time was up"}
    except StopIteration:
        return
    except Exception as error:
        traceback.print_exc()
        yield {**named, "skipped": f"{type(error).__name__}: {error}".partition("\n")[0]}


@dataclass
class Report:
    """A report that is written into its file as it grows; ``text`` makes it one to read."""

    about: dict[str, Any]
    name: str
    text: Callable[[dict[str, Any]], str]
    options: argparse.Namespace
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.keep()

    def keep(self) -> Path:
        name = f"{self.name}-{slug(self.options)}" + "-toy" * self.options.toy
        return write_json({**self.about, "results": self.results}, self.options.out, name)

    def publish(self) -> None:
        """Print the text and put it into the page, if asked for."""
        text = self.text({**self.about, "results": self.results})
        print(text)
        say(f"written to {self.keep()}")
        if self.options.record:
            record(text, f"{self.name.replace('-', ' ')} {slug(self.options)}")


def trace_report(device: torch.device, options: argparse.Namespace) -> Report:
    facts, tokenizer = generated(len(LENGTHS), vocabulary=1000)
    about = {
        "title": f"Causal tracing in the shapes of large models, {device_name(device)}{', toy' * options.toy}",
        **environment(device),
        "note": NOTE,
        "shapes": {name: shape_of(name, options.toy) for name in options.models},
        "prompts": describe_prompts(facts, tokenizer, SOURCE),
        "states": Tracing.states,
        "samples": options.samples,
        "naive": BATCHED,
        "published": PUBLISHED,
        "efficiency": EFFICIENCY,
    }
    return Report(about, "gpu", lambda report: f"{markdown(report)}\n{NOTE}.\n", options)


def edit_report(device: torch.device, options: argparse.Namespace) -> Report:
    work = edited_facts(options)
    about = {
        "title": f"Editing in the shape of a large model, {device_name(device)}{', toy' * options.toy}",
        **environment(device),
        "shape": shape_of(EDITED, options.toy),
        "prompts": describe_prompts(work.facts, work.tokenizer, SOURCE),
        "given": f"{EDITED}, random weights; {len(work.contexts.rome)} contexts",
        "naive": NAIVE,
        "efficiency": EDITING_EFFICIENCY,
        "note": f"{EDITING_NOTE}. {NOTE}",
    }
    return Report(about, "gpu-editing", editing, options)


def edited_facts(options: argparse.Namespace) -> EditingWorkload:
    return editing_workload(NOWHERE, options.edit_facts, shape_of(EDITED, options.toy)["vocab_size"])


def kernels_report(device: torch.device, options: argparse.Namespace) -> Report:
    return Report(kernels_about(device, options.toy), "gpu-kernels", kernel_table, options)


REPORTS = {"tracing": trace_report, "editing": edit_report, "kernels": kernels_report}


def measure_edits(device: torch.device, options: argparse.Namespace, dtype: torch.dtype) -> Results:
    """A result per method and one of scoring ROME's edits, in the shape of GPT-J-6B."""
    work = edited_facts(options)
    model: Any = drawn(editable_model, config_of(EDITED, options.toy), dtype, device)
    moments = second_moments(model, moment_layers(options.toy))
    setup = Setup(model, work.tokenizer, work.facts, (), work.contexts, moments, options.memory)
    limits: Limits = {"fraction": 0.0, "least": options.naive_edits}
    for key in EDITED_LAYERS:
        say(f"{METHODS[key].title}, {setup.dtype}")
        here = replace(setup, layers=edited_layers(key, options.toy))
        result, made = measure_editing(METHODS[key], here, limits, row_counts(options))
        yield per_edit({"name": f"{METHODS[key].title}, {setup.dtype}", **result})
        if key == "rome":
            scored = measure_scoring(here, made, limits, row_counts(options))
            yield per_edit({"name": f"scoring ROME's edits, {setup.dtype}", **scored})
        del made
        release(device)


def per_edit(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "seconds_per_edit": result["seconds"] / result["edits"]}


def edited_layers(method: str, toy: bool) -> tuple[int, ...]:
    return (0,) if toy else EDITED_LAYERS[method]


def moment_layers(toy: bool) -> list[int]:
    """Those whose second moments ROME and MEMIT need."""
    depth = config_of(EDITED, toy).num_hidden_layers
    windows = [Window.around(layer, METHODS["memit"].window, depth).layers for layer in edited_layers("memit", toy)]
    return sorted({*edited_layers("rome", toy), *(layer for window in windows for layer in window)})


def slug(options: argparse.Namespace) -> str:
    return re.sub(r"\W+", "-", device_name(torch.device(options.device))).lower()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def drawn(make: Callable[..., Any], config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights: those of float32, rounded, where the device has room for these."""
    if reason := lacking(config, dtype, device):
        raise RuntimeError(reason)
    model = make(config, dtype if lacking(config, torch.float32, device) else torch.float32, device)
    model = rounded(model, dtype)
    release(device)
    return model


class Traces:
    """Tracing in the shape of one model after the other. A model gets the same noise in every dtype."""

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        self.sigmas: dict[str, float] = {}
        self.found: dict[str, dict[str, tuple[dict[str, Any], Values]]] = defaultdict(dict)

    def measure(self, name: str, dtype: torch.dtype) -> Results:
        """A single result; with it those of the model in other dtypes are compared with float32."""
        options = self.options
        facts, tokenizer = generated(options.facts, shape_of(name, options.toy)["vocab_size"])
        model = drawn(random_model, config_of(name, options.toy), dtype, self.device)
        if name not in self.sigmas:
            self.sigmas[name] = Tracer(model, tokenizer).noise_level(facts)
        few = Tracing(facts[:FEW], self.sigmas[name], samples=options.samples)
        count = facts_within(options.seconds, model, tokenizer, few, options.memory)
        study = replace(few, facts=facts[:count])
        limits: Limits = {"seconds": options.naive_seconds}
        given: Any = {"row_counts": row_counts(options), "warm_up": None, "memory": options.memory}
        measured, values = measure_both(model, tokenizer, study, limits, **given)
        prompts = describe_prompts(study.facts, tokenizer, SOURCE)
        result = {"model": name, "prompts": prompts, "sigma": study.sigma, **measured}
        result["seconds_per_fact"] = result["seconds"] / result["facts"]
        self.found[name][result["dtype"]] = result, values
        compare(self.found[name])
        yield result


def row_counts(options: argparse.Namespace) -> tuple[int, ...]:
    """Of the products whose rate is measured."""
    return (64, 256) if options.toy else (1024, 2048, 4096, 8192, 16384)


def facts_within(seconds: float, model: Any, tokenizer: Any, few: Tracing, memory: str | None) -> int:
    """How many facts can be traced in about that time, judged by a few: if possible whole rounds of ``LENGTHS``."""
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        few.compute(Tracer(model, tokenizer, memory=memory))
        took = time.perf_counter() - began
        if took > seconds:
            break
    count = len(few.facts) * seconds / took
    return int(count / len(LENGTHS)) * len(LENGTHS) or max(FEW, int(count))


def compare(found: dict[str, tuple[dict[str, Any], Values]]) -> None:
    """Put results beside that in float32. That may be of fewer facts; the naive ways take as long per FLOP."""
    if "float32" not in found:
        return
    reference, exact = found["float32"]
    for result, values in found.values():
        for way in ("naive", "published"):
            seconds = reference[way]["seconds"] * result[way]["flops"] / reference[way]["flops"]
            result[f"ratio_to_{way}_float32"] = seconds / result["seconds"]
        if result is not reference:
            result["deviation_from_float32"] = deviation(values, exact)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a torch device (cuda)")
    parser.add_argument("--parts", nargs="+", choices=list(REPORTS), default=list(REPORTS), help="(all)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="in this order (all)")
    parser.add_argument("--facts", type=int, default=400, help="the most facts to trace (400)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the engine, per model and dtype (10)")
    parser.add_argument("--naive-seconds", type=float, default=3.0, help="for each naive way, per model and dtype (3)")
    parser.add_argument("--minutes", type=float, default=4.5, help="after these, nothing new is begun (4.5)")
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
