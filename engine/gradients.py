"""Integrated gradients of hidden states, MLP and attention outputs (METHODS 3; Meng et al. 2022, Fig. 16).

First one pass hands out the clean states, then every state is set, in a run of its own, to points of the straight line
from its baseline to its clean value: the points are what differs from sample to sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.branches import choose_tokens
from causalcone.engine.cone import Shape
from causalcone.engine.facts import EncodedFact
from causalcone.engine.interventions import (
    CLEAN,
    CLEAN_AND_CORRUPTED,
    SITES,
    Base,
    Captures,
    Experiment,
    Overwrites,
    given,
)
from causalcone.engine.job import Case
from causalcone.engine.noise import NoiseStream
from causalcone.engine.restoring import target_tokens
from causalcone.engine.session import Session


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
        samples = self.noise.samples if self.noise else 1
        cases = [self._clean_case(fact) for fact in facts]
        results = self.session.results(self.session.job(cases, samples, self.noise))
        for number, result in results:
            n = len(cases[number].experiment.captures) // len(cases[number].experiment.bases)
            clean = result.states[:, :n].double()
            baseline = result.states[:, n:].double() if self.noise else torch.zeros_like(clean)
            yield self._attribute(facts[number], cases[number].experiment.captures, clean, baseline)

    def _states(self, fact: EncodedFact) -> np.ndarray:
        """(states, 3): site, layer and token."""
        tokens = choose_tokens(self.tokens, len(fact.prompt), fact.span)
        axes = ([SITES.index(kind) for kind in self.kinds], range(self.session.sizes.depth), tokens)
        return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.array, axes), indexing="ij")], axis=1)

    def _clean_case(self, fact: EncodedFact) -> Case:
        """Hands out all states of the clean run, and then those of the corrupted one where it is the baseline."""
        site, layer, token = self._states(fact).T
        bases = CLEAN_AND_CORRUPTED if self.noise else (Base(),)
        runs = np.repeat(np.arange(len(bases)), len(site))
        times = len(bases)
        captures = Captures(np.tile(site, times), np.tile(layer, times), runs, np.tile(token, times))
        experiment = Experiment(bases, np.empty(0, dtype=np.int64), Overwrites.none(), captures=captures)
        span = fact.span if self.noise else (0, 0)
        shape = Shape(len(fact.tokens), span, (target_tokens(fact),))
        return Case(fact.fact.id, (fact.tokens,), fact.target, shape, experiment)

    def _attribute(self, fact: EncodedFact, captures: Captures, clean: Tensor, baseline: Tensor) -> Attribution:
        """clean, baseline (J, states, hidden) float64."""
        J, states, _ = clean.shape
        site, layer, token = (column[:states] for column in (captures.site, captures.layer, captures.token))
        points, weights = quadrature(self.steps)
        # the baseline itself is a point of no weight: its p is the lower end of the difference to be explained
        along = torch.from_numpy(np.append(points, 0.0))[:, None, None, None]
        line = (baseline + along * (clean - baseline)).flatten(0, 1)
        runs = np.arange(states)
        overwrites = Overwrites.of(site, layer, layer + 1, runs + 1, token, given(runs))
        experiment = Experiment((Base(),), np.full(states, CLEAN), overwrites, varying_vectors=(True,) * states)
        shape = Shape(len(fact.tokens), (0, 0), (target_tokens(fact),))
        vectors = tuple(line[:, state].to(self.session.dtype) for state in range(states))
        case = Case(fact.fact.id, (fact.tokens,), fact.target, shape, experiment, vectors)
        job = self.session.job([case], len(line), gradient=True)
        ((_, result),) = self.session.results(job)

        p = torch.from_numpy(np.exp(result.log_p)).unflatten(0, (self.steps + 1, J))
        none = torch.zeros(len(line), line.shape[2])  # of states that nothing read out depends on
        gradient = torch.stack([result.gradients.get(state, none).double() for state in range(states)])
        gradient = gradient.unflatten(1, (self.steps + 1, J))[:, : self.steps]
        mean_gradient = torch.einsum("snjd,n->jsd", gradient, torch.from_numpy(weights))
        attribution = (mean_gradient * (clean - baseline)).mean(0)
        total = attribution.sum(-1)
        change = p[0, 0, CLEAN] - p[-1, :, 1:].mean(0)
        return Attribution(
            site, layer, token, attribution.norm(dim=-1).numpy(), total.numpy(), (total - change).numpy()
        )


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in (0, 1) and weights (steps,) of Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2
