"""Groups facts into passes that fit a memory budget, and splits what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from causalcone.engine.errors import MemoryBudgetError
from causalcone.engine.memory import RecentlyUsed, free_bytes
from causalcone.engine.models.base import Sizes
from causalcone.engine.plan.cost import Footprint, fixed_bytes, peak_bytes
from causalcone.engine.plan.plan import Plan, array_bytes
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.tiles import Tiles

MAX_ROWS_CPU = 131_072
"""Rows of a pass's widest layer beyond which a CPU gains nothing; smaller passes report and stop sooner."""

_SMALLEST = Tiles(rows=64, keys=64, readout_rows=64, vocabulary=1024)
_PLAN_CACHE_BYTES = 2 * 2**30
_SHARE_FOR_PLANS = 1 / 16


@dataclass(frozen=True)
class TrialPart:
    """Some samples and branches of one fact; most facts are one part.

    fact: its index in the run; samples, branches: what of its noise samples and branch runs this part computes.
    """

    fact: int
    samples: range
    branches: range

    def halves(self) -> tuple[TrialPart, TrialPart] | None:
        """Two smaller parts, by samples first (they share only the clean run); None if it cannot be split."""
        if middle := len(self.samples) // 2:
            return replace(self, samples=self.samples[:middle]), replace(self, samples=self.samples[middle:])
        if middle := len(self.branches) // 2:
            return replace(self, branches=self.branches[:middle]), replace(self, branches=self.branches[middle:])
        return None


@dataclass(frozen=True)
class Budget:
    """Bytes for a pass: ``fixed`` for tiles and weights, the rest for rows; at most ``max_rows`` at any layer."""

    total: int
    fixed: int
    max_rows: float
    tiles: Tiles

    @property
    def for_rows(self) -> int:
        return self.total - self.fixed


def plan_budget(
    total: int,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    shared: bool,
    gradient: bool = False,
    held: int | None = None,
    backends: Backends = TORCH,
) -> Budget:
    """Choose tiles that leave at least half of the budget to rows, down to the smallest. ``held`` are the bytes that
    streamed weights take of it."""
    on_cpu = device.type == "cpu"
    # on two threads, half-precision products of 512 to 1,024 rows run at half of the rate of larger ones
    cpu_tiles = Tiles(rows=2048) if dtype.itemsize == 2 else Tiles()
    tiles = cpu_tiles if on_cpu else Tiles(rows=65_536, keys=262_144, readout_rows=8192, vocabulary=8192)
    while True:
        fixed = (held or 0) + fixed_bytes(
            sizes, tiles, dtype, device, shared, gradient, streamed=held is not None, backends=backends
        )
        if fixed <= total // 2 or tiles == _SMALLEST:
            return Budget(total=total, fixed=fixed, max_rows=MAX_ROWS_CPU if on_cpu else float("inf"), tiles=tiles)
        tiles = Tiles(*(max(low, size // 2) for low, size in zip(astuple(_SMALLEST), astuple(tiles), strict=True)))


class PlannedPart(NamedTuple):
    part: TrialPart
    plan: Plan


def assemble(
    parts: Iterable[TrialPart],
    plan_of: Callable[[TrialPart], tuple[Plan, Footprint]],
    budget: Budget,
    name: Callable[[int], str],
) -> Iterator[tuple[list[PlannedPart], int]]:
    """Passes of consecutive parts that fit the budget, and the bytes each will need at its peak.

    Raises ``MemoryBudgetError`` where not even one sample of one branch of a fact fits; ``name`` names a fact.
    """
    queue = list(parts)[::-1]
    current: list[PlannedPart] = []
    held: np.ndarray | int = 0
    rows = 0
    while queue:
        part = queue.pop()
        (plan, size), samples = plan_of(part), len(part.samples)
        weight, part_rows = size.bytes(samples), size.rows.count(1, samples)
        fits_alone = peak_bytes(weight) <= budget.for_rows and part_rows <= budget.max_rows
        halves = None if fits_alone else part.halves()
        if halves:
            queue += halves[::-1]
            continue
        if peak_bytes(weight) > budget.for_rows:
            needed = peak_bytes(weight) + budget.fixed
            raise MemoryBudgetError(
                f"fact {name(part.fact)!r} needs at least {needed / 2**20:.1f} MiB even one restoration at a time, the "
                f"budget is {budget.total / 2**20:.1f} MiB; give more memory"
            )
        if current and (peak_bytes(held + weight) > budget.for_rows or rows + part_rows > budget.max_rows):
            yield current, peak_bytes(held) + budget.fixed
            current, held, rows = [], 0, 0
        current.append(PlannedPart(part, plan))
        held = held + weight
        rows += part_rows
    if current:
        yield current, peak_bytes(held) + budget.fixed


def split(parts: Sequence[TrialPart]) -> list[list[TrialPart]] | None:
    """A pass that ran out of memory as two smaller ones, or None if it cannot be smaller."""
    if len(parts) > 1:
        middle = len(parts) // 2
        return [list(parts[:middle]), list(parts[middle:])]
    halves = parts[0].halves()
    return [[half] for half in halves] if halves else None


class PlanCache(RecentlyUsed[Hashable, tuple[Plan, Footprint]]):
    """Plans and footprints by what they depend on, for the thread that plans ahead as well."""

    def __init__(self, limit: int | None = None) -> None:
        free = int(_SHARE_FOR_PLANS * free_bytes(torch.device("cpu")))
        super().__init__(min(free, _PLAN_CACHE_BYTES) if limit is None else limit)
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Plan, Footprint]]) -> tuple[Plan, Footprint]:
        with self._lock:
            return super().get(key, make)

    def size(self, value: tuple[Plan, Footprint]) -> int:
        return array_bytes(value[0])
