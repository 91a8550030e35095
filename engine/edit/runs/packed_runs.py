"""Token sequences packed into one tensor of rows: where each run's rows lie, and which rows attend to which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.kernels.gathering import TwoKinds, two_kinds
from causalcone.kernels.row_attention import PaddedRuns, padded, run_rows
from causalcone.kernels.transfer import Array, Packet


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Runs:
    """Runs in the order of their rows, all (N,) int64: run i has ``past[i]`` tokens whose keys and values are stored,
    from row ``stored[i]`` on, then ``rows[i]`` tokens with rows of their own, of which the last ``read[i]`` are read
    out. Runs of one form, as many rows, read ones and past ones, should be neighbours (``in_order``)."""

    past: np.ndarray
    rows: np.ndarray
    read: np.ndarray
    stored: np.ndarray
    device: torch.device

    @classmethod
    def whole(cls, rows: np.ndarray, device: torch.device, read: np.ndarray | None = None) -> Runs:
        """Runs of whole texts of ``rows`` (N,) tokens, in order of their lengths and of how many rows are read."""
        none = np.zeros_like(rows)
        return cls(past=none, rows=rows, read=none if read is None else read, stored=none, device=device)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def start(self) -> np.ndarray:
        """(N,) each run's first row."""
        return np.cumsum(self.rows) - self.rows

    @cached_property
    def positions(self) -> Tensor:
        """(R,) the position of each row's token."""
        return torch.from_numpy(spans(self.past, self.rows)).to(self.device)

    @cached_property
    def read_rows(self) -> Tensor:
        """The rows that are read out, in the runs' order."""
        return torch.from_numpy(spans(self.start + self.rows - self.read, self.read)).to(self.device)

    @cached_property
    def attention(self) -> Attention[Tensor]:
        """Of all rows."""
        return self._attention(self.rows)

    @cached_property
    def read_attention(self) -> Attention[Tensor]:
        """Of the rows that are read out, in their order."""
        return self._attention(self.read)

    def _attention(self, count: np.ndarray) -> Attention[Tensor]:
        """Of the last ``count`` (N,) rows of each run."""
        first = np.cumsum(count) - count
        forms = np.stack([count, self.rows, self.past])
        edges = np.flatnonzero((forms[:, 1:] != forms[:, :-1]).any(0)) + 1
        batches = []
        for runs in np.split(np.arange(len(self)), edges):
            m, rows, past = forms[:, runs[0]] if len(runs) else (0, 0, 0)
            stored, own = self.stored[runs, None] + np.arange(past), self.start[runs, None] + np.arange(rows)
            tokens = tuple(range(past + rows - m, past + rows))
            batches.append((first[runs, None] + np.arange(m), np.concatenate([-1 - stored, own], axis=1), tokens, True))
        filled = padded(run_rows(batches))
        rest = filled._replace(queries=filled.queries[:0], keys=filled.keys[:0])
        attention = Attention(filled.queries, two_kinds(filled.keys), rest)
        return Packet.of(attention, self.device).send(self.device)


def in_order(*columns: np.ndarray) -> np.ndarray:
    """The order that brings runs of one form together: by the first column, then by the next."""
    return np.lexsort(columns[::-1])


def spans(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), then start[1], ..."""
    first = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - first, count)
