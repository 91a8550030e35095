"""The naive ways to a table of values, to be timed against: forwards of the whole model with hooks.

As published, every value takes passes of its own. Batched, the values of a fact share them, as many together as is
fastest. The published passes are made of the test suite's oracle, and the tests compare the batched ones with it, so
what is timed is also known to be right.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from oracles import tracing as oracle
from oracles.facts import Case, Corruption, corruption
from oracles.model import Edit, Hook, Site, hooked, predict, sites

BATCHED = (
    "the naive way batched as well as it goes: forwards of the whole model, with hooks, all layers and all tokens, for "
    "many states of a fact together, as many as a short search in the same run found fastest; logits are computed "
    "where the target is predicted, and what clean runs, and runs to be held, put out is collected beforehand, untimed"
)
PUBLISHED = (
    "for every state, layer and prompt token one forward of the clean and all corrupted sequences, with hooks, "
    "all layers, all tokens and all logits"
)
CLEAN = oracle.Restoration("clean", 0, 0, None)
"""Stands for the value of a fact's untouched run, where that has a pass of its own."""
SEARCH_SECONDS = 2.0
"""No batch that takes longer is tried, where no limit of seconds says otherwise."""

Key = tuple[str, oracle.Restoration]
States = Mapping[tuple[str, int], tuple[Site, Tensor]]
"""By kind and layer: the site, and its values (runs, T, width)."""


class Limits(TypedDict, total=False):
    """How much of the naive way is timed, so that it is a fair sample of long and short prompts, layers and tokens.

    fraction: this part of its values, but at least ``least`` of them, spread evenly. seconds: values in random order
    until the time is up; at least those of one task.
    """

    fraction: float
    least: int
    seconds: float | None


def nothing() -> None:
    """Where there is nothing to prepare."""


@dataclass(frozen=True)
class Task:
    """Values that are computed together, in one pass or two. sequences: of a pass; tokens: of all its sequences and
    passes; logits: rows of logits; prepare: what is not timed."""

    keys: Sequence[Any]
    compute: Callable[[], Sequence[Any]]
    sequences: int = 1
    tokens: int = 1
    logits: int = 0
    prepare: Callable[[], object] = nothing


@dataclass
class NaiveRun:
    """What a naive study took, or the part of it that was timed.

    work: the whole study; seconds: of the part; tokens: that went through the model in it. p_patched: values that were
    measured, by (fact id, restoration), to be compared with the engine's; of gradients, the norms.
    """

    work: Sequence[Task]
    seconds: float = 0.0
    tokens: int = 0
    p_patched: dict[Key, float] = field(default_factory=dict)

    @property
    def restorations(self) -> int:
        """How many values the whole study has."""
        return sum(len(task.keys) for task in self.work)

    @property
    def projected_seconds(self) -> float:
        """What the whole study takes, judged by the part: as long per token."""
        return self.seconds / self.tokens * sum(task.tokens for task in self.work)


def tracing(
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
    together: int | None = None,
) -> list[Task]:
    """Causal tracing: so many values ``together``, or one by one as published; severed, that takes two passes."""
    width = oracle.noise_width(model, tokenizer, facts, sigma)
    kinds, held = [kind for kind, _ in states], oracle.SEVERED[sever]
    work: list[Task] = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        corrupted = corruption(model, tokenizer, fact, case, noise, samples, width, seed)
        chosen = list(oracle.restorations(model, case, states, "all", joint))
        runs = len(corrupted.noise)
        if together is None:
            one = partial(severed, held) if held else restored
            compute = partial(one_by_one, partial(one, model, case, corrupted))
            work += tasks(case, chosen, compute, passes=2 if held else 1, sequences=1 + runs)
        else:
            batched = Restored(model, case, corrupted, kinds, held)
            work += tasks(case, chosen, batched, together, runs, prepare=batched.collect)
    return work


def zeroing(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[oracle.State],
    target: str = "label",
    tokens: str = "subject",
    together: int | None = None,
) -> list[Task]:
    """Zeroing: a sequence for every value, and one for the clean run."""
    work: list[Task] = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        chosen = [CLEAN, *oracle.restorations(model, case, states, tokens, joint=True)]
        compute = partial(one_by_one, partial(zeroed, model, case))
        work += tasks(case, chosen, partial(zeroed_together, model, case) if together else compute, together)
    return work


def gradients(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    kinds: Sequence[str],
    steps: int = 50,
    target: str = "argmax",
    together: int | None = None,
) -> list[Task]:
    """Integrated gradients: ``steps`` sequences for every state, forward and back. The clean states are there
    beforehand, and all points of a line are in one pass in both ways."""
    work: list[Task] = []
    for fact in facts:
        case = oracle.encode(model, tokenizer, fact, target)
        chosen = list(oracle.restorations(model, case, [(kind, 1) for kind in kinds], "all"))
        lines = Lines(model, case, kinds, steps, all_logits=together is None)
        work += tasks(case, chosen, lines, together, steps, prepare=lines.collect)
    return work


