"""The residual sum of gathered rows, and the norm of it that the next product reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from causalcone.kernels.gathering import gather_normed
from causalcone.kernels.norms import Norm
from causalcone.kernels.tiles import pieces


class RowSum(NamedTuple):
    """Rows of ``left`` at ``left_index`` (R,) + rows of ``right`` at ``right_index`` (R,)."""

    left: Tensor
    left_index: Tensor
    right: Tensor
    right_index: Tensor


def add_rows(terms: RowSum, out: Tensor, tile: int) -> None:
    """``out`` (R, D) = the sums, walked in tiles of ``tile`` rows."""
    left, left_index, right, right_index = terms
    for part in pieces(len(out), tile):
        torch.add(left.index_select(0, left_index[part]), right.index_select(0, right_index[part]), out=out[part])


def add_normed(terms: RowSum, out: Tensor, index: Tensor, norm: Norm, normed: Tensor, tile: int) -> None:
    """``add_rows``, and ``normed`` (N, D) = ``norm`` of the sums at ``index`` (N,), no row of which comes twice."""
    add_rows(terms, out, tile)
    for part in pieces(len(normed), tile):
        normed[part] = gather_normed(out, index[part], norm)
