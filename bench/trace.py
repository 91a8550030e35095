"""Times causal tracing on the CPU beside the naive ways: ``python bench/trace.py``.

The first 20 CounterFact prompts (generated ones of the same lengths where the file is missing) in a GPT-2-small shape
with random weights, or with ``--model smollm2`` three facts that this real model knows, in about five minutes on two
cores. The naive ways, batched and as published, are timed on a part that is spread evenly, and scaled;
``--naive-fraction 1`` times them whole, which takes hours.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import command
import torch
from measure import EFFICIENCY, deviation, measure_both, say
from naive import BATCHED, PUBLISHED
from report import environment, markdown
from studies import Tracing
from workload import SHAPES, describe_prompts, gpt2, prompts, random_model, smollm2

from causalcone import Tracer
from causalcone.engine.compute import as_dtype
from causalcone.engine.models import read_architecture

DEFAULTS = {
    "GPT-2 small": {"prompts": 20, "dtypes": ["float32", "bfloat16"], "repeats": 3, "naive_fraction": 0.03},
    "smollm2": {"prompts": 3, "dtypes": ["float32"], "repeats": 1, "naive_fraction": 0.01},
}
"""By model: options that are not given, so that no run takes hours."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    name = "toy" if options.toy else options.model
    if name in SHAPES:
        facts, tokenizer, source = prompts(options.data, options.prompts, SHAPES[name]["vocab_size"])
        model = random_model(gpt2(SHAPES[name]), torch.float32, cpu)
        shape, title, label = SHAPES[name], f"{name} shape", "trace"
    else:
        model, tokenizer, facts, source = smollm2(options.prompts)
        shape, title, label = vars(read_architecture(model).sizes), name, f"trace-{name}"
    say(f"{title}, {source}")
    study = Tracing(facts, Tracer(model, tokenizer).noise_level(facts), samples=options.samples)

    results: list[dict[str, Any]] = []
    exact = None
    for dtype in options.dtypes:
        model = model.to(as_dtype(dtype))
        result, values = measure_both(
            model,
            tokenizer,
            study,
            command.limits(options),
            row_counts=command.row_counts(options),
            warm_up=replace(study, facts=facts[:2], samples=1),
            repeats=options.repeats,
            memory=options.memory,
        )
        if dtype == "float32":
            exact = result, values
        elif exact:
            result["deviation_from_float32"] = deviation(values, exact[1])
        if exact:
            for way in ("naive", "published"):
                result[f"ratio_to_{way}_float32"] = exact[0][way]["seconds"] / result["seconds"]
        results.append({"model": title, **result})

    report = {
        "title": f"Causal tracing of {len(facts)} prompts, {title}",
        **environment(cpu),
        "shape": shape,
        "prompts": describe_prompts(facts, tokenizer, source),
        "states": study.states,
        "samples": study.samples,
        "weights": "random weights" if name in SHAPES else "trained weights",
        "sigma": study.sigma,
        "naive": BATCHED,
        "published": PUBLISHED,
        "efficiency": EFFICIENCY,
        "results": results,
    }
    command.publish(report, markdown(report), label, options)


def parse() -> argparse.Namespace:
    parser = command.parser(__doc__, naive_fraction=0.03, least=1)
    first, *others = DEFAULTS
    parser.add_argument("--model", choices=[first, *others], default=first, help=f"({first})")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="(both; of smollm2, float32)")
    parser.add_argument("--repeats", type=int, help="timed traces, of which the median counts (3; of smollm2, 1)")
    known, _ = parser.parse_known_args()
    parser.set_defaults(**DEFAULTS[known.model])
    options = command.parse(parser)
    if options.repeats < 1:
        parser.error("--repeats is a whole number from 1 up")
    # the same weights in every dtype: bfloat16 is rounded from float32
    options.dtypes = sorted(set(options.dtypes), key=["float32", "bfloat16"].index)
    return options


if __name__ == "__main__":
    main()
