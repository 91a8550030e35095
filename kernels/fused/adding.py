"""The residual sum of gathered rows, and the norm of it, in one trip through memory; ``kernels/adding.py`` defines it.

Both terms are read by index and never copied. Where a sum is normed for the product that follows, the row that is still
in registers is normed and written to its place among that product's rows: the sums are not read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels.fused.gathering import norm_arguments, norm_flags
from causalcone.kernels.fused.parts import normed, power_of_two, warps_for
from causalcone.kernels.norms import LayerNorm, RMSNorm


def add_rows(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, out: Tensor) -> None:
    """``out`` (R, D) = rows of ``left`` at ``left_index`` (R,) + rows of ``right`` at ``right_index`` (R,)."""
    _launch(left, left_index, right, right_index, out, out, left_index, (out, out, 0.0), NORMED=False,
            CENTRED=False, WEIGHTED=False, BIASED=False)  # fmt: skip


def add_normed(
    left: Tensor,
    left_index: Tensor,
    right: Tensor,
    right_index: Tensor,
    out: Tensor,
    index: Tensor,
    norm: LayerNorm | RMSNorm,
    into: Tensor,
) -> None:
    """``add_rows``, and ``into`` (N, D) = ``norm`` of the sums at ``index`` (N,), no row of which comes twice."""
    place = torch.full((len(out),), -1, dtype=torch.int64, device=out.device)
    place[index] = torch.arange(len(index), device=out.device)
    arguments = norm_arguments(norm, out)
    _launch(left, left_index, right, right_index, out, into, place, arguments, NORMED=True, **norm_flags(norm))


def _launch(
    left: Tensor,
    left_index: Tensor,
    right: Tensor,
    right_index: Tensor,
    out: Tensor,
    into: Tensor,
    place: Tensor,
    norm: tuple[Tensor, Tensor, float],
    **flags: bool,
) -> None:
    assert left.stride(-1) == right.stride(-1) == 1
    assert out.is_contiguous()
    assert into.is_contiguous()
    width = out.shape[1]
    block = power_of_two(width)
    if len(out):
        _add[(len(out),)](
            left, left_index.contiguous(), left.stride(0), right, right_index.contiguous(), right.stride(0),
            out, into, place, *norm, WIDTH=width, BLOCK=block, **flags, num_warps=warps_for(block),
        )  # fmt: skip


@triton.jit
def _add(left, left_index, left_stride, right, right_index, right_stride, out, into, place, weight, bias, eps,
         WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, CENTRED: tl.constexpr,
         WEIGHTED: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    a = tl.load(left + tl.load(left_index + row) * left_stride + columns, mask=inside, other=0).to(tl.float32)
    b = tl.load(right + tl.load(right_index + row) * right_stride + columns, mask=inside, other=0).to(tl.float32)
    total = (a + b).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, total, mask=inside)
    if NORMED:
        target = tl.load(place + row)
        if target >= 0:
            y = normed(total.to(tl.float32), inside, columns, weight, bias, eps, WIDTH, CENTRED, WEIGHTED, BIASED)
            tl.store(into + target * WIDTH + columns, y.to(into.dtype.element_ty), mask=inside)
