"""Times causal tracing on the CPU beside the naive way that published code works: ``python bench/trace.py``.

The first 20 CounterFact prompts (generated ones of the same lengths where the file is missing) in a GPT-2-small shape
with random weights. The naive way takes most of the time; ``--naive-fraction 0.05`` times a part of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import EFFICIENCY, NAIVE, Study, deviation, measure_both, naive_fraction, say
from report import RESULTS, environment, markdown, record, write_json
from workload import SHAPES, counterfact, describe_prompts, generated, random_model

from causalcone import Tracer
from causalcone.engine.session import as_dtype

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOY = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50257}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    name = "toy" if options.toy else "GPT-2 small"
    shape = TOY if options.toy else SHAPES[name]

    if options.data.is_dir():
        facts, tokenizer = counterfact(options.data, options.prompts)
        source = f"the first {len(facts)} of CounterFact"
    else:
        facts, tokenizer = generated(options.prompts, shape["vocab_size"])
        source = f"{len(facts)} generated with the lengths of CounterFact's first 20"
    say(f"{name} shape, {source}")
    model = random_model(shape, torch.float32, cpu)
    study = Study(facts, Tracer(model, tokenizer).noise_level(facts), samples=options.samples)

    naive = naive_fraction(options.naive_fraction) if options.naive_fraction else None
    row_counts = (64, 256) if options.toy else (512, 1024, 2048, 4096)
    results: list[dict[str, Any]] = []
    exact = None
    for dtype in options.dtypes:
        model = model.to(as_dtype(dtype))
        result, values = measure_both(
            model, tokenizer, study, naive, row_counts=row_counts, repeats=options.repeats, memory=options.memory
        )
        if dtype == "float32":
            exact = result, values
        elif exact:
            result["deviation_from_float32"] = deviation(values, exact[1])
        if exact and naive:
            result["ratio_to_naive_float32"] = exact[0]["naive"]["seconds"] / result["seconds"]
        results.append({"model": f"{name} shape", **result})

    report = {
        "title": f"Causal tracing of {len(facts)} prompts, {name} shape",
        **environment(cpu),
        "shape": shape,
        "prompts": describe_prompts(facts, tokenizer, source),
        "states": study.states,
        "samples": study.samples,
        "sigma": study.sigma,
        "naive": NAIVE,
        "efficiency": EFFICIENCY,
        "results": results,
    }
    text = markdown(report)
    print(text)
    say(f"written to {write_json(report, options.out, 'trace-toy' if options.toy else 'trace')}")
    if options.record:
        record(text, "trace")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="how many prompts (20)")
    parser.add_argument("--samples", type=int, default=10, help="noise samples (10)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="threads, for both ways (2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed traces, of which the median counts (3)")
    parser.add_argument(
        "--naive-fraction", type=float, default=1.0, help="part of the naive way that is timed and scaled (1; 0: none)"
    )
    parser.add_argument("--memory", help="memory for a pass, such as 2GiB (half of what is free)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of counterfact_prompts.json, gpt2-tokenizer/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    parser.add_argument("--record", action="store_true", help="put the table into bench/RESULTS.md")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    if not 0 <= options.naive_fraction <= 1:
        parser.error(f"--naive-fraction is {options.naive_fraction}; give a number from 0 to 1")
    if min(options.prompts, options.samples, options.threads, options.repeats) < 1:
        parser.error("--prompts, --samples, --threads and --repeats are whole numbers from 1 up")
    # the same weights in every dtype: bfloat16 is rounded from float32
    options.dtypes = sorted(set(options.dtypes), key=["float32", "bfloat16"].index)
    return options


if __name__ == "__main__":
    main()
