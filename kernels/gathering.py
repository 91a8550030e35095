"""Rows gathered by index: normed, as they enter every product of a layer, and summed, as the residual stream is."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from causalcone.kernels.norms import LayerNorm, Norm, RMSNorm, unchanged
from causalcone.kernels.tiles import pieces


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
