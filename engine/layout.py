"""Lays out a plan's local rows for many facts and samples in one packed tensor per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalcone.engine.plan import Gather, LayerPlan, Plan, Rows


@dataclass(frozen=True)
class Group:
    """Facts of one plan in a pass.

    tokens (F, T): token ids; targets (F, k): ids of the target, or None for the clean run's most likely token;
    noise (J, span, hidden) float64: what is added to the subject's embeddings in each sample.
    """

    plan: Plan
    tokens: Tensor
    targets: Tensor | None
    noise: Tensor

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
    start: Tensor
    per_fact: Tensor
    per_sample: Tensor

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
class Stage:
    """A packed stage: how many rows, and each group's placement in it."""

    rows: int
    placements: tuple[Placement, ...]


def place(groups: Sequence[Group], rows: Sequence[Rows], device: torch.device) -> Stage:
    """Each group's shared rows by fact, then its varying rows by fact and sample."""
    placements = []
    first = 0
    for group, own in zip(groups, rows, strict=True):
        F, J = group.facts, group.samples
        shared = torch.arange(own.total, device=device) < own.shared
        number = torch.arange(own.total, device=device)
        start = torch.where(shared, first + number, first + (F - 1) * own.shared + number)
        per_sample = torch.where(shared, 0, own.varying)
        placements.append(Placement(group, start, torch.where(shared, own.shared, J * own.varying), per_sample))
        first += own.count(F, J)
    return Stage(first, tuple(placements))


def place_attention(groups: Sequence[Group], plans: Sequence[LayerPlan], device: torch.device) -> Stage:
    """Attention rows lie segment by segment, so that each segment's output is one slice."""
    placements = []
    first = 0
    for group, plan in zip(groups, plans, strict=True):
        start, per_fact, per_sample = (torch.zeros(plan.attn.total, dtype=torch.int64, device=device) for _ in range(3))
        for segment in plan.segments:
            size = segment.queries.size
            samples = group.samples if segment.varying else 1
            part = slice(segment.first, segment.first + size)
            start[part] = first + torch.arange(size, device=device)
            per_fact[part] = samples * size
            per_sample[part] = size if segment.varying else 0
            first += group.facts * samples * size
        placements.append(Placement(group, start, per_fact, per_sample))
    return Stage(first, tuple(placements))


def gather_rows(gathers: Sequence[Gather], source: Stage) -> Tensor:
    """(R,) for each packed row of a stage, the packed row of ``source`` that it reads."""
    parts = []
    for gather, placement in zip(gathers, source.placements, strict=True):
        ids = torch.from_numpy(gather.source).to(placement.start.device)
        parts.append(placement.flat(ids[: gather.rows.shared], varying=False).flatten())
        parts.append(placement.flat(ids[gather.rows.shared :], varying=True).flatten())
    return torch.cat(parts)
