"""Lays out a plan's local rows for many facts and samples in one packed tensor per stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.plan.interventions import ZERO, given
from causalcone.engine.plan.plan import Gather, Given, LayerPlan, Plan, Rows
from causalcone.kernels.transfer import on_device


@dataclass(frozen=True)
class Group:
    """Facts that share a plan, and so are computed together: one pass has several groups.

    tokens (F, P, T): token ids of each fact's prompts; targets (F, k): ids of the target, or None for the clean run's
    most likely token; noise (J, draws, span, hidden) float64: what the noised tokens carry in each sample; vectors:
    each fact's given ones, (width,) each, or (J, width) where every sample has its own.
    """

    plan: Plan
    tokens: Tensor
    targets: Tensor | None
    noise: Tensor
    vectors: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def facts(self) -> int:
        return len(self.tokens)

    @property
    def samples(self) -> int:
        return len(self.noise)

    def vector(self, source: int, width: int, device: torch.device) -> Tensor:
        """A given value for each fact, (F, width), or for each fact and sample, (F, J, width)."""
        if source == ZERO:
            return torch.zeros(self.facts, width, device=device)
        return torch.stack([on_device(vectors[given(source)], device) for vectors in self.vectors])

    def read_targets(self, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The token (n,) that each packed readout row predicts, those by fact and those by fact and sample, of
        ``targets`` (F, k)."""
        predicted = on_device(targets, device)[:, on_device(self.plan.read_place, device)]
        shared = self.plan.read_rows.rows.shared
        varying = predicted[:, None, shared:].expand(-1, self.samples, -1)
        return predicted[:, :shared].flatten(), varying.flatten()

    def given_rows(self, stage: Given, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a stage that are given: (n, width) by fact, and (n, width) by fact and sample."""
        vectors = [self.vector(source, width, device) for source in stage.source.tolist()]

        def stacked(values: list[Tensor]) -> Tensor:
            return torch.stack(values, dim=-2).flatten(0, -2) if values else torch.empty(0, width, device=device)

        return stacked(vectors[: stage.rows.shared]), stacked(vectors[stage.rows.shared :])


@dataclass(frozen=True)
class Placement:
    """Where a group's local rows of a stage lie: row i of fact f and sample j is ``start[i] + f * per_fact[i] +
    j * per_sample[i]``; ``per_sample`` is 0 for shared rows."""

    group: Group
    start: Tensor
    per_fact: Tensor
    per_sample: Tensor

    @property
    def varying(self) -> Tensor:
        """Which local rows differ from sample to sample."""
        return self.per_sample > 0

    def flat(self, ids: Tensor | np.ndarray, varying: bool) -> Tensor:
        """Packed rows of local rows ``ids`` (...) for all facts and samples, (F, J, ...) or (F, 1, ...)."""
        if isinstance(ids, np.ndarray):
            ids = on_device(ids, self.start.device)
        shape = (-1, 1) + (1,) * ids.dim()
        fact = torch.arange(self.group.facts, device=ids.device).view(shape)
        rows = self.start[ids] + fact * self.per_fact[ids]
        if varying:
            sample = torch.arange(self.group.samples, device=ids.device).view((1, *shape[:-1]))
            rows = rows + sample * self.per_sample[ids]
        return rows


@dataclass(frozen=True)
class PackedStage:
    """One stage of a layer (keys, queries, sums ...) of all groups, packed in one tensor of ``rows`` rows: those that
    are ``computed``, then ``mixed`` ones, then given ones; and where each group's rows lie in it."""

    computed: int
    mixed: int
    rows: int
    placements: tuple[Placement, ...]


def place(
    groups: Sequence[Group], rows: Sequence[Rows], device: torch.device, givens: Sequence[Given] = ()
) -> PackedStage:
    """Each group's shared rows by fact, then its varying rows by fact and sample; after all groups' the given ones."""
    columns: list[list[Tensor]] = [[] for _ in groups]
    computed = _extend(columns, groups, rows, 0, device)
    total = _extend(columns, groups, [given.rows for given in givens], computed, device)
    return _stage(groups, columns, computed, 0, total)


def place_attention(groups: Sequence[Group], plans: Sequence[LayerPlan], device: torch.device) -> PackedStage:
    """Attention rows lie segment by segment, so that each segment's output is one slice; then mixes and given rows."""
    columns = []
    computed = 0
    for group, plan in zip(groups, plans, strict=True):
        placed = torch.zeros(3, plan.attn.total, dtype=torch.int64, device=device)
        for segment in plan.segments:
            size, samples = segment.queries.size, group.samples if segment.varying else 1
            segment_rows = slice(segment.first, segment.first + size)
            placed[0, segment_rows] = computed + torch.arange(size, device=device)
            placed[1, segment_rows] = samples * size
            placed[2, segment_rows] = size if segment.varying else 0
            computed += group.facts * samples * size
        columns.append([placed])
    mixed = _extend(columns, groups, [plan.mix.base.rows for plan in plans], computed, device)
    total = _extend(columns, groups, [plan.attn_given.rows for plan in plans], mixed, device)
    return _stage(groups, columns, computed, mixed - computed, total)


def _stage(
    groups: Sequence[Group], columns: Sequence[list[Tensor]], computed: int, mixed: int, total: int
) -> PackedStage:
    placements = (Placement(group, *torch.cat(placed, dim=1)) for group, placed in zip(groups, columns, strict=True))
    return PackedStage(computed, mixed, total, tuple(placements))


def _extend(
    columns: Sequence[list[Tensor]], groups: Sequence[Group], rows: Sequence[Rows], first: int, device: torch.device
) -> int:
    """Place shared rows by fact and varying rows by fact and sample, from row ``first`` on, and return the row after
    them. Columns (3, rows): start, step per fact and step per sample."""
    for group, placed, counts in zip(groups, columns, rows, strict=False):
        number = torch.arange(counts.total, device=device)
        shared = number < counts.shared
        start = torch.where(shared, first + number, first + (group.facts - 1) * counts.shared + number)
        per_fact = torch.where(shared, counts.shared, group.samples * counts.varying)
        placed.append(torch.stack([start, per_fact, torch.where(shared, 0, counts.varying)]))
        first += counts.count(group.facts, group.samples)
    return first


def gather_rows(gathers: Sequence[Gather], source: PackedStage) -> Tensor:
    """(R,) for each packed row that a stage computes, the packed row of ``source`` that it reads."""
    parts = []
    for gather, placement in zip(gathers, source.placements, strict=True):
        ids, shared = on_device(gather.source, placement.start.device), gather.rows.shared
        parts += [placement.flat(ids[:shared], False).flatten(), placement.flat(ids[shared:], True).flatten()]
    return torch.cat(parts)


def spread(values: Sequence[np.ndarray], rows: Sequence[Rows], groups: Sequence[Group], device: torch.device) -> Tensor:
    """(R,) what each group's local rows have, such as their token, for each packed row."""
    parts = []
    for value, counts, group in zip(values, rows, groups, strict=True):
        shared, varying = on_device(value, device).split([counts.shared, counts.varying])
        parts += [shared.repeat(group.facts), varying.repeat(group.facts * group.samples)]
    return torch.cat(parts)