def tasks(
    case: Case,
    restorations: Sequence[oracle.Restoration],
    compute: Callable[[Sequence[oracle.Restoration]], list[float]],
    together: int | None = None,
    sequences: int = 1,
    passes: int = 1,
    prepare: Callable[[], object] = nothing,
) -> Iterator[Task]:
    """A fact's values, each of which takes so many ``sequences``, in groups; by default one by one and with all
    logits."""
    length, size = len(case.inputs), together or 1
    for first in range(0, len(restorations), size):
        group = restorations[first : first + size]
        count = sequences * len(group)
        tokens = passes * count * length
        logits = tokens if together is None else count * len(case.target)
        keys = [(case.fact_id, restoration) for restoration in group]
        yield Task(keys, partial(compute, group), count, tokens, logits, prepare)


def one_by_one(
    compute: Callable[[oracle.Restoration], float], restorations: Iterable[oracle.Restoration]
) -> list[float]:
    return [compute(restoration) for restoration in restorations]


def timed(work: Sequence[Task], fraction: float = 1.0, least: int = 1, seconds: float | None = None) -> NaiveRun:
    """Compute the values, or as many of them as the limits allow."""
    draw = random.Random(0)
    if seconds is not None:
        chosen = draw.sample(work, len(work))
    else:  # one of each of so many equal stretches, at random: even steps may keep step with the tokens
        count = min(len(work), max(1, ceil(least / len(work[0].keys)), round(fraction * len(work))))
        bounds = [index * len(work) // count for index in range(count + 1)]
        chosen = [work[draw.randrange(first, last)] for first, last in pairwise(bounds)]

    run = NaiveRun(work)
    chosen[0].prepare()
    chosen[0].compute()  # warm up
    for task in chosen:
        task.prepare()
        began = time.perf_counter()
        values = task.compute()
        run.seconds += time.perf_counter() - began
        run.tokens += task.tokens
        run.p_patched.update(zip(task.keys, values, strict=True))
        if seconds is not None and run.seconds > seconds:
            break
    return run


def fastest(work: Callable[[int], Sequence[Task]], longest: float = SEARCH_SECONDS) -> int:
    """How many values are to be computed together so that each takes the least time. ``work`` gives the tasks of a few
    values, so many at a time. Sizes are doubled while that helps, and neither time nor memory end it; then all are
    timed once more, in case that something else slowed one down."""
    tried: dict[int, Task] = {}
    each: dict[int, float] = {}
    size = 1
    while not each or size <= 4 * min(each, key=each.__getitem__):
        some = work(size)
        task = some[(len(some) - 1) // 2]  # which is a whole one
        try:
            task.prepare()
            took = min(_seconds(task), _seconds(task))
        except torch.OutOfMemoryError:
            break
        tried[size], each[size] = task, took / len(task.keys)
        if len(some) == 1 or took > longest / 2:
            break
        size *= 2
    for size, task in tried.items():
        each[size] = min(each[size], _seconds(task) / len(task.keys))
    return min(each, key=each.__getitem__, default=1)


def _seconds(task: Task) -> float:
    began = time.perf_counter()
    task.compute()
    return time.perf_counter() - began


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
def zeroed(model: Any, case: Case, restoration: oracle.Restoration) -> float:
    return float(np.exp(oracle.zeroed(model, case, restoration)))


@torch.no_grad()
def zeroed_together(model: Any, case: Case, restorations: Sequence[oracle.Restoration]) -> list[float]:
    """The target's probability with each of several windows' outputs zero."""
    layers = sites(model)
    hooks = [
        (layers[layer][kind], overwriting(1, runs, tokens, 0))
        for (kind, layer), (runs, tokens) in places(restorations, len(layers)).items()
    ]
    return predict_together(model, case, case.inputs, len(restorations), 1, hooks)[:, 0].tolist()


@dataclass
class Restored:
    """The target's mean probability in the corrupted runs with something restored, for many states of a fact at once.

    kinds: that may be restored; held: whose outputs at the restored tokens stay at their corrupted values.
    """

    model: Any
    case: Case
    corrupted: Corruption
    kinds: Sequence[str]
    held: Sequence[str]

    @cached_property
    def clean_states(self) -> States:
        return collected(self.model, self.case, [self.case.inputs], self.kinds)

    @cached_property
    def held_states(self) -> States:
        inputs = [self.corrupted.inputs] * len(self.corrupted.noise)
        embeddings = Site(self.model.get_input_embeddings())
        return collected(self.model, self.case, inputs, self.held, [(embeddings, self.corrupted)])

    def collect(self) -> None:
        _ = self.clean_states, self.held_states

    @torch.no_grad()
    def __call__(self, restorations: Sequence[oracle.Restoration]) -> list[float]:
        samples = len(self.corrupted.noise)

        def corrupt(embeddings: Tensor) -> None:
            self.corrupted(embeddings[:samples])
            embeddings.unflatten(0, (-1, samples))[1:] = embeddings[:samples]

        hooks: list[Hook] = [(Site(self.model.get_input_embeddings()), corrupt)]
        for key, (runs, tokens) in places(restorations, len(sites(self.model))).items():
            site, clean = self.clean_states[key]
            hooks.append((site, overwriting(samples, runs, tokens, clean[:, tokens].transpose(0, 1))))
        runs = [run for run, restoration in enumerate(restorations) for _ in restoration.tokens]
        tokens = [token for restoration in restorations for token in restoration.tokens]
        for site, own in self.held_states.values():
            hooks.append((site, overwriting(samples, runs, tokens, own[:, tokens].transpose(0, 1))))
        p = predict_together(self.model, self.case, self.corrupted.inputs, len(restorations), samples, hooks)
        return p.mean(dim=1).tolist()


@dataclass
class Lines:
    """Norms of a fact's integrated gradients from zero: all points of the lines to several states' clean values."""

    model: Any
    case: Case
    kinds: Sequence[str]
    steps: int
    all_logits: bool

    @cached_property
    def clean_states(self) -> States:
        return collected(self.model, self.case, [self.case.inputs], self.kinds)

    def collect(self) -> None:
        _ = self.clean_states

    def __call__(self, restorations: Sequence[oracle.Restoration]) -> list[float]:
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        ends = [self.clean_states[each.kind, each.layer][1][0, each.token] for each in restorations]
        share = torch.tensor((nodes + 1) / 2, dtype=ends[0].dtype, device=ends[0].device)
        points = [(share[:, None] * end).requires_grad_() for end in ends]
        hooks = []
        for key, (runs, tokens) in places(restorations, len(sites(self.model))).items():
            new = torch.stack([points[run] for run in runs])
            hooks.append((self.clean_states[key][0], overwriting(self.steps, runs, tokens, new)))
        given = self.model, self.case, self.case.inputs, len(restorations), self.steps, hooks
        found = torch.autograd.grad(predict_together(*given, all_logits=self.all_logits).sum(), points)
        mean = [torch.from_numpy(weights / 2).to(each.device) @ each.double() for each in found]
        return [(end.double() * gradient).norm().item() for end, gradient in zip(ends, mean, strict=True)]


@torch.no_grad()
def collected(
    model: Any, case: Case, inputs: Sequence[list[int]], kinds: Sequence[str], hooks: Sequence[Hook] = ()
) -> States:
    """What the kinds put out in all layers, in a pass of the inputs under hooks."""
    seen: dict[tuple[str, int], tuple[Site, Tensor]] = {}

    def keep(key: tuple[str, int], site: Site, values: Tensor) -> None:
        seen[key] = site, values.clone()

    here = [((kind, number), layer[kind]) for number, layer in enumerate(sites(model)) for kind in dict.fromkeys(kinds)]
    if here:
        predict(model, case, inputs, [*hooks, *((site, partial(keep, key, site)) for key, site in here)])
    return seen


def places(
    restorations: Sequence[oracle.Restoration], depth: int
) -> Mapping[tuple[str, int], tuple[list[int], list[int]]]:
    """By kind and layer: which of the restorations overwrite there, and at which token."""
    found: dict[tuple[str, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for run, restoration in enumerate(restorations):
        for layer in restoration.layers(depth):
            runs, tokens = found[restoration.kind, layer]
            runs += [run] * len(restoration.tokens)
            tokens += restoration.tokens
    return found


def overwriting(samples: int, runs: Sequence[int], tokens: Sequence[int], new: Tensor | int) -> Edit:
    """Puts ``new`` (places, samples or 1, width) in the place of values (runs x samples, T, width)."""

    def put(values: Tensor) -> None:
        values.unflatten(0, (-1, samples))[runs, :, tokens] = new

    return put


def predict_together(
    model: Any,
    case: Case,
    inputs: list[int],
    runs: int,
    samples: int,
    hooks: Sequence[Hook],
    all_logits: bool = False,
) -> Tensor:
    """The target's probability (runs, samples) after so many times the same tokens, under hooks."""
    ids = torch.tensor(inputs, device=model.device).expand(runs * samples, -1)
    k = len(case.target)
    with hooked(hooks, len(ids)):
        # by index: products with rows that are slices of others take 20 times as long in bfloat16 on CPUs
        keep = 0 if all_logits else torch.arange(ids.shape[1] - k, ids.shape[1], device=ids.device)
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits[:, -k:]
    log_p = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_p[:, range(k), case.target].sum(dim=1).exp().view(runs, samples)
