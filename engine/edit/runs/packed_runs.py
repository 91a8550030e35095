"""Token sequences packed into one tensor of rows: where each run's rows lie, and which rows attend to which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np

from causalcone.kernels.gathering import TwoKinds, two_kinds
from causalcone.kernels.row_attention import PaddedRuns, padded, run_rows
from causalcone.kernels.transfer import Array


@dataclass(frozen=True)
class Text:
    """One token sequence. noise (n, hidden) float64 is added to the embeddings of its tokens from ``noised`` on."""

    tokens: tuple[int, ...]
    noise: np.ndarray | None = None
    noised: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


class Attention(NamedTuple, Generic[Array]):
    """What runs attend to: ``queries`` among the rows that query and ``keys`` among rows and stored ones, as they fill
    the batches of ``runs``."""

    queries: Array
    keys: TwoKinds[Array]
    runs: PaddedRuns[Array]


class Runs(NamedTuple, Generic[Array]):
    """Runs in the order of their rows: each has so many ``rows``, of which the last ``read`` are read out. positions
    (R,): of each row's token; read_rows: the rows that are read out, in the runs' order; attention: of all rows, and of
    those that are read out, where it is asked for."""

    rows: list[int]
    read: list[int]
    positions: Array
    read_rows: Array
    attention: Attention[Array]
    read_attention: Attention[Array]

    @classmethod
    def of(cls, runs: np.ndarray, attend: bool = True, read_out: bool = True) -> Runs[np.ndarray]:
        """From runs (4, N): the tokens of each whose keys and values are stored (past), and those after them that have
        rows of their own (rows), of which the last are read out (read); and from which row on the former are stored.
        Those of one form, as many rows, read ones and past ones, should be neighbours (``in_order``). attend, read_out:
        which attention is asked for."""
        past, rows, read, stored = runs
        columns = np.stack([past, rows, stored, np.cumsum(rows) - rows])
        attention, read_attention = (
            _attention(count[: len(count) * asked], *columns[:, : len(count) * asked])
            for count, asked in ((rows, attend), (read, read_out))
        )
        read_rows = spans(np.cumsum(rows) - read, read)
        return Runs(rows.tolist(), read.tolist(), spans(past, rows), read_rows, attention, read_attention)

    @classmethod
    def whole(cls, rows: np.ndarray, read: np.ndarray | None = None) -> Runs[np.ndarray]:
        """Runs of whole texts of ``rows`` (N,) tokens, in order of their lengths and of how many rows are read."""
        none = np.zeros_like(rows)
        return cls.of(np.stack([none, rows, none if read is None else read, none]), read_out=read is not None)


def _attention(
    count: np.ndarray, past: np.ndarray, rows: np.ndarray, stored: np.ndarray, start: np.ndarray
) -> Attention[np.ndarray]:
    """Of the last ``count`` (N,) rows of each run."""
    first = np.cumsum(count) - count
    forms = np.stack([count, rows, past])
    edges = np.flatnonzero((forms[:, 1:] != forms[:, :-1]).any(0)) + 1
    batches = []
    for runs in np.split(np.arange(len(count)), edges):
        m, own, before = forms[:, runs[0]] if len(runs) else (0, 0, 0)
        frozen, moving = stored[runs, None] + np.arange(before), start[runs, None] + np.arange(own)
        tokens = tuple(range(before + own - m, before + own))
        batches.append((first[runs, None] + np.arange(m), np.concatenate([-1 - frozen, moving], axis=1), tokens, True))
    queries, keys, filled = padded(run_rows(batches))
    return Attention(queries, two_kinds(keys), filled)


def in_order(*columns: np.ndarray) -> np.ndarray:
    """The order that brings runs of one form together: by the first column, then by the next."""
    return np.lexsort(columns[::-1])


def spans(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), then start[1], ..."""
    first = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - first, count)
