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
    for piece in pieces(len(out), tile):
        torch.add(left.index_select(0, left_index[piece]), right.index_select(0, right_index[piece]), out=out[piece])


def add_normed(terms: RowSum, out: Tensor, index: Tensor, norm: Norm, normed: Tensor, tile: int) -> None:
    """``add_rows``, and ``normed`` (N, D) = ``norm`` of the sums at ``index`` (N,), no row of which comes twice."""
    add_rows(terms, out, tile)
    for piece in pieces(len(normed), tile):
        normed[piece] = gather_normed(out, index[piece], norm)
