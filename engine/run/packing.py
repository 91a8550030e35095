"""Lays out a plan's local rows for many facts and samples in one packed tensor per stage."""

from __future__ import annotations

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
        number = given(source)
        return torch.stack([on_device(vectors[number], device) for vectors in self.vectors])

    def given_rows(self, stage: Given, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a stage that are given: (n, width) by fact, and (n, width) by fact and sample."""
        vectors = [self.vector(source, width, device) for source in stage.source.tolist()]
        parts = (vectors[: stage.rows.shared], vectors[stage.rows.shared :])
        none = torch.empty(0, width, device=device)
        shared, varying = (torch.stack(part, dim=-2).flatten(0, -2) if part else none for part in parts)
        return shared, varying


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

    def flat(self, ids: Tensor, varying: bool) -> Tensor:
        """Packed rows of local rows ``ids`` (...) for all facts and samples, (F, J, ...) or (F, 1, ...)."""
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
    parts = []
    first = 0
    for group, counts in zip(groups, rows, strict=True):
        parts.append([_placed(group, counts, first, device)])
        first += counts.count(group.facts, group.samples)
    return _stage(groups, parts, first, first, [given.rows for given in givens], device)


def place_attention(groups: Sequence[Group], plans: Sequence[LayerPlan], device: torch.device) -> PackedStage:
    """Attention rows lie segment by segment, so that each segment's output is one slice; then mixes and given rows."""
    parts = []
    first = 0
    for group, plan in zip(groups, plans, strict=True):
        columns = torch.zeros(3, plan.attn.total, dtype=torch.int64, device=device)
        for segment in plan.segments:
            size = segment.queries.size
            samples = group.samples if segment.varying else 1
            segment_rows = slice(segment.first, segment.first + size)
            columns[0, segment_rows] = first + torch.arange(size, device=device)
            columns[1, segment_rows] = samples * size
            columns[2, segment_rows] = size if segment.varying else 0
            first += group.facts * samples * size
        parts.append([columns])
    computed = first
    for group, plan, group_columns in zip(groups, plans, parts, strict=True):
        group_columns.append(_placed(group, plan.mix.base.rows, first, device))
        first += plan.mix.base.rows.count(group.facts, group.samples)
    return _stage(groups, parts, computed, first, [plan.attn_given.rows for plan in plans], device)


def _stage(
    groups: Sequence[Group],
    parts: list[list[Tensor]],
    computed: int,
    first: int,
    givens: Sequence[Rows],
    device: torch.device,
) -> PackedStage:
    mixed = first - computed
    for group, columns, given_rows in zip(groups, parts, givens, strict=False):
        columns.append(_placed(group, given_rows, first, device))
        first += given_rows.count(group.facts, group.samples)
    placements = (Placement(group, *torch.cat(columns, dim=1)) for group, columns in zip(groups, parts, strict=True))
    return PackedStage(computed, mixed, first, tuple(placements))


def _placed(group: Group, rows: Rows, first: int, device: torch.device) -> Tensor:
    """Start, step per fact and step per sample (3, rows) of shared rows by fact and varying rows by fact and sample."""
    number = torch.arange(rows.total, device=device)
    shared = number < rows.shared
    start = torch.where(shared, first + number, first + (group.facts - 1) * rows.shared + number)
    per_fact = torch.where(shared, rows.shared, group.samples * rows.varying)
    return torch.stack([start, per_fact, torch.where(shared, 0, rows.varying)])


def gather_rows(gathers: Sequence[Gather], source: PackedStage) -> Tensor:
    """(R,) for each packed row that a stage computes, the packed row of ``source`` that it reads."""
    parts = []
    for gather, placement in zip(gathers, source.placements, strict=True):
        ids = on_device(torch.from_numpy(gather.source), placement.start.device)
        parts.append(placement.flat(ids[: gather.rows.shared], varying=False).flatten())
        parts.append(placement.flat(ids[gather.rows.shared :], varying=True).flatten())
    return torch.cat(parts)


def spread(values: Sequence[np.ndarray], rows: Sequence[Rows], groups: Sequence[Group], device: torch.device) -> Tensor:
    """(R,) what each group's local rows have, such as their token, for each packed row."""
    parts = []
    for value, counts, group in zip(values, rows, groups, strict=True):
        local = on_device(torch.from_numpy(value), device)
        parts += [
            local[: counts.shared].repeat(group.facts),
            local[counts.shared :].repeat(group.facts * group.samples),
        ]
    return torch.cat(parts)
