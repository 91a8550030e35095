"""Row-indexed attention: a query row sees given key rows of packed tensors, those of its ancestors and its own run's.

Key k of a run is the row of its token k, whichever run that row was computed in. Runs are attended together that query
for the same tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from causalcone.kernels.attention import attend
from causalcone.kernels.transfer import on_device

MAX_RUNS = 16_384
"""Runs in one batch of attention; CUDA grids end at 65,535 blocks in some directions."""


@dataclass(frozen=True)
class ScoreRule:
    """How scores come about. ``scale`` multiplies them; ``softcap`` bounds them by ``softcap * tanh(score / softcap)``,
    where it is a number; ``window`` is how many tokens a query sees, itself included, None for all before it."""

    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None


class RunRows(NamedTuple):
    """Which packed rows belong to B runs: their queries' (B, m) and their keys' (B, K), and the tokens (m,) that query,
    each below K."""

    queries: Tensor
    keys: Tensor
    tokens: tuple[int, ...]


def attend_rows(
    queries: Tensor, keys_values: Tensor, runs: RunRows, scoring: ScoreRule, out: Tensor, tile: int
) -> None:
    """``out`` (B * m, H * d) = the heads' outputs of query rows, run by run.

    queries (Q, H * d) and keys_values (S, 2 * G * d), keys and values side by side, are packed rows. Runs are walked in
    batches of about ``tile`` keys, of which copies are made.
    """
    if not runs.queries.numel():
        return
    visible = visible_keys(on_device(torch.tensor(runs.tokens), queries.device), runs.keys.shape[1], scoring.window)
    d = scoring.head_dim
    first = 0
    count = runs_at_once(runs.keys.shape[1], tile)
    for q, k in zip(runs.queries.split(count), runs.keys.split(count), strict=True):
        gathered = keys_values.index_select(0, k.flatten()).view(*k.shape, 2, keys_values.shape[1] // (2 * d), d)
        query = queries.index_select(0, q.flatten()).view(*q.shape, queries.shape[1] // d, d)
        attended = attend(query, gathered[:, :, 0], gathered[:, :, 1], visible, scoring.scale, scoring.softcap)
        out[first : first + q.numel()] = attended.flatten(2).flatten(0, 1)
        first += q.numel()


def visible_keys(tokens: Tensor, keys: int, window: int | None) -> Tensor:
    """(m, K) which of the keys 0..K-1 each querying token (m,) sees, of the last ``window`` or all before it."""
    token, key = tokens[:, None], torch.arange(keys, device=tokens.device)
    return (key <= token) if window is None else (key <= token) & (key > token - window)


def runs_at_once(keys: int, tile: int) -> int:
    """How many runs have about ``tile`` keys together."""
    return min(max(1, tile // keys), MAX_RUNS)
