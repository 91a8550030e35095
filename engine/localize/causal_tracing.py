"""Causal tracing and zeroing as experiments: what runs for each fact, and the table that comes of it (METHODS 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from causalcone.engine.errors import FactError
from causalcone.engine.facts import EncodedFact, encode
from causalcone.engine.localize.branches import TraceGrid, choose_tokens, restoration_branches, zeroing_branches
from causalcone.engine.localize.options import TraceSpec
from causalcone.engine.localize.states import State
from causalcone.engine.models.base import Sizes
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import Base
from causalcone.engine.run.runner import Trial


def target_tokens(fact: EncodedFact) -> tuple[int, ...]:
    """The tokens that predict the target's."""
    return tuple(range(len(fact.prompt) - 1, len(fact.tokens)))


def corrupted_span(fact: EncodedFact, extra_tokens: int) -> tuple[int, int]:
    """The subject's tokens and ``extra_tokens`` behind them, as far as the prompt has them."""
    return fact.span[0], min(fact.span[1] + extra_tokens, len(fact.prompt))


def counterfactual_prompt(fact: EncodedFact, tokenizer: Any, sizes: Sizes) -> tuple[int, ...]:
    """Token ids of the fact's prompt about its ``counterfactual_subject``, which must be as many."""
    name, subject = fact.fact.id, fact.fact.counterfactual_subject
    if subject is None:
        raise FactError(f"fact {name!r} has no counterfactual_subject; give one, or corrupt by noise")
    other = encode(replace(fact.fact, subject=subject), tokenizer, "argmax", sizes.vocabulary, sizes.positions).prompt
    if len(other) != len(fact.prompt):
        raise FactError(
            f"fact {name!r}: the prompt has {len(other)} tokens with the counterfactual subject {subject!r} and "
            f"{len(fact.prompt)} with its own; choose a subject of as many tokens"
        )
    if other == fact.prompt:
        raise FactError(f"fact {name!r}: the counterfactual subject {subject!r} gives the same prompt; choose another")
    return other


@dataclass
class CausalTracing:
    """Causal tracing as ``spec`` says, in a model of ``depth`` layers; facts of one shape share their branches."""

    spec: TraceSpec
    depth: int
    _branches: dict[tuple, TraceGrid] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return 1 if self.spec.corruption.kind == "counterfactual" else self.spec.samples

    @property
    def bases(self) -> tuple[Base, ...]:
        """The clean run, the corrupted one, and where the published code corrupts restored runs otherwise, that one."""
        noise, published = self.spec.corruption, self.spec.compat == "published"
        if noise.kind == "counterfactual":
            return Base(), Base(prompt=1)
        second = Base(draw=int(bool(self.spec.sever)), replace=noise.replace)
        first = Base(draw=0, replace=noise.replace and not published)
        return (Base(), first, second) if published and first != second else (Base(), first)

    @property
    def draws(self) -> int:
        return 1 + max(base.draw or 0 for base in self.bases)

    def branches(self, fact: EncodedFact, first_corrupted: int) -> TraceGrid:
        spec = self.spec
        tokens = choose_tokens(spec.chosen, len(fact.prompt), fact.span)
        key = (tokens, first_corrupted)
        if key not in self._branches:
            self._branches[key] = restoration_branches(
                spec.states, self.depth, first_corrupted, tokens, self.bases, spec.sever, spec.joint
            )
        return self._branches[key]

    def case(self, fact: EncodedFact, counterfactual: tuple[int, ...] | None) -> tuple[Trial, TraceGrid]:
        read = target_tokens(fact)
        tokens = len(fact.tokens)
        if counterfactual is None:
            span = corrupted_span(fact, self.spec.extra_tokens)
            branches = self.branches(fact, span[0])
            shape = Shape(tokens, span, (read,))
            return Trial(fact.fact.id, (fact.tokens,), fact.target, shape, branches.experiment), branches
        other = counterfactual + fact.target[:-1]
        alike = tuple(bool(same) for same in np.array(fact.tokens) == np.array(other))
        branches = self.branches(fact, alike.index(False))
        shape = Shape(tokens, (0, 0), (read, read), (alike,))
        return Trial(fact.fact.id, (fact.tokens, other), fact.target, shape, branches.experiment), branches


@dataclass
class Zeroing:
    """Zeroing of ``states`` at the chosen tokens together."""

    states: Sequence[State]
    tokens: str | tuple[int, ...]
    depth: int
    _branches: dict[tuple, TraceGrid] = field(default_factory=dict)

    def case(self, fact: EncodedFact) -> tuple[Trial, TraceGrid]:
        tokens = choose_tokens(self.tokens, len(fact.prompt), fact.span)
        if tokens not in self._branches:
            self._branches[tokens] = zeroing_branches(self.states, self.depth, tokens)
        branches = self._branches[tokens]
        shape = Shape(len(fact.tokens), (0, 0), (target_tokens(fact),))
        return Trial(fact.fact.id, (fact.tokens,), fact.target, shape, branches.experiment), branches
