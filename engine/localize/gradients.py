"""Integrated gradients of hidden states, MLP and attention outputs (docs/methods.md, "Integrated gradients").

First one pass hands out the clean states, then every state is set, in a run of its own, to points of the straight line
from its baseline to its clean value: the points are what differs from sample to sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from causalcone.engine.errors import ModelError
from causalcone.engine.facts import EncodedFact, Fact, OnError, Skipped
from causalcone.engine.localize.causal_tracing import target_tokens
from causalcone.engine.localize.options import GradientSpec, Progress, choose_tokens
from causalcone.engine.localize.trace_run import facts_of_level
from causalcone.engine.noise import Noise, NoiseStream
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import (
    CLEAN,
    CLEAN_AND_CORRUPTED,
    SITES,
    Base,
    Captures,
    Experiment,
    Overwrites,
    given,
)
from causalcone.engine.run.runner import Result, Trial
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import GRADIENT_SCHEMA


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of one fact: site (an index), layer and token of each state, the attribution's L2 norm, its
    sum, and how far the sum is from the difference in p that it should add up to; all (states,)."""

    site: np.ndarray
    layer: np.ndarray
    token: np.ndarray
    norm: np.ndarray
    total: np.ndarray
    gap: np.ndarray

    def batch(self, fact_id: str) -> pa.RecordBatch:
        """The table of the fact."""
        columns = [
            pa.repeat(pa.scalar(fact_id), len(self.layer)),
            pa.array([SITES[site] for site in self.site]),
            pa.array(self.layer, pa.int32()),
            pa.array(self.token, pa.int32()),
            *map(pa.array, (self.norm, self.total, self.gap)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=GRADIENT_SCHEMA)


@dataclass(frozen=True, kw_only=True)
class GradientRun:
    """Facts made ready for integrated gradients. spec: with the noise level as a number; skipped: facts that cannot be
    used."""

    method: IntegratedGradients
    spec: GradientSpec
    facts: list[EncodedFact]
    skipped: list[Skipped]

    @classmethod
    def of(
        cls, session: Session, facts: Sequence[Fact], spec: GradientSpec, on_error: OnError, limit: int | None = None
    ) -> GradientRun:
        """Of the first ``limit`` facts, with a noise level that is of all of them."""
        if session.architecture.held_bytes is not None:
            raise ModelError(
                "integrated gradients go back through all layers, whose weights have to be in memory for that; load "
                "the model with weights='resident'"
            )

        def ready(fact: EncodedFact) -> EncodedFact:
            choose_tokens(spec.tokens, len(fact.prompt), fact.span, fact.fact.id)
            return fact

        corrupted = spec.baseline == "corrupted"
        level_of, integrated = facts_of_level(facts, limit, spec.sigma if corrupted else 0.0)
        encoded, skipped = session.encode(level_of, spec.target, on_error, ready)
        noise = None
        if corrupted and encoded:
            level = session.noise_level(spec.sigma, [each.fact for each in encoded])
            spec = replace(spec, sigma=level)
            noise = NoiseStream(Noise(), level, spec.seed, spec.samples, session.sizes.hidden)
        method = IntegratedGradients(session, spec.kinds, spec.steps, spec.tokens, noise)
        return cls(
            method=method, spec=spec, facts=[each for each in encoded if each.fact.id in integrated], skipped=skipped
        )

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        """One batch per fact, in order; the call itself refuses memory that is too little for a single run."""
        self.method.check_memory(self.facts)
        return self._batches(progress or (lambda done, of: None))

    def _batches(self, report: Progress) -> Iterator[pa.RecordBatch]:
        report(0, len(self.facts))
        for done, (fact, attribution) in enumerate(zip(self.facts, self.method.of(self.facts), strict=True), start=1):
            yield attribution.batch(fact.fact.id)
            report(done, len(self.facts))


@dataclass(frozen=True)
class IntegratedGradients:
    """The method on a model. noise: of the corrupted baseline, whose samples are averaged over; None for zero."""

    session: Session
    kinds: Sequence[str]
    steps: int
    tokens: str | tuple[int, ...]
    noise: NoiseStream | None

    def of(self, facts: Sequence[EncodedFact]) -> Iterator[Attribution]:
        """Each fact's attribution, in order."""
        for fact in facts:
            at = self._states(fact)
            parts = [at[first : first + self._together] for first in range(0, len(at), self._together)]
            numbers = [self._integrate(fact, part, *self._ends(fact, part)) for part in parts]
            norm, total, gap = (np.concatenate(column) for column in zip(*numbers, strict=True))
            yield Attribution(at[:, 0], at[:, 1], at[:, 2], norm, total, gap)

    @property
    def _samples(self) -> int:
        return self.noise.samples if self.noise else 1

    @property
    def _together(self) -> int:
        """How many states are taken at once: their points and gradients lie beside the memory that passes are planned
        for."""
        session = self.session
        bytes_of_state = 2 * (self.steps + 1) * self._samples * session.sizes.hidden * session.dtype.itemsize
        return max(1, session.budget(gradient=True).total // 16 // bytes_of_state)

    def _states(self, fact: EncodedFact) -> np.ndarray:
        """(states, 3): site, layer and token."""
        tokens = choose_tokens(self.tokens, len(fact.prompt), fact.span)
        axes = ([SITES.index(kind) for kind in self.kinds], range(self.session.sizes.depth), tokens)
        return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.array, axes), indexing="ij")], axis=1)

    def check_memory(self, facts: Sequence[EncodedFact]) -> None:
        """Raise ``MemoryBudgetError`` where not even the clean run of the longest fact fits."""
        if facts:
            longest = max(facts, key=lambda fact: len(fact.tokens))
            self.session.run([self._reading(longest, self._states(longest)[:1])], self._samples, self.noise)

    def _ends(self, fact: EncodedFact, at: np.ndarray) -> tuple[Tensor, Tensor]:
        """The states' clean values (1, states, hidden) and their baselines (J, states, hidden), float64."""
        states = len(at)
        ((_, result),) = self.session.run([self._reading(fact, at)], self._samples, self.noise)
        clean = result.states[:1, :states].double()
        return clean, result.states[:, states:].double() if self.noise else torch.zeros_like(clean)

    def _reading(self, fact: EncodedFact, at: np.ndarray) -> Trial:
        """The clean run, and the corrupted one, from which the states are read."""
        states = len(at)
        bases = CLEAN_AND_CORRUPTED if self.noise else (Base(),)
        site, layer, token = np.tile(at, (len(bases), 1)).T
        captures = Captures(site, layer, np.repeat(np.arange(len(bases)), states), token)
        experiment = Experiment(bases, np.empty(0, dtype=np.int64), Overwrites.none(), captures=captures)
        shape = Shape(len(fact.tokens), fact.span if self.noise else (0, 0), (target_tokens(fact),))
        return Trial(fact.fact.id, (fact.tokens,), fact.target, shape, experiment)

    def _integrate(
        self, fact: EncodedFact, at: np.ndarray, clean: Tensor, baseline: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Norm, total and gap of the states ``at`` (states, 3) these sites, layers and tokens."""
        (J, states, hidden), change = baseline.shape, clean - baseline
        points, weights = quadrature(self.steps)
        # the baseline itself is a point of no weight: its p is the lower end of the difference to be explained
        along = torch.from_numpy(np.append(points, 0.0))[:, None, None]
        lines = (baseline[:, state] + along * change[:, state] for state in range(states))
        vectors = tuple(line.flatten(0, 1).to(self.session.dtype) for line in lines)
        result = self._run(fact, at, vectors)

        none = torch.zeros(len(along) * J, hidden)  # of states that nothing read out depends on
        of_points = torch.from_numpy(np.append(weights, 0.0))
        p = torch.from_numpy(np.exp(result.log_p)).unflatten(0, (len(along), J))
        gradients = (result.gradients.get(state, none).unflatten(0, (len(along), J)) for state in range(states))
        # of log p by now, which no dtype is too narrow for; dp = p dlog p
        mean = torch.stack(
            [
                torch.einsum("njd,nj,n->jd", gradient.double(), p[:, :, 1 + state], of_points)
                for state, gradient in enumerate(gradients)
            ],
            dim=1,
        )
        attribution = (mean * change).mean(0)
        total = attribution.sum(-1)
        gap = total - (p[0, 0, CLEAN] - p[-1, :, 1:].mean(0))
        return attribution.norm(dim=-1).numpy(), total.numpy(), gap.numpy()

    def _run(self, fact: EncodedFact, at: np.ndarray, vectors: tuple[Tensor, ...]) -> Result:
        """Each state set to its vectors (points, hidden), in a run of its own."""
        shape = Shape(len(fact.tokens), (0, 0), (target_tokens(fact),))
        trial = Trial(fact.fact.id, (fact.tokens,), fact.target, shape, runs_along(at), vectors)
        ((_, result),) = self.session.run([trial], len(vectors[0]), gradient=True)
        return result


def runs_along(at: np.ndarray) -> Experiment:
    """Each of the states ``at`` (states, 3) these sites, layers and tokens set, in a run of its own, to the vector
    given with it, of which every sample has its own."""
    states = len(at)
    runs, (site, layer, token) = np.arange(states), at.T
    overwrites = Overwrites.of(site, layer, layer + 1, runs + 1, token, given(runs))
    return Experiment((Base(),), np.full(states, CLEAN), overwrites, varying_vectors=(True,) * states)


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in (0, 1) and weights (steps,) of Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2
