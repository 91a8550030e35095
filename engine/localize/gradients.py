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

from causalcone.engine.encoding import EncodedFact
from causalcone.engine.errors import ModelError
from causalcone.engine.facts import Fact, OnError
from causalcone.engine.localize.causal_tracing import own_trial
from causalcone.engine.localize.options import GradientSpec, choose_tokens
from causalcone.engine.localize.trace_run import FactsRun, encode_facts
from causalcone.engine.noise import Noise, NoiseStream
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
from causalcone.engine.run.runner import Trial
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import GRADIENT_SCHEMA


@dataclass(frozen=True, kw_only=True)
class GradientRun(FactsRun):
    """Integrated gradients. noise: of the corrupted baseline, whose samples are averaged over; None for zero."""

    name, schema = "gradients", GRADIENT_SCHEMA
    spec: GradientSpec

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
        sigma, noise = spec.sigma if spec.baseline == "corrupted" else None, None
        encoded, skipped, level = encode_facts(session, facts, spec, sigma, on_error, limit)
        if sigma is not None:
            spec = replace(spec, sigma=level)
            noise = NoiseStream(Noise(), level, spec.seed, spec.samples, session.sizes.hidden)
        return cls(session=session, spec=spec, facts=encoded, skipped=skipped, noise=noise)

    def tables(self) -> Iterator[pa.RecordBatch]:
        if self.facts:
            longest = max(self.facts, key=lambda fact: len(fact.tokens))
            self.session.run([self._reading(longest, self._states(longest)[:1])], self._samples, self.noise)
        return map(self._table, self.facts)

    def probabilities(self, table: pa.Table) -> dict[str, float | None]:
        reading = self._reading(self.facts[0], self._states(self.facts[0])[:1])
        ((_, result),) = self.session.run([reading], self._samples, self.noise)
        return dict(zip(("p_clean", "p_corrupted"), np.exp(result.log_p).mean(0).tolist(), strict=False))

    def _table(self, fact: EncodedFact) -> pa.RecordBatch:
        """The L2 norm of each state's attribution, its sum, and how far that is from the difference in p that it should
        add up to."""
        at = self._states(fact)
        parts = [at[first : first + self._together] for first in range(0, len(at), self._together)]
        numbers = [self._integrate(fact, part, *self._ends(fact, part)) for part in parts]
        columns = [
            pa.repeat(pa.scalar(fact.fact.id), len(at)),
            pa.array([SITES[site] for site in at[:, 0]]),
            *(pa.array(at[:, column], pa.int32()) for column in (1, 2)),
            *(pa.array(np.concatenate(column)) for column in zip(*numbers, strict=True)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=GRADIENT_SCHEMA)

    @property
    def _samples(self) -> int:
        return self.noise.samples if self.noise else 1

    @property
    def _together(self) -> int:
        """How many states are taken at once, whose points and gradients lie beside the memory of planned passes."""
        session = self.session
        bytes_of_state = 2 * (self.spec.steps + 1) * self._samples * session.sizes.hidden * session.dtype.itemsize
        return max(1, session.budget(gradient=True).total // 16 // bytes_of_state)

    def _states(self, fact: EncodedFact) -> np.ndarray:
        tokens = choose_tokens(self.spec.tokens, len(fact.prompt), fact.span)
        return integrated_states(self.spec.kinds, self.session.sizes.depth, tokens)

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
        return own_trial(fact, experiment, fact.span if self.noise else (0, 0))

    def _integrate(
        self, fact: EncodedFact, at: np.ndarray, clean: Tensor, baseline: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Norm, total and gap of the states ``at`` (states, 3) these sites, layers and tokens."""
        (J, states, hidden), change = baseline.shape, clean - baseline
        points, weights = np.polynomial.legendre.leggauss(self.spec.steps)  # of (-1, 1), and the path is (0, 1)
        # the baseline itself is a point of no weight: its p is the lower end of the difference to be explained
        along = torch.from_numpy(np.append((points + 1) / 2, 0.0))[:, None, None]
        lines = (baseline[:, state] + along * change[:, state] for state in range(states))
        vectors = tuple(line.flatten(0, 1).to(self.session.dtype) for line in lines)
        trial = own_trial(fact, runs_along(at), vectors=vectors)
        ((_, result),) = self.session.run([trial], len(vectors[0]), gradient=True)

        none = torch.zeros(len(along) * J, hidden)  # of states that nothing read out depends on
        of_points = torch.from_numpy(np.append(weights / 2, 0.0))
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


def integrated_states(kinds: Sequence[str], depth: int, tokens: Sequence[int]) -> np.ndarray:
    """(states, 3): site, layer and token of each."""
    axes = ([SITES.index(kind) for kind in kinds], range(depth), tokens)
    return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.array, axes), indexing="ij")], axis=1)


def runs_along(at: np.ndarray) -> Experiment:
    """Each of the states ``at`` (states, 3) these sites, layers and tokens set, in a run of its own, to the vector
    given with it, of which every sample has its own."""
    states = len(at)
    runs, (site, layer, token) = np.arange(states), at.T
    overwrites = Overwrites.of(site, layer, layer + 1, runs + 1, token, given(runs))
    return Experiment((Base(),), np.full(states, CLEAN), overwrites, varying_vectors=(True,) * states)
