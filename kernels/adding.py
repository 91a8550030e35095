"""The residual sum of gathered rows, and the norm of it that the next product reads."""

from __future__ import annotations

import torch
from torch import Tensor

from causalcone.kernels.gathering import gather_normed
from causalcone.kernels.norms import Norm
from causalcone.kernels.tiles import pieces


def add_rows(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, out: Tensor, tile: int) -> None:
    """``out`` (R, D) = rows of ``left`` at ``left_index`` (R,) + rows of ``right`` at ``right_index`` (R,), walked in
    tiles of so many rows."""
    for part in pieces(len(out), tile):
        torch.add(left.index_select(0, left_index[part]), right.index_select(0, right_index[part]), out=out[part])


def add_normed(
    left: Tensor,
    left_index: Tensor,
    right: Tensor,
    right_index: Tensor,
    out: Tensor,
    index: Tensor,
    norm: Norm,
    normed: Tensor,
    tile: int,
) -> None:
    """``add_rows``, and ``normed`` (N, D) = ``norm`` of the sums at ``index`` (N,), no row of which comes twice."""
    add_rows(left, left_index, right, right_index, out, tile)
    for part in pieces(len(normed), tile):
        normed[part] = gather_normed(out, index[part], norm)
