"""Times model editing on the CPU beside the naive way that published code works: ``python bench/editing.py``.

ROME, MEMIT and constrained fine-tuning of the first 20 CounterFact prompts (generated ones of the same lengths where
the file is missing) at six layers of a GPT-2-small shape with random weights, and the scoring of ROME's edits on 13
prompts each. The naive way, which goes first, is timed on a part that is spread evenly, and scaled. Results are written
after each method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import command
import torch
from editing_methods import METHODS, Setup
from editing_studies import EFFICIENCY, NAIVE, NOTE, measure, measure_scoring
from editing_workload import NOWHERE, editable_model, editing_workload, second_moments
from measure import say
from naive import Limits
from report import RESULTS, Growing, editing, environment
from workload import DATA, SHAPES, describe_prompts, gpt2, smollm2

from causalcone import Editor, Fact
from causalcone.engine.compute import as_dtype
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.models import read_architecture
from causalcone.runners.demo.model import demo_model, demo_world

SCORING = "scoring of ROME's edits"
TITLES = {**{key: method.title for key, method in METHODS.items()}, "scoring": SCORING}
DTYPES = ("float64", "float32", "bfloat16")
DEFAULT = "gpt2-small-shape"
TINY = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 499}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    say(f"model: {options.model}")
    setup, source = MODELS[options.model](options)
    layers = f"{len(setup.layers)} layer{'s' * (len(setup.layers) != 1)}"
    report = {
        "title": f"Editing of {len(setup.facts)} facts at {layers}, {options.model}",
        **environment(torch.device("cpu")),
        "model": options.model,
        "shape": vars(setup.encoder.sizes),
        "prompts": describe_prompts(setup.facts, setup.tokenizer, source),
        "given": given(setup, "trained weights" if options.model in ("demo", "smollm2") else "random weights"),
        "layers": list(setup.layers),
        "memory": options.memory,
        "naive": NAIVE,
        "efficiency": EFFICIENCY,
        "note": NOTE,
    }
    edits: dict[str, list[Edit]] = {}
    measurements = {
        name(key, dtype): partial(measured, setup, key, dtype, options, edits)
        for dtype in options.dtypes
        for key in options.methods
    }
    order = [name(key, dtype) for dtype in DTYPES for key in TITLES]
    label = "editing" if options.model == DEFAULT else f"editing-{options.model}"
    growing = Growing(report, order, options.out, label, label if options.record else None, editing)
    command.run_each(measurements, growing)


def name(key: str, dtype: str) -> str:
    return f"{TITLES[key]}, {dtype}"


def measured(
    setup: Setup, key: str, dtype: str, options: argparse.Namespace, edits: dict[str, list[Edit]]
) -> dict[str, Any]:
    """A method in a dtype. ``edits`` holds those that ROME made in it, for scoring."""
    setup.model.to(as_dtype(dtype))
    if key != "scoring":
        result, made = measure(METHODS[key], setup, limits(options), row_counts(options))
        if key == "rome":
            edits[dtype] = made
        return result
    if dtype not in edits:
        say("  engine: ROME's edits, to be scored")
        editor = setup.editor()
        edits[dtype] = editor.rome(setup.requests(editor), setup.layers, METHODS["rome"].hparams)
    return measure_scoring(setup, edits[dtype], limits(options), row_counts(options))


def random_gpt2(shape: dict[str, int], data: Path, options: argparse.Namespace) -> tuple[Setup, str]:
    """A model with random weights; the prompts' folder may be missing."""
    work = editing_workload(data, options.facts, shape["vocab_size"])
    model = editable_model(gpt2(shape), torch.float32, torch.device("cpu"))
    return ready(model, work.tokenizer, work.facts, work.contexts, options), work.source


def demo(options: argparse.Namespace) -> tuple[Setup, str]:
    """The demo model and facts of its world; contexts are its own."""
    model, tokenizer = demo_model()
    model.requires_grad_(False)
    facts = [replace(fact, attribute_prompts=(), generation_prompts=()) for fact in demo_world().facts[: options.facts]]
    contexts = Editor(model, tokenizer).contexts
    return ready(model, tokenizer, facts, contexts, options), f"the first {len(facts)} of the demo world"


