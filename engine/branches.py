"""Which branch runs causal tracing needs for facts of one shape, and which result each row of its table shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalcone.engine.errors import ExperimentError
from causalcone.engine.interventions import CORRUPTED, SITES, State

TOKEN_CHOICES = ("all", "subject_onward", "subject", "subject_last", "last")


@dataclass(frozen=True, eq=False)
class Branches:
    """The restorations of one shape.

    windows (B, 4): distinct rows (site, start, end, token); branch i is run 2 + i.
    state, layer, token (rows,): what each table row is about; run (rows,): the run that shows it.
    """

    windows: np.ndarray
    state: np.ndarray
    layer: np.ndarray
    token: np.ndarray
    run: np.ndarray


def restoration_branches(states: Sequence[State], depth: int, first_corrupted: int, tokens: Sequence[int]) -> Branches:
    """One table row per (state, centre layer, token); equal windows are one branch, and tokens before the first
    corrupted one show the corrupted run itself, because restoring them changes nothing."""
    state, layer, token = (
        axis.ravel() for axis in np.meshgrid(np.arange(len(states)), np.arange(depth), np.array(tokens), indexing="ij")
    )
    site = np.array([SITES.index(each.kind) for each in states])[state]
    ranges = np.array([[each.layers(centre, depth) for centre in range(depth)] for each in states])
    start, end = ranges[state, layer].T
    run = np.full(len(state), CORRUPTED)
    reaches = token >= first_corrupted
    # sorted by site and token first, so that a half of the branches still shares most of its windows' beginnings
    keys, branch = np.unique(np.stack([site, token, start, end], 1)[reaches], axis=0, return_inverse=True)
    run[reaches] = branch.ravel() + 2
    return Branches(keys[:, [0, 2, 3, 1]], state, layer, token, run)


def choose_tokens(
    tokens: str | Sequence[int], prompt: int, span: tuple[int, int], fact_id: str = ""
) -> tuple[int, ...]:
    """Token positions from a choice's name or from indices (negative ones count from the prompt's end)."""
    start, end = span
    named = {
        "all": range(prompt),
        "subject_onward": range(start, prompt),
        "subject": range(start, end),
        "subject_last": (end - 1,),
        "last": (prompt - 1,),
    }
    if isinstance(tokens, str):
        return tuple(named[tokens])
    for index in tokens:
        if not -prompt <= index < prompt:
            raise ExperimentError(f"fact {fact_id!r}: token {index} is outside its prompt of {prompt} tokens")
    return tuple(sorted({index % prompt for index in tokens}))


def check_tokens(tokens: str | Sequence[int]) -> str | tuple[int, ...]:
    """The choice of tokens, or an error that names what can be chosen."""
    if isinstance(tokens, str):
        if tokens not in TOKEN_CHOICES:
            raise ExperimentError(f"unknown tokens {tokens!r}; choose from {', '.join(TOKEN_CHOICES)}, or give indices")
        return tokens
    indices = tuple(tokens)
    if not indices or not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise ExperimentError(f"tokens {tokens!r} are not one or more whole numbers; choose indices or {TOKEN_CHOICES}")
    return indices
