"""Token sequences packed into one tensor of rows: where each run's rows lie, and which rows attend to which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_PADDED = 16
"""Stored rows that runs are padded by, however few they have."""


@dataclass(frozen=True)
class Text:
    """One token sequence. noise (n, hidden) float64 is added to the embeddings of its tokens from ``noised`` on."""

    tokens: tuple[int, ...]
    noise: np.ndarray | None = None
    noised: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RunBatch:
    """Runs of one form, whose rows are neighbours: ``count`` (B) runs of ``length`` (m) rows each, of which the last
    ``read`` are read out, after stored rows: past (B, p), of which the first ``lacking`` (B, 1, 1) are padding, and
    masked; None where nothing is padded."""

    count: int
    length: int
    read: int
    past: Tensor
    lacking: Tensor | None

    def queries(self, read_only: bool) -> int:
        """Rows of all runs that attend."""
        return self.count * (self.read if read_only else self.length)


@dataclass(frozen=True, eq=False, kw_only=True)
class Runs:
    """Runs in the order of their rows, all (N,) int64: run i has ``past[i]`` tokens whose keys and values are stored,
    from row ``stored[i]`` on, then ``rows[i]`` tokens with rows of their own, of which the last ``read[i]`` are read
    out. Runs of one form, as many rows and read ones, must be neighbours (``in_order``)."""

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
    def batches(self) -> list[RunBatch]:
        return list(self._batches())

    def _batches(self) -> Iterator[RunBatch]:
        if not len(self):
            return
        forms = np.stack([self.rows, self.read])
        edges = np.flatnonzero((forms[:, 1:] != forms[:, :-1]).any(0)) + 1
        for first, end in self._alike(zip([0, *edges], [*edges, len(self)], strict=True)):
            length, read = int(self.rows[first]), int(self.read[first])
            longest = self.past[first:end].max()
            padding = longest - self.past[first:end, None]
            past = self.stored[first:end, None] + np.maximum(0, np.arange(longest) - padding)
            lacking = torch.from_numpy(padding[..., None]).to(self.device) if padding.any() else None
            yield RunBatch(int(end - first), length, read, torch.from_numpy(past).to(self.device), lacking)

    def _alike(self, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Parts of the runs, cut where a past is more than twice the first one's."""
        for first, end in parts:
            while first < end:
                within = self.past[first:end] <= 2 * self.past[first] + _PADDED
                stop = end if within.all() else first + int(within.argmin())
                yield first, stop
                first = stop


def in_order(*columns: np.ndarray) -> np.ndarray:
    """The order that brings runs of one form together: by the first column, then by the next."""
    return np.lexsort(columns[::-1])


def spans(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), then start[1], ..."""
    first = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - first, count)