def real(options: argparse.Namespace) -> tuple[Setup, str]:
    """SmolLM2-135M-Instruct and facts that it knows; contexts are its own."""
    model, tokenizer, facts, source = smollm2(options.facts)
    facts = [replace(fact, attribute_prompts=(), generation_prompts=(), probes=()) for fact in facts]
    return ready(model, tokenizer, facts, Editor(model, tokenizer).contexts, options), source


MODELS: dict[str, Callable[[argparse.Namespace], tuple[Setup, str]]] = {
    DEFAULT: lambda options: random_gpt2(SHAPES["GPT-2 small"], options.data, options),
    "demo": demo,
    "smollm2": real,
    "tiny": lambda options: random_gpt2(TINY, NOWHERE, options),
}


def ready(model: Any, tokenizer: Any, facts: Sequence[Fact], contexts: Contexts, options: argparse.Namespace) -> Setup:
    """Edits at the layers asked for, every other one of the first twelve by default."""
    depth = read_architecture(model).sizes.depth
    layers = options.layers or range(0, min(depth, 12), 2)
    if max(layers) >= depth:
        sys.exit(f"--layers: there is no layer {max(layers)}; the model has layers 0 to {depth - 1}")
    moments = second_moments(model, range(depth))
    return Setup(model, tokenizer, facts, tuple(layers), contexts, moments, options.memory)


def given(setup: Setup, weights: str) -> str:
    """What edits are made and scored with, in words."""
    fact, contexts = setup.facts[0], setup.contexts
    sizes = read_architecture(setup.model).sizes
    return (
        f"{sizes.depth} layers of width {sizes.hidden}, {weights}; {len(contexts.rome)} contexts for ROME, "
        f"{len(contexts.memit)} for MEMIT; each fact is scored on {len(fact.paraphrase_prompts)} paraphrases and "
        f"{len(fact.neighborhood_prompts)} neighbours besides its own prompt"
    )


def limits(options: argparse.Namespace) -> Limits:
    if options.naive_seconds is not None:
        return {"seconds": options.naive_seconds}
    return {"fraction": options.naive_fraction, "least": options.naive_least}


def row_counts(options: argparse.Namespace) -> tuple[int, ...]:
    """Of the products whose rate is measured."""
    return (64, 256) if options.model == "tiny" else (512, 1024, 2048, 4096)


def layer_numbers(text: str) -> tuple[int, ...]:
    """Different layers from a comma-separated list."""
    try:
        layers = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,2,4") from None
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different layers from 0")
    return layers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default=DEFAULT, help=f"what is edited ({DEFAULT})")
    parser.add_argument("--facts", type=int, default=20, help="how many facts (20)")
    parser.add_argument(
        "--layers", type=layer_numbers, help="comma-separated, from 0 (every other one of the first twelve)"
    )
    for option, choices, default in (("--methods", tuple(TITLES), None), ("--dtypes", DTYPES, "float32")):
        parser.add_argument(
            option,
            type=partial(command.chosen, of=choices),
            default=list(choices) if default is None else [default],
            help=f"comma-separated, of {','.join(choices)} ({default or 'all'})",
        )
    parser.add_argument(
        "--naive-fraction", type=float, default=0.05, help="part of the naive way that is timed and scaled (0.05)"
    )
    parser.add_argument("--naive-least", type=int, default=3, help="edits timed at least (3)")
    parser.add_argument("--naive-seconds", type=float, help="time edits in random order for so long instead")
    parser.add_argument("--threads", type=int, default=2, help="threads, for both ways (2)")
    parser.add_argument("--memory", help="memory for the engine, such as 2GiB (half of what is free)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of counterfact_prompts.json, gpt2-tokenizer/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    parser.add_argument("--record", action="store_true", help="put the table into bench/RESULTS.md")
    options = parser.parse_args()
    if not 0 < options.naive_fraction <= 1:
        parser.error(f"--naive-fraction is {options.naive_fraction}; give a number above 0 and up to 1")
    if min(options.facts, options.threads, options.naive_least) < 1:
        parser.error("--facts, --threads and --naive-least are whole numbers from 1 up")
    return options


if __name__ == "__main__":
    main()
