"""Row-indexed attention: a query row sees given key rows of packed tensors, those of its ancestors and its own run's.

Query rows (B, m) and key rows (B, K) belong to B runs that query for the same m tokens: key k of a run is the row of
its token k, whichever run that row was computed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalcone.kernels.attention import attend
from causalcone.kernels.transfer import on_device

MAX_RUNS = 16_384
"""Runs in one batch of attention; CUDA grids end at 65,535 blocks in some directions."""


@dataclass(frozen=True)
class ScoreRule:
    """How scores come about. ``scale`` multiplies them; ``softcap`` bounds them by ``softcap * tanh(score / softcap)``,
    where it is a number; ``window`` is how many tokens a query sees, its own included, None for all before it."""

    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None


def attend_rows(
    queries: Tensor,
    keys_values: Tensor,
    query_rows: Tensor,
    key_rows: Tensor,
    tokens: tuple[int, ...],
    scoring: ScoreRule,
    out: Tensor,
    tile: int,
) -> None:
    """``out`` (B * m, H * d) = the heads' outputs of query rows, run by run.

    queries (Q, H * d) and keys_values (S, 2 * G * d), keys and values side by side: packed rows; query_rows (B, m) and
    key_rows (B, K): which of them belong to each run; tokens (m,): the tokens that query, each below K. Runs are walked
    in batches of about ``tile`` keys, of which copies are made.
    """
    if not query_rows.numel():
        return
    visible = visible_keys(tokens, key_rows.shape[1], scoring.window, queries.device)
    d = scoring.head_dim
    first = 0
    runs = runs_at_once(key_rows.shape[1], tile)
    for q, k in zip(query_rows.split(runs), key_rows.split(runs), strict=True):
        gathered = keys_values.index_select(0, k.flatten()).view(*k.shape, 2, keys_values.shape[1] // (2 * d), d)
        query = queries.index_select(0, q.flatten()).view(*q.shape, queries.shape[1] // d, d)
        attended = attend(query, gathered[:, :, 0], gathered[:, :, 1], visible, scoring.scale, scoring.softcap)
        out[first : first + q.numel()] = attended.flatten(2).flatten(0, 1)
        first += q.numel()


def visible_keys(tokens: tuple[int, ...], keys: int, window: int | None, device: torch.device) -> Tensor:
    """(m, K) which of the keys 0..K-1 each querying token sees."""
    token = on_device(torch.tensor(tokens), device)[:, None]
    key = torch.arange(keys, device=device)
    return (key <= token) if window is None else (key <= token) & (key > token - window)


def runs_at_once(keys: int, tile: int) -> int:
    """How many runs have about ``tile`` keys together."""
    return min(max(1, tile // keys), MAX_RUNS)
