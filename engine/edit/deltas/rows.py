"""Rows of many edited models in one tensor: to each edit's rows, its change of weights adds its own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Dense, LowRank

Addition = Callable[[Tensor], Tensor]
"""The addition of a change of weights to values (R, hidden), from their keys (R, inner)."""


def addition(change: LowRank | Dense, device: torch.device, dtype: torch.dtype) -> Addition:
    """The addition of a change to values in ``dtype``; a low-rank product is computed in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    change = change.to(device, wide if isinstance(change, LowRank) else dtype)
    return lambda keys: change.product(keys).to(dtype)


def slices(of: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The rows of each edit, from the edit (N,) and the number of rows (N,) of each run: neighbours are one slice."""
    if not len(of):
        return
    ends = np.cumsum(rows)
    last = np.flatnonzero(np.append(of[1:] != of[:-1], True))
    start = 0
    for run in last:
        yield int(of[run]), slice(start, int(ends[run]))
        start = int(ends[run])


def changed(keys: Tensor, values: Tensor, additions: Sequence[tuple[slice, Addition | None]]) -> Tensor:
    """New values: all rows, slice by slice in order and without gaps, with their additions. Gradient flows."""
    return torch.cat([values[at] if add is None else values[at] + add(keys[at]) for at, add in additions])
