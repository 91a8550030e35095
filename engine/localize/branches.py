"""Which branch runs a localization method needs for facts of one shape, and what each row of its table shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.states import State
from causalcone.engine.plan.interventions import CLEAN, CORRUPTED, SITES, ZERO, Base, Experiment, Overwrites

TOKEN_CHOICES = ("all", "subject_onward", "subject", "subject_last", "last")
TOGETHER = -1
"""The token of a table row that is about all chosen tokens together."""

SEVERED = {None: (), "mlp": ("mlp",), "attn": ("attn",), "both": ("mlp", "attn")}
"""By what is severed, the sites that are held at their corrupted values."""


@dataclass(frozen=True, eq=False)
class TraceGrid:
    """The experiment on one shape, and its table: what each row is about (``state``, an index; centre ``layer``;
    ``token``), and the ``run`` that shows it; all (rows,)."""

    experiment: Experiment
    state: np.ndarray
    layer: np.ndarray
    token: np.ndarray
    run: np.ndarray


def restoration_branches(
    states: Sequence[State],
    depth: int,
    first_corrupted: int,
    tokens: Sequence[int],
    bases: tuple[Base, ...],
    sever: str | None = None,
    joint: bool = False,
) -> TraceGrid:
    """Causal tracing, plain or severed: corrupted runs with one window restored to its clean values.

    One table row per (state, centre layer, token), or per (state, centre layer) where the tokens are restored jointly.
    Branches fork from the last of ``bases`` (a clean run, a corrupted one, and where the restored runs are corrupted
    otherwise, that one). Tokens before the first corrupted one show that run itself: restoring them changes nothing.
    """
    reached = tuple(token for token in tokens if token >= first_corrupted)
    table, windows = _windows(states, depth, tokens, reached, len(bases), joint)
    own = _overwritten(windows, len(bases), reached, CLEAN)
    held = [own]
    for site in SEVERED[sever]:
        # where the restored run has the same noise, nothing differs below its window
        start = own.end if len(bases) == 2 else np.zeros_like(own.end)
        held.append(Overwrites.of(np.array(SITES.index(site)), start, np.array(depth), own.run, own.token, CORRUPTED))
    experiment = Experiment(bases, np.full(len(windows), len(bases) - 1), Overwrites.joined(*held[::-1]))
    return TraceGrid(experiment, *table)


def zeroing_branches(states: Sequence[State], depth: int, tokens: Sequence[int]) -> TraceGrid:
    """Zeroing: clean runs with one window set to zero at all of ``tokens``; a table row per (state, centre layer)."""
    table, windows = _windows(states, depth, tokens, tuple(tokens), 1, joint=True)
    overwrites = _overwritten(windows, 1, tuple(tokens), ZERO)
    return TraceGrid(Experiment((Base(),), np.full(len(windows), CLEAN), overwrites), *table)


def _windows(
    states: Sequence[State], depth: int, tokens: Sequence[int], reached: tuple[int, ...], bases: int, joint: bool
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The table's columns (state, layer, token, run), and the distinct windows (B, 5): site, head, token, start, end.
    Equal windows are one branch; rows about tokens that are not ``reached`` show the run that branches fork from."""
    about = [TOGETHER] if joint else list(tokens)
    state, layer, token = (
        axis.ravel() for axis in np.meshgrid(np.arange(len(states)), np.arange(depth), np.array(about), indexing="ij")
    )
    site = np.array([SITES.index(each.site) for each in states])[state]
    head = np.array([-1 if each.head is None else each.head for each in states])[state]
    ranges = np.array([[each.layers(centre, depth) for centre in range(depth)] for each in states])
    start, end = ranges[state, layer].T
    run = np.full(len(state), bases - 1)
    reaches = np.full(len(state), bool(reached)) if joint else np.isin(token, reached)
    # sorted by site and token first, so that a half of the branches still shares most of its windows' beginnings
    columns = np.stack([site, head, token, start, end], 1)[reaches]
    windows, branch = np.unique(columns, axis=0, return_inverse=True)
    run[reaches] = branch.ravel() + bases
    return (state, layer, token, run), windows


def _overwritten(windows: np.ndarray, bases: int, together: tuple[int, ...], source: int) -> Overwrites:
    """The windows' overwrites; those about all tokens together have one for each."""
    run = np.arange(len(windows)) + bases
    site, head, token, start, end = windows.T
    if len(windows) and token[0] == TOGETHER:
        times = len(together)
        site, head, start, end, run = (np.repeat(column, times) for column in (site, head, start, end, run))
        token = np.tile(together, len(windows))
    return Overwrites.of(site, start, end, run, token, source, head=head)


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
