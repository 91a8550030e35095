"""Times every method on the CPU beside the naive ways: ``python bench/methods.py``.

The first 20 CounterFact prompts (generated ones of the same lengths where the file is missing) in a GPT-2-small shape
with random weights; the methods that take longest get evenly spaced ones of them, or all with ``--whole``. The naive
ways, batched and as published, are timed on a part that is spread evenly, and scaled. Results are written after each
method.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import torch
from measure import EFFICIENCY, say
from naive import BATCHED
from report import Growing, environment
from studies import Gradients, Study, Tracing, Zeroing
from workload import SHAPES, describe_prompts, gpt2, prompts, random_model

from causalcone import Fact, Tracer
from causalcone.engine.noise import Noise

PUBLISHED = "as named, for every fact; every forward with hooks, all layers, all tokens and all logits"
NOTE = "Of integrated gradients the norms are compared. Fewer facts are evenly spaced ones of all"


@dataclass(frozen=True)
class Method:
    """A method in a form worth measuring.

    study: makes the study from facts, noise level and options. goal: how many times faster than the published way it
    is to be. every: of the prompts only each so many-th is taken, since the method takes long.
    """

    title: str
    published_way: str
    study: Callable[[Sequence[Fact], float, argparse.Namespace], Study]
    goal: float | None = None
    every: int = 1


def heads(facts: Sequence[Fact], sigma: float, options: argparse.Namespace) -> Study:
    states = tuple((f"head.{head}", 1) for head in range(options.shape["n_head"]))
    return Tracing(facts, sigma, states, options.samples)


METHODS = {
    "severed": Method(
        "severed tracing, hidden:1, MLP held",
        "two forwards of the clean and all corrupted sequences per layer and token, the first to collect what is held",
        lambda facts, sigma, options: Tracing(facts, sigma, (("hidden", 1),), options.samples, sever="mlp"),
        goal=8,
    ),
    "zero": Method(
        "zeroing, mlp:5 at the subject",
        "one forward of one sequence per centre layer, and one for the clean run",
        lambda facts, sigma, options: Zeroing(facts),
        goal=3,
    ),
    "joint": Method(
        "joint restoration of all tokens, hidden:1, mlp:10, attn:10",
        "one forward of the clean and all corrupted sequences per state and layer",
        lambda facts, sigma, options: Tracing(facts, sigma, samples=options.samples, joint=True),
    ),
    "counterfactual": Method(
        "counterfactual corruption, hidden:1, mlp:10, attn:10",
        "one forward of the clean and the counterfactual sequence per state, layer and token",
        lambda facts, sigma, options: Tracing(facts, noise=Noise("counterfactual")),
    ),
    "heads": Method(
        "restoration of single heads, all heads, window 1",
        "one forward of the clean and all corrupted sequences per head, layer and token",
        heads,
        every=5,
    ),
    "gradients": Method(
        "integrated gradients, hidden, mlp, attn, 50 points",
        "one forward of all 50 points and one backward to the state, per state, layer and token; weights frozen, clean "
        "states collected beforehand",
        lambda facts, sigma, options: Gradients(facts),
        goal=3.5,
        every=7,
    ),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    name = "toy" if options.toy else "GPT-2 small"
    options.shape = SHAPES[name]
    facts, tokenizer, source = prompts(options.data, options.prompts, options.shape["vocab_size"])
    say(f"{name} shape, {source}")
    model = random_model(gpt2(options.shape), torch.float32, cpu)
    sigma = Tracer(model, tokenizer).noise_level(facts)

    def measure(key: str) -> dict[str, Any]:
        method = METHODS[key]
        study = method.study(facts if options.whole else facts[:: method.every], sigma, options)
        result = command.measure(model, tokenizer, study, options)
        own = describe_prompts(study.facts, tokenizer, source)
        return {"method": key, "prompts": own, "detail": method.published_way, "goal": method.goal, **result}

    report = {
        "title": f"Methods, {name} shape",
        **environment(cpu),
        "compared": "method",
        "detail": "published way",
        "shape": options.shape,
        "prompts": describe_prompts(facts, tokenizer, source),
        "samples": options.samples,
        "memory": options.memory,
        "sigma": sigma,
        "naive": BATCHED,
        "published": PUBLISHED,
        "efficiency": EFFICIENCY,
        "note": NOTE,
    }
    titles = [method.title for method in METHODS.values()]
    file, section = f"methods{'-toy' * options.toy}", "methods" if options.record else None
    growing = Growing(report, titles, options.out, file, section)
    command.run_each({METHODS[key].title: partial(measure, key) for key in options.methods}, growing)


def parse() -> argparse.Namespace:
    parser = command.parser(__doc__, naive_fraction=0.005, least=40)
    command.add_names(parser, "--methods", METHODS)
    parser.add_argument("--whole", action="store_true", help="all prompts for the methods that take longest, too")
    return command.parse(parser)


if __name__ == "__main__":
    main()
