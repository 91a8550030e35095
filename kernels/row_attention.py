"""Row-indexed attention: a query row sees given key rows of packed tensors, those of its ancestors and its own run's.

Key k of a run is the row of its token k, whichever run that row was computed in. Runs are attended together that query
for the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.kernels.attention import attend
from causalcone.kernels.transfer import Array

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


class BatchShape(NamedTuple):
    """``runs`` runs that query for the same tokens, and see ``keys`` keys, which is more than the last of these;
    ``varying`` says that they differ from sample to sample."""

    runs: int
    queries: int
    keys: int
    varying: bool = True


class LaunchShape(NamedTuple):
    """``runs`` runs of at most so many queries and keys each, which a fused kernel takes in one launch."""

    runs: int
    queries: int
    keys: int


class RunRows(NamedTuple, Generic[Array]):
    """Which packed rows belong to runs, batch by batch.

    queries (sum of B * m,), keys (sum of B * K,): rows of every run of a batch in turn; tokens (sum of m,): those that
    query in each batch; table (runs, 4): of each run, where its queries, its keys and its tokens begin in these, and
    how many query. Those of a size follow each other there, size by size as ``alike`` says.
    """

    queries: Array
    keys: Array
    tokens: Array
    table: Array
    batches: tuple[BatchShape, ...]
    alike: tuple[LaunchShape, ...]


def run_rows(batches: Sequence[tuple[np.ndarray, np.ndarray, tuple[int, ...], bool]]) -> RunRows[np.ndarray]:
    """From batches of query rows (B, m), key rows (B, K), the tokens (m,) that query, and whether the runs vary."""
    shapes: list[BatchShape] = []
    tables: dict[tuple[int, int], list[tuple[LaunchShape, np.ndarray]]] = {}
    first = np.zeros(3, dtype=np.int64)
    batches = [batch for batch in batches if len(batch[0])]
    for queries, keys, _, varying in batches:
        (runs, m), K = queries.shape, keys.shape[1]
        shapes.append(BatchShape(runs, m, K, varying))
        starts = first + np.arange(runs)[:, None] * [m, K, 0]
        size = ((K - 1) // 16 if K <= 64 else (K - 1).bit_length(), (m - 1).bit_length())
        tables.setdefault(size, []).append((LaunchShape(runs, m, K), np.insert(starts, 3, m, axis=1)))
        first += runs * np.array([m, K, 0]) + [0, 0, m]

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.int32), *parts], dtype=np.int32, casting="same_kind")

    alike = [zip(*(shape for shape, _ in tables[size]), strict=True) for size in sorted(tables)]
    return RunRows(
        queries=joined([queries.ravel() for queries, *_ in batches]),
        keys=joined([keys.ravel() for _, keys, *_ in batches]),
        tokens=joined([np.array(tokens) for *_, tokens, _ in batches]),
        table=joined([table.ravel() for size in sorted(tables) for _, table in tables[size]]).reshape(-1, 4),
        batches=tuple(shapes),
        alike=tuple(LaunchShape(sum(runs), max(m), max(K)) for runs, m, K in alike),
    )


class PaddedRuns(NamedTuple, Generic[Array]):
    """Runs of similar sizes filled up to one, in few dense batches, as autograd needs them: of every run of a batch in
    turn, tokens (sum of B * m,) are those that query; place (sum of runs' queries,): which query of the batches each
    one of the runs is."""

    tokens: Array
    place: Array
    batches: tuple[LaunchShape, ...]


def padded(runs: RunRows[np.ndarray]) -> tuple[np.ndarray, np.ndarray, PaddedRuns[np.ndarray]]:
    """Runs that are alike as one batch each: the rows that query (sum of B * m,) and their keys (sum of B * K,), where
    what fills up repeats a run's last query, or its last visible key; and the batches."""
    columns: list[list[np.ndarray]] = [[], [], []]
    place = np.empty(len(runs.queries), dtype=np.int32)
    first = 0
    ends = np.cumsum([alike.runs for alike in runs.alike], dtype=np.int64)
    for alike, table in zip(runs.alike, np.split(runs.table, ends)[:-1], strict=True):
        number = np.minimum(np.arange(alike.queries), table[:, 3:] - 1)
        query, token = table[:, :1] + number, runs.tokens[table[:, 2:3] + number]
        key = table[:, 1:2] + np.minimum(np.arange(alike.keys), token[:, -1:])
        place[query] = first + np.arange(0, query.size, alike.queries)[:, None] + number
        first += query.size
        for column, part in zip(columns, (runs.queries[query], runs.keys[key], token), strict=True):
            column.append(part.ravel())
    queries, keys, tokens = (np.concatenate([place[:0], *column]) for column in columns)
    return queries, keys, PaddedRuns(tokens, place, runs.alike)


def attend_padded(
    queries: Tensor, keys_values: Tensor, runs: PaddedRuns[Tensor], scoring: ScoreRule, tile: int
) -> Tensor:
    """The heads' outputs (R, H * d) of the runs' queries, differentiable: queries (sum of B * m, H * d) and keys_values
    (sum of B * K, 2 * G * d) are gathered already. Batches are walked in portions of about ``tile`` keys."""
    d, width = scoring.head_dim, queries.shape[1]
    asked, seen = ([batch.runs * getattr(batch, rows) for batch in runs.batches] for rows in ("queries", "keys"))
    # split, not sliced: the gradient of a slice goes through all rows
    by_batch = zip(queries.split(asked), keys_values.split(seen), runs.tokens.split(asked), strict=True)
    outputs = [queries[:0]]
    for (count, m, K), (query, key_value, token) in zip(runs.batches, by_batch, strict=bool(runs.batches)):
        visible, at_once = visible_keys(token.view(count, m), K, scoring.window), runs_at_once(K, tile)
        keys, values = key_value.view(count, K, 2, -1, d).unbind(2)
        rows = (query.view(count, m, width // d, d), keys, values, visible)
        for q, k, v, shown in zip(*(whole.split(at_once) for whole in rows), strict=True):
            outputs.append(attend(q, k, v, shown, scoring.scale, scoring.softcap).reshape(-1, width))
    return torch.cat(outputs).index_select(0, runs.place)


def by_batch(runs: RunRows[Array]) -> Iterator[tuple[BatchShape, Array, Array, Array]]:
    """Each batch with its query rows (B, m), key rows (B, K) and tokens (m,)."""
    first = [0, 0, 0]
    for batch in runs.batches:
        sizes = (batch.runs * batch.queries, batch.runs * batch.keys, batch.queries)
        query, key, token = (slice(start, start + size) for start, size in zip(first, sizes, strict=True))
        query_rows = runs.queries[query].reshape(batch.runs, batch.queries)
        yield batch, query_rows, runs.keys[key].reshape(batch.runs, batch.keys), runs.tokens[token]
        first = [start + size for start, size in zip(first, sizes, strict=True)]


def attend_rows(
    queries: Tensor, keys_values: Tensor, runs: RunRows[Tensor], scoring: ScoreRule, out: Tensor, tile: int
) -> None:
    """``out`` (sum of B * m, H * d) = the heads' outputs of query rows, run by run.

    queries (Q, H * d) and keys_values (S, 2 * G * d), keys and values side by side, are packed rows. The runs of a
    batch are walked in portions of about ``tile`` keys, of which copies are made.
    """
    d = scoring.head_dim
    first = 0
    for batch, query_rows, key_rows, tokens in by_batch(runs):
        visible = visible_keys(tokens, batch.keys, scoring.window)
        count = runs_at_once(batch.keys, tile)
        for q, k in zip(query_rows.split(count), key_rows.split(count), strict=True):
            gathered = keys_values.index_select(0, k.flatten()).view(*k.shape, 2, keys_values.shape[1] // (2 * d), d)
            query = queries.index_select(0, q.flatten()).view(*q.shape, queries.shape[1] // d, d)
            attended = attend(query, gathered[:, :, 0], gathered[:, :, 1], visible, scoring.scale, scoring.softcap)
            out[first : first + q.numel()] = attended.flatten(2).flatten(0, 1)
            first += q.numel()


def visible_keys(tokens: Tensor, keys: int, window: int | None) -> Tensor:
    """(..., m, K) which of the keys 0..K-1 each querying token (..., m) sees: the last ``window``, or all before it."""
    token, key = tokens[..., None], torch.arange(keys, device=tokens.device)
    return (key <= token) if window is None else (key <= token) & (key > token - window)


def runs_at_once(keys: int, tile: int) -> int:
    """How many runs have about ``tile`` keys together."""
    return min(max(1, tile // keys), MAX_RUNS)
