"""What is measured: each study knows how the engine computes it and how the naive way does, for the same facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import naive
import numpy as np
import pyarrow as pa

from causalcone import Fact, Tracer
from causalcone.engine.localize.tracer import TracePlan
from causalcone.engine.noise import Noise

States = tuple[tuple[str, int], ...]
Values = dict[tuple[str, str, int, int, int | None], float]
"""By (fact id, kind, window, layer, token): restored or zeroed probabilities, or norms of gradients."""


@dataclass(frozen=True)
class Study(ABC):
    """A method on facts. ``sigma`` of those that trace is a number, so that every dtype and every way gets the same
    noise."""

    facts: Sequence[Fact]

    @abstractmethod
    def compute(self, tracer: Tracer) -> pa.Table: ...

    @abstractmethod
    def values(self, table: pa.Table) -> Values: ...

    @abstractmethod
    def naive_work(self, model: Any, tokenizer: Any, together: int | None) -> list[naive.Task]:
        """The naive way, so many values ``together``, or as published."""

    def plan(self, tracer: Tracer) -> TracePlan | None:
        """What the engine says it computes, of methods that have plans."""
        return None

    def effect(self, table: pa.Table) -> float | None:
        """The largest relative change of a probability by the method, which shows that it does something."""
        return None

    def small(self) -> Study:
        """The same on the shortest prompt alone, to warm up."""
        return replace(self, facts=self._by_length()[:1])

    def typical(self) -> Study:
        """The same on a prompt of middling length alone."""
        return replace(self, facts=self._by_length()[len(self.facts) // 2 :][:1])

    def _by_length(self) -> list[Fact]:
        return sorted(self.facts, key=lambda fact: len(fact.text))


@dataclass(frozen=True)
class Tracing(Study):
    """Causal tracing at all prompt tokens, in every layer."""

    sigma: float | str = "3sd"
    states: States = (("hidden", 1), ("mlp", 10), ("attn", 10))
    samples: int = 10
    sever: str | None = None
    joint: bool = False
    noise: Noise | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The engine and the naive way call them the same."""
        return dict(vars(self))

    def compute(self, tracer: Tracer) -> pa.Table:
        return tracer.trace(**self.arguments)

    def plan(self, tracer: Tracer) -> TracePlan:
        return tracer.plan(**self.arguments)

    def values(self, table: pa.Table) -> Values:
        return by_key(table, "p_patched")

    def effect(self, table: pa.Table) -> float:
        return largest_change(table, "p_corrupted")

    def naive_work(self, model: Any, tokenizer: Any, together: int | None) -> list[naive.Task]:
        return naive.tracing(model, tokenizer, **self.arguments, together=together)


@dataclass(frozen=True)
class Zeroing(Study):
    """Zeroing at the subject; each fact has a value for its clean run too."""

    states: States = (("mlp", 5),)

    def compute(self, tracer: Tracer) -> pa.Table:
        return tracer.zero(self.facts, self.states)

    def values(self, table: pa.Table) -> Values:
        untouched = dict(zip(table["fact_id"].to_pylist(), table["p_clean"].to_pylist(), strict=True))
        return by_key(table, "p_patched") | {key_of(fact, naive.CLEAN): p for fact, p in untouched.items()}

    def effect(self, table: pa.Table) -> float:
        return largest_change(table, "p_clean")

    def naive_work(self, model: Any, tokenizer: Any, together: int | None) -> list[naive.Task]:
        return naive.zeroing(model, tokenizer, self.facts, self.states, together=together)


@dataclass(frozen=True)
class Gradients(Study):
    """Integrated gradients, from zero, of the most likely token's probability by every state."""

    kinds: tuple[str, ...] = ("hidden", "mlp", "attn")
    steps: int = 50

    def compute(self, tracer: Tracer) -> pa.Table:
        return tracer.integrated_gradients(self.facts, self.kinds, steps=self.steps)

    def values(self, table: pa.Table) -> Values:
        return by_key(table.append_column("window", pa.repeat(1, len(table))), "norm")

    def small(self) -> Gradients:
        return replace(self, facts=super().small().facts, steps=2)

    def naive_work(self, model: Any, tokenizer: Any, together: int | None) -> list[naive.Task]:
        return naive.gradients(model, tokenizer, self.facts, self.kinds, self.steps, together=together)


def by_key(table: pa.Table, column: str) -> Values:
    keys = [table[name].to_pylist() for name in ("fact_id", "kind", "window", "layer", "token")]
    return dict(zip(zip(*keys, strict=True), table[column].to_pylist(), strict=True))


def key_of(fact_id: str, restoration: Any) -> tuple[str, str, int, int, int | None]:
    return fact_id, restoration.kind, restoration.window, restoration.layer, restoration.token


def largest_change(table: pa.Table, column: str) -> float:
    """Of the column by the method, relative to it."""
    return float(np.abs(table["p_patched"].to_numpy() / table[column].to_numpy() - 1).max())
