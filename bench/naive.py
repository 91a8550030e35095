"""The methods the way published code works, to be timed against.

Every value of a table takes passes of its own through the whole model, with hooks, all layers, all tokens and all
logits. The passes are made of the test suite's oracle, so what is timed is also known to be right.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from oracles import tracing as oracle
from oracles.facts import Case, Corruption, corruption
from oracles.model import Hook, Site, predict, sites

RESTORING = (
    "for every state, layer and prompt token one forward of the clean and all corrupted sequences, with hooks, "
    "all layers, all tokens and all logits"
)
CLEAN = oracle.Restoration("clean", 0, 0, None)
"""Stands for the value of a fact's untouched run, where that has a pass of its own."""

Key = tuple[str, oracle.Restoration]
Work = list[tuple[Key, Callable[[], float]]]


class Limits(TypedDict, total=False):
    """How much of the naive way is timed, so that it is a fair sample of long and short prompts, layers and tokens.

    fraction: this part of its values, but at least ``least`` of them, spread evenly. seconds: values in random order
    until the time is up; at least one.
    """

    fraction: float
    least: int
    seconds: float | None


@dataclass
class NaiveRun:
    """What a naive study took, or the part of it that was timed.

    restorations: how many values the whole study has. p_patched: those that were measured, by (fact id, restoration),
    to be compared with the engine's; of gradients, the norms.
    """

    restorations: int
    seconds: float = 0.0
    p_patched: dict[Key, float] = field(default_factory=dict)

    @property
    def projected_seconds(self) -> float:
        """What all restorations take, judged by those that were measured."""
        return self.seconds / len(self.p_patched) * self.restorations


def measure(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[oracle.State],
    samples: int = 10,
    sigma: float | str = "3sd",
    seed: int = 1,
    target: str = "label",
    noise: Any = None,
    sever: str | None = None,
    joint: bool = False,
    **limits: Unpack[Limits],
) -> NaiveRun:
    """Causal tracing; severed, with ``sever``, in two passes for every value."""
    width = oracle.noise_width(model, tokenizer, facts, sigma)
    compute = partial(severed, oracle.SEVERED[sever]) if sever else restored
    work: Work = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        corrupted = corruption(model, tokenizer, fact, case, noise, samples, width, seed)
        for restoration in oracle.restorations(model, case, states, "all", joint):
            work.append(((fact.id, restoration), partial(compute, model, case, corrupted, restoration)))
    return timed(work, **limits)


def measure_zeroing(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[oracle.State],
    target: str = "label",
    tokens: str = "subject",
    **limits: Unpack[Limits],
) -> NaiveRun:
    """Zeroing: a pass of one sequence for every value, and one for the clean run."""
    work: Work = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        work.append(((fact.id, CLEAN), partial(clean, model, case)))
        for restoration in oracle.restorations(model, case, states, tokens, joint=True):
            work.append(((fact.id, restoration), partial(zeroed, model, case, restoration)))
    return timed(work, **limits)


def measure_gradients(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    kinds: Sequence[str],
    steps: int = 50,
    target: str = "argmax",
    **limits: Unpack[Limits],
) -> NaiveRun:
    """Integrated gradients: a pass forward and back for every state. The clean states are there beforehand."""
    work: Work = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        values = clean_states(model, case, kinds)
        for restoration in oracle.restorations(model, case, [(kind, 1) for kind in kinds], "all"):
            site, clean_value = values[restoration.kind, restoration.layer]
            token = restoration.token
            compute = partial(gradient_norm, model, case, site, token, clean_value[token], steps)
            work.append(((fact.id, restoration), compute))
    return timed(work, **limits)


def timed(work: Work, fraction: float = 1.0, least: int = 1, seconds: float | None = None) -> NaiveRun:
    """Compute the values, or as many of them as the limits allow."""
    draw = random.Random(0)
    if seconds is not None:
        chosen = draw.sample(work, len(work))
    else:  # one of each of so many equal stretches, at random: even steps may keep step with the tokens
        count = min(len(work), max(1, least, round(fraction * len(work))))
        bounds = [index * len(work) // count for index in range(count + 1)]
        chosen = [work[draw.randrange(first, last)] for first, last in pairwise(bounds)]

    chosen[0][1]()  # warm up
    run = NaiveRun(restorations=len(work))
    began = time.perf_counter()
    for key, compute in chosen:
        run.p_patched[key] = compute()
        run.seconds = time.perf_counter() - began
        if seconds is not None and run.seconds > seconds:
            break
    return run


def restored(model: Any, case: Case, corrupted: Corruption, restoration: oracle.Restoration) -> float:
    """The target's mean probability in the corrupted runs with something restored."""
    _, *patched = oracle.log_run(model, case, [corrupted], restoration)
    return float(np.mean(np.exp(patched)))


@torch.no_grad()
def severed(
    kinds: Sequence[str], model: Any, case: Case, corrupted: Corruption, restoration: oracle.Restoration
) -> float:
    """The same while the token's outputs of these kinds, in all layers, stay at their corrupted values, which a pass
    before collects."""
    inputs = [case.inputs] + [corrupted.inputs] * len(corrupted.noise)
    corrupt: Hook = (Site(model.get_input_embeddings()), lambda values: corrupted(values[1:]))
    held = [layer[kind] for layer in sites(model) for kind in kinds]
    seen: list[Tensor] = []
    predict(model, case, inputs, [corrupt, *((site, lambda values: seen.append(values[1:].clone())) for site in held)])

    def restore(values: Tensor) -> None:
        values[1:, restoration.tokens] = values[:1, restoration.tokens]

    def hold(own: Tensor, values: Tensor) -> None:
        values[1:, restoration.tokens] = own[:, restoration.tokens]

    hooks = [corrupt, *((site, restore) for site in restoration.sites(model))]
    hooks += [(site, partial(hold, own)) for site, own in zip(held, seen, strict=True)]
    return predict(model, case, inputs, hooks)[1:].mean().item()


@torch.no_grad()
def clean(model: Any, case: Case) -> float:
    return predict(model, case, [case.inputs]).item()


@torch.no_grad()
def zeroed(model: Any, case: Case, restoration: oracle.Restoration) -> float:
    return float(np.exp(oracle.zeroed(model, case, restoration)))


@torch.no_grad()
def clean_states(model: Any, case: Case, kinds: Sequence[str]) -> dict[tuple[str, int], tuple[Site, Tensor]]:
    """By kind and layer: the site, and its values (T, width) in the clean run."""
    seen: dict[tuple[str, int], tuple[Site, Tensor]] = {}

    def keep(key: tuple[str, int], site: Site, values: Tensor) -> None:
        seen[key] = site, values[0].clone()

    here = [((kind, number), layer[kind]) for number, layer in enumerate(sites(model)) for kind in kinds]
    predict(model, case, [case.inputs], [(site, partial(keep, key, site)) for key, site in here])
    return seen


def gradient_norm(model: Any, case: Case, site: Site, token: int, value: Tensor, steps: int) -> float:
    """The norm of a state's integrated gradients from zero: all points of the line to its value in one batch."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    places = torch.tensor((nodes + 1) / 2, dtype=value.dtype, device=value.device)
    points = (places[:, None] * value).requires_grad_()

    def put(values: Tensor) -> None:
        values[:, token] = points

    p = predict(model, case, [case.inputs] * steps, [(site, put)])
    (gradients,) = torch.autograd.grad(p.sum(), points)
    mean = torch.from_numpy(weights / 2).to(value.device) @ gradients.double()
    return (value.double() * mean).norm().item()
