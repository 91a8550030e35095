"""Lays out a plan's local rows for many facts and samples in one packed tensor per stage.

All of it is arithmetic on index arrays, and is done on the host: what a device does in a layer does not depend on how
many shapes of facts a pass has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from causalcone.engine.plan.plan import INDEX, Gather, Given, LayerPlan, Plan, Rows


@dataclass(frozen=True)
class Group:
    """Facts that share a plan, and so are computed together: one pass has several groups.

    tokens (F, P, T): token ids of each fact's prompts; targets (F, k): ids of the target, or None for the clean run's
    most likely token; noise (J, draws, span, hidden) float64: what the noised tokens carry in each sample; vectors:
    each fact's given ones, (width,) each, or (J, width) where every sample has its own.
    """

    plan: Plan
    tokens: np.ndarray
    targets: np.ndarray | None
    noise: np.ndarray
    vectors: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def facts(self) -> int:
        return len(self.tokens)

    @property
    def samples(self) -> int:
        return len(self.noise)


@dataclass(frozen=True)
class Placement:
    """Where a group's local rows of a stage lie: row i of fact f and sample j is ``start[i] + f * per_fact[i] +
    j * per_sample[i]``; ``per_sample`` is 0 for shared rows."""

    group: Group
    start: np.ndarray
    per_fact: np.ndarray
    per_sample: np.ndarray

    def flat(self, ids: np.ndarray, varying: bool) -> np.ndarray:
        """Packed rows of local rows ``ids`` (...) for all facts and samples, (F, J, ...) or (F, 1, ...)."""
        ones = (1,) * ids.ndim
        rows = self.start[ids][None]
        if varying:
            rows = rows + _counted(self.group.samples, ones) * self.per_sample[ids]
        return rows + _counted(self.group.facts, (1, *ones)) * self.per_fact[ids]

    def gathered(self, gather: Gather) -> list[np.ndarray]:
        """The packed rows that a stage's shared rows read, and those that its varying rows do."""
        shared = gather.rows.shared
        return [self.flat(gather.source[:shared], False).ravel(), self.flat(gather.source[shared:], True).ravel()]


def _counted(count: int, ones: tuple[int, ...]) -> np.ndarray:
    return np.arange(count, dtype=INDEX).reshape(-1, *ones)


@dataclass(frozen=True)
class PackedStage:
    """One stage of a layer (keys, queries, sums ...) of all groups, packed in one tensor of ``rows`` rows: those that
    are ``computed``, then ``mixed`` ones, then given ones; and where each group's rows lie in it."""

    computed: int
    mixed: int
    rows: int
    placements: tuple[Placement, ...]

    @cached_property
    def varying(self) -> np.ndarray:
        """(R,) which packed rows differ from sample to sample."""
        varies = np.zeros(self.rows, dtype=bool)
        for placement in self.placements:
            varies[placement.flat(np.flatnonzero(placement.per_sample), True)] = True
        return varies


def place(groups: Sequence[Group], rows: Sequence[Rows], givens: Sequence[Given] = ()) -> PackedStage:
    """Each group's shared rows by fact, then its varying rows by fact and sample; after all groups' the given ones."""
    columns: list[list[np.ndarray]] = [[] for _ in groups]
    computed = _extend(columns, groups, rows, 0)
    total = _extend(columns, groups, [given.rows for given in givens], computed)
    return _stage(groups, columns, computed, 0, total)


def place_attention(groups: Sequence[Group], plans: Sequence[LayerPlan]) -> PackedStage:
    """Attention rows lie segment by segment, so that each segment's output is one slice; then mixes and given rows."""
    columns = []
    computed = 0
    for group, plan in zip(groups, plans, strict=True):
        placed = np.zeros((3, plan.attn.total), dtype=INDEX)
        for segment in plan.segments:
            size, samples = segment.queries.size, group.samples if segment.varying else 1
            segment_rows = slice(segment.first, segment.first + size)
            placed[0, segment_rows] = computed + np.arange(size)
            placed[1, segment_rows] = samples * size
            placed[2, segment_rows] = size if segment.varying else 0
            computed += group.facts * samples * size
        columns.append([placed])
    mixed = _extend(columns, groups, [plan.mix.base.rows for plan in plans], computed)
    total = _extend(columns, groups, [plan.attn_given.rows for plan in plans], mixed)
    return _stage(groups, columns, computed, mixed - computed, total)


def _stage(
    groups: Sequence[Group], columns: Sequence[list[np.ndarray]], computed: int, mixed: int, total: int
) -> PackedStage:
    placements = (
        Placement(group, *np.concatenate(placed, axis=1)) for group, placed in zip(groups, columns, strict=True)
    )
    return PackedStage(computed, mixed, total, tuple(placements))


def _extend(columns: Sequence[list[np.ndarray]], groups: Sequence[Group], rows: Sequence[Rows], first: int) -> int:
    """Place shared rows by fact and varying rows by fact and sample, from row ``first`` on, and return the row after
    them. Columns (3, rows): start, step per fact and step per sample."""
    for group, placed, counts in zip(groups, columns, rows, strict=False):
        column, shared = np.zeros((3, counts.total), dtype=INDEX), slice(counts.shared)
        varying = slice(counts.shared, None)
        column[0] = first + np.arange(counts.total)
        column[0, varying] += (group.facts - 1) * counts.shared
        column[1, shared], column[1, varying] = counts.shared, group.samples * counts.varying
        column[2, varying] = counts.varying
        placed.append(column)
        first += counts.count(group.facts, group.samples)
    return first


def gather_rows(gathers: Sequence[Gather], source: PackedStage) -> np.ndarray:
    """(R,) for each packed row that a stage computes, the packed row of ``source`` that it reads."""
    pairs = zip(gathers, source.placements, strict=True)
    return joined(part for gather, placement in pairs for part in placement.gathered(gather))


def spread(values: Sequence[np.ndarray], rows: Sequence[Rows], groups: Sequence[Group]) -> np.ndarray:
    """(R,) what each group's local rows have, such as their token, for each packed row."""
    parts = []
    for value, counts, group in zip(values, rows, groups, strict=True):
        shared, varying = np.split(value, [counts.shared])
        parts += [np.tile(shared, group.facts), np.tile(varying, group.facts * group.samples)]
    return joined(parts)


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Index arrays one after the other, flat."""
    flat = [part.ravel() for part in parts]
    return np.concatenate(flat).astype(INDEX, copy=False) if flat else np.empty(0, dtype=INDEX)
