"""Counting the cost of stages on a model without weights: nothing is computed."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from causalcone.engine.edit.runs.flops import Flops
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Architecture
from causalcone.engine.plan.cost import cost
from causalcone.engine.run.runner import PassRunner, Trial
from causalcone.engine.run.scheduler import PlanCache
from causalcone.runners.sweep.inputs.planned_facts import FactLengths, PlannedFacts, Weighted

PLANNED = 24
"""Shapes of facts that are planned one by one; of more, as many typical ones."""


@dataclass(frozen=True)
class Counts:
    """A model without weights, and the facts of a sweep. known: how many facts pass the filter, all by default."""

    architecture: Architecture
    facts: PlannedFacts
    known: int | None = None

    def __post_init__(self) -> None:
        if self.known is not None and not 1 <= self.known <= self.facts.count:
            raise ExperimentError(f"--known is {self.known}; give 1 to {self.facts.count}, as many as there are facts")

    @property
    def selected(self) -> int:
        """How many facts go on from the filter."""
        return self.facts.count if self.known is None else self.known

    @cached_property
    def flops(self) -> Flops:
        return Flops(self.architecture.sizes)

    def some(self, count: int | None) -> Weighted:
        """The lengths of the first ``count`` facts that go on, of all by default."""
        return self.facts.some(self.selected if count is None else min(count, self.selected), first=self.known is None)

    def added(self, count: int | None, one: Callable[[FactLengths], tuple[float, int]]) -> tuple[float, float]:
        """FLOPs and rows of the first ``count`` facts that go on, all together, from those of one."""
        results = [(*one(lengths), weight) for lengths, weight in grouped(self.some(count), PLANNED)]
        return sum(flops * weight for flops, _, weight in results), sum(rows * weight for _, rows, weight in results)

    def planned(self, trial: Trial, samples: int, gradient: bool = False) -> float:
        """FLOPs of the engine's own plan, where memory does not split the fact."""
        nothing: Any = None  # noise is drawn when a pass runs
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "samples": samples}
        model: dict[str, Any] = {"architecture": self.architecture, "plans": PlanCache()}
        runner = PassRunner(trials=[trial], noise=nothing, gradient=gradient, **model, **numbers)
        sizes, argmax = self.architecture.sizes, not trial.targets
        return sum(cost(runner.plan(part)[0], sizes, 1, samples, argmax).flops for part in runner.parts())


def grouped(facts: Weighted, most: int) -> Weighted:
    """Facts that are alike to a plan, put together; more than ``most`` groups are merged to as many of about the same
    size, each with the lengths of its middle fact."""
    weights: dict[tuple[int, ...], float] = defaultdict(float)
    like: dict[tuple[int, ...], FactLengths] = {}
    for lengths, weight in facts:
        start, end = lengths.span
        key = (lengths.prompt - start, lengths.prompt, end, lengths.target)  # what counts most comes first
        weights[key] += weight
        like.setdefault(key, lengths)
    ordered = sorted(weights)
    if len(ordered) <= most:
        return [(like[key], weights[key]) for key in ordered]
    shares = np.array([weights[key] for key in ordered], dtype=np.float64)
    middle = np.cumsum(shares) - shares / 2
    group = np.minimum(most - 1, (middle * most / shares.sum()).astype(np.int64))
    merged = []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        centre = members[np.searchsorted(np.cumsum(shares[members]), shares[members].sum() / 2)]
        merged.append((like[ordered[centre]], float(shares[members].sum())))
    return merged
