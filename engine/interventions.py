"""The vocabulary of experiments: sites, states, windows, and the runs that interventions make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from causalcone.engine.errors import ExperimentError

SITES = ("attn", "mlp", "hidden")
"""Where a layer's value can be overwritten, in the order in which a layer computes them."""

CLEAN, CORRUPTED = 0, 1
"""The base runs of every fact; branch runs are numbered from 2."""


@dataclass(frozen=True)
class State:
    """What is restored: a kind of value (``hidden``, ``mlp`` or ``attn``) over a window of so many layers."""

    kind: str
    window: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SITES:
            raise ExperimentError(f"unknown kind {self.kind!r}; choose from hidden, mlp, attn")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ExperimentError(f"the window of {self.kind} is {self.window!r}; give a number of layers from 1 up")

    def layers(self, centre: int, depth: int) -> tuple[int, int]:
        """The half-open range of layers of the window centred on a layer, clipped to the model (METHODS 3)."""
        return max(0, centre - self.window // 2), min(depth, centre - (-self.window // 2))

    def __str__(self) -> str:
        return f"{self.kind}:{self.window}"


def as_states(states: Iterable[State | str | tuple[str, int]]) -> tuple[State, ...]:
    """States from ``State``, ``("mlp", 10)`` or ``"mlp:10"``; an error names the one that makes no sense."""
    if isinstance(states, str):
        states = [states]
    parsed = tuple(_as_state(state) for state in states)
    if not parsed:
        raise ExperimentError("no states to restore; give at least one, such as ('hidden', 1)")
    if len(set(parsed)) < len(parsed):
        twice = next(state for state in parsed if parsed.count(state) > 1)
        raise ExperimentError(f"the state {twice} is given twice; give each once")
    return parsed


def _as_state(state: State | str | tuple[str, int]) -> State:
    if isinstance(state, State):
        return state
    if isinstance(state, str):
        name, _, size = state.partition(":")
        if not size.isascii() or not size.lstrip("-").isdigit():
            raise ExperimentError(f"the state {state!r} is not KIND:WINDOW, such as mlp:10")
        return State(name, int(size))
    try:
        kind, window = state
    except (TypeError, ValueError):
        raise ExperimentError(f"the state {state!r} is not a pair of kind and window, such as ('mlp', 10)") from None
    return State(kind, window)


@dataclass(frozen=True)
class Overwrites:
    """Interventions as columns: at ``site`` of layers ``start`` to ``end`` (half-open), ``token`` of ``run`` takes the
    value that the run ``source`` has there. One row is one intervention; a run may have several.

    Fields are int arrays of one length (M,); ``site`` indexes ``SITES``.
    """

    site: np.ndarray
    start: np.ndarray
    end: np.ndarray
    run: np.ndarray
    token: np.ndarray
    source: np.ndarray


@dataclass(frozen=True, eq=False)
class Experiment:
    """The runs of one fact: the two base runs and the branch runs that overwrites fork from them.

    ``base`` (R,) names for each run the run whose embeddings it starts from (its own number for base runs).
    """

    base: np.ndarray
    overwrites: Overwrites

    @property
    def runs(self) -> int:
        return len(self.base)

    @cached_property
    def forks(self) -> np.ndarray:
        """(R,) the first layer at which each run is overwritten; beyond every layer for base runs."""
        first = np.full(self.runs, np.iinfo(np.int64).max)
        np.minimum.at(first, self.overwrites.run, self.overwrites.start)
        return first


def restorations(windows: np.ndarray) -> Experiment:
    """Corrupted runs with one window restored to its clean value (causal tracing, METHODS 3).

    ``windows`` (B, 4) holds a row (site, start, end, token) per branch; branch i is run ``2 + i``.
    """
    branches = np.arange(len(windows)) + 2
    site, start, end, token = windows.T
    source = np.full(len(windows), CLEAN)
    base = np.concatenate([[CLEAN, CORRUPTED], np.full(len(windows), CORRUPTED)])
    return Experiment(base, Overwrites(site, start, end, branches, token, source))
