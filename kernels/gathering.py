"""Rows gathered by index: normed, as they enter every product of a layer, and summed, as the residual stream is."""

from typing import Any, Generic, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from causalcone.kernels.norms import LayerNorm, Norm, RMSNorm, unchanged
from causalcone.kernels.tiles import pieces
from causalcone.kernels.transfer import Array


def gather_normed(rows: Tensor, index: Tensor, norm: Norm = unchanged) -> Tensor:
    """``norm`` of rows (S, D) at ``index`` (R,): (R, D) in the rows' dtype."""
    return norm(rows.index_select(0, index))


def fuses(norm: Norm, width: int) -> TypeGuard[LayerNorm | RMSNorm]:
    """Whether a kernel can take this norm of rows of this width into its own trip through memory."""
    return isinstance(norm, LayerNorm | RMSNorm) and (norm.weight is None or len(norm.weight) == width)


class RowSum(NamedTuple):
    """Rows of ``left`` at ``left_index`` (R,) + rows of ``right`` at ``right_index`` (R,)."""

    left: Tensor
    left_index: Tensor
    right: Tensor
    right_index: Tensor


def add_rows(terms: RowSum, out: Tensor, tile: int) -> None:
    """``out`` (R, D) = the sums, walked in tiles of ``tile`` rows."""
    left, left_index, right, right_index = terms
    for piece in pieces(len(out), tile, out.device):
        torch.add(left.index_select(0, left_index[piece]), right.index_select(0, right_index[piece]), out=out[piece])


class NormedRows(NamedTuple):
    """Rows of a sum that are normed too: ``out`` (N, D) = ``norm`` of the rows ``read`` (N,), none of which comes
    twice; ``place`` (R,) is the row of ``out`` that a row goes to, -1 where it goes to none."""

    read: Tensor
    place: Tensor
    norm: Norm
    out: Tensor


def add_normed(terms: RowSum, out: Tensor, normed: NormedRows, tile: int) -> None:
    """``add_rows``, and the rows of ``out`` normed."""
    add_rows(terms, out, tile)
    for piece in pieces(len(normed.out), tile, out.device):
        normed.out[piece] = gather_normed(out, normed.read[piece], normed.norm)


class TwoKinds(NamedTuple, Generic[Array]):
    """Rows (R,) of two tensors, those that gradient flows to and frozen ones: ``rows`` (R,) among the former, but for
    rows ``frozen``, which are the latter's ``frozen_rows``; rows ``moving`` are the former's ``moving_rows``."""

    rows: Array
    frozen: Array
    frozen_rows: Array
    moving: Array
    moving_rows: Array


def two_kinds(index: np.ndarray) -> TwoKinds[np.ndarray]:
    """From an index (R,) whose row -1 - n is the frozen row n."""
    frozen, moving = np.flatnonzero(index < 0), np.flatnonzero(index >= 0)
    parts = (np.maximum(index, 0), frozen, -1 - index[frozen], moving, index[moving])
    return TwoKinds(*(part.astype(np.int32, copy=False) for part in parts))


def gather_two(rows: Tensor, frozen: Tensor | None, index: TwoKinds[Tensor]) -> Tensor:
    """The rows of an index, whose gradient flows back to ``rows`` (N, D)."""
    return _GatherTwo.apply(rows, frozen, *index)


class _GatherTwo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, frozen: Tensor | None, index: Tensor, to: Tensor, frozen_rows: Tensor, *moving: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*moving)
        ctx.shape = rows.shape
        if not len(rows) and frozen is not None:
            return frozen.index_select(0, frozen_rows)
        gathered = rows.index_select(0, index)
        if len(to) and frozen is not None:
            gathered[to] = frozen.index_select(0, frozen_rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        moving, moving_rows = ctx.saved_tensors
        rows = grads[0] if len(moving) == len(grads[0]) else grads[0].index_select(0, moving)
        return grads[0].new_zeros(ctx.shape).index_add_(0, moving_rows, rows), *(None,) * 6
