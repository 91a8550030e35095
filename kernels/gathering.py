"""Rows gathered and normed: what enters every product of a layer."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor

from causalcone.kernels.norms import LayerNorm, Norm, RMSNorm, unchanged


def gather_normed(rows: Tensor, index: Tensor, norm: Norm = unchanged) -> Tensor:
    """``norm`` of rows (S, D) at ``index`` (R,): (R, D) in the rows' dtype."""
    return norm(rows.index_select(0, index))


def fuses(norm: Norm, width: int) -> TypeGuard[LayerNorm | RMSNorm]:
    """Whether a kernel can take this norm of rows of this width into its own trip through memory."""
    return isinstance(norm, LayerNorm | RMSNorm) and (norm.weight is None or len(norm.weight) == width)
