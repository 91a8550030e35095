"""Heads' outputs of which single heads are overwritten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.plan.plan import LayerPlan, Mix
from causalcone.engine.run.packing import Group, PackedStage, Placement
from causalcone.kernels.transfer import on_device


def mix_heads(
    heads: Tensor, stage: PackedStage, groups: Sequence[Group], plans: Sequence[LayerPlan], head_dim: int
) -> None:
    """Fill the mixed rows of ``heads`` (R, H * head_dim), which lie behind those that attention computes."""
    for group, plan, placement in zip(groups, plans, stage.placements, strict=True):
        mix, computed = plan.mix, plan.attn.total
        shared = mix.base.rows.shared
        for rows, varying in ((np.arange(shared), False), (np.arange(shared, mix.base.rows.total), True)):
            if len(rows):
                _copy(heads, placement, computed + rows, mix.base.source[rows], varying)
                _patch(heads.unflatten(1, (-1, head_dim)), placement, group, mix, computed, rows, varying)


def _flat(placement: Placement, rows: np.ndarray, varying: bool) -> Tensor:
    return placement.flat(on_device(torch.from_numpy(rows), placement.start.device), varying)


def _copy(heads: Tensor, placement: Placement, to: np.ndarray, source: np.ndarray, varying: bool) -> None:
    heads[_flat(placement, to, varying).flatten()] = heads[_flat(placement, source, varying).flatten()]


def _patch(
    heads: Tensor, placement: Placement, group: Group, mix: Mix, computed: int, rows: np.ndarray, varying: bool
) -> None:
    """heads (R, H, head_dim): put the overwritten heads of the mixes ``rows`` in their place."""
    own = np.isin(mix.row, rows)
    for is_given in (False, True):
        chosen = own & ((mix.source < 0) == is_given)
        if not chosen.any():
            continue
        to = _flat(placement, computed + mix.row[chosen], varying)
        head = on_device(torch.from_numpy(mix.head[chosen]), to.device)
        if is_given:
            values = torch.stack([_given_head(group, source, heads) for source in mix.source[chosen].tolist()], dim=-2)
        else:
            values = heads[_flat(placement, mix.source[chosen], varying), head]
        heads[to, head] = values.to(heads.dtype)


def _given_head(group: Group, source: int, heads: Tensor) -> Tensor:
    """A given value of one head, for each fact and sample: (F, 1 or J, head_dim)."""
    vector = group.vector(source, heads.shape[2], heads.device)
    return vector if vector.dim() == 3 else vector[:, None]
