"""Rows gathered and normed in one trip through memory; ``kernels/gathering.py`` defines it.

A row is read once and written once. Every product needs its operand dense, so gathering costs that trip in any case,
and the norm rides on it: norming where rows are summed, and gathering later, would be a trip more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels import gathering
from causalcone.kernels.fused.parts import normed, power_of_two, warps_for
from causalcone.kernels.gathering import fuses
from causalcone.kernels.norms import LayerNorm, Norm, RMSNorm


def gather_normed(rows: Tensor, index: Tensor, norm: Norm) -> Tensor:
    """The norm of rows (S, D) at ``index`` (R,): (R, D) in the rows' dtype."""
    width = rows.shape[1]
    if not fuses(norm, width):
        return gathering.gather_normed(rows, index, norm)
    assert rows.stride(-1) == 1
    out = torch.empty(len(index), width, dtype=rows.dtype, device=rows.device)
    block = power_of_two(width)
    if len(index):
        _gather[(len(index),)](
            rows, index.contiguous(), out, rows.stride(0), *norm_arguments(norm, rows),
            WIDTH=width, BLOCK=block, **norm_flags(norm), num_warps=warps_for(block),
        )  # fmt: skip
    return out


def norm_arguments(norm: LayerNorm | RMSNorm, stand_in: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and eps; a tensor that is never read stands in for what a norm lacks."""
    weight, bias = (stand_in if tensor is None else tensor.contiguous() for tensor in (norm.weight, _bias(norm)))
    return weight, bias, norm.eps


def norm_flags(norm: LayerNorm | RMSNorm) -> dict[str, bool]:
    centred, weighted, biased = isinstance(norm, LayerNorm), norm.weight is not None, _bias(norm) is not None
    return {"CENTRED": centred, "WEIGHTED": weighted, "BIASED": biased}


def _bias(norm: LayerNorm | RMSNorm) -> Tensor | None:
    return norm.bias if isinstance(norm, LayerNorm) else None


@triton.jit
def _gather(rows, index, out, stride, weight, bias, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
            CENTRED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(rows + tl.load(index + row) * stride + columns, mask=inside, other=0).to(tl.float32)
    y = normed(x, inside, columns, weight, bias, eps, WIDTH, CENTRED, WEIGHTED, BIASED)
    tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=inside)
