"""Rows gathered by index, normed or summed in one trip through memory; ``kernels/gathering.py`` defines it.

A row is read once and written once. Every product needs its operand dense, so gathering costs that trip in any case,
and the norm rides on it. Both terms of a sum are read by index and never copied; where a sum is normed for the product
that follows, the row still in registers is normed and written to its place among that product's rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels import gathering
from causalcone.kernels.fused.parts import normed, power_of_two, warps_for
from causalcone.kernels.gathering import NormedRows, RowSum, fuses
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
            rows, index.contiguous(), out, rows.stride(0), *_norm_arguments(norm, rows),
            WIDTH=width, BLOCK=block, **_norm_flags(norm), num_warps=warps_for(block),
        )  # fmt: skip
    return out


def _norm_arguments(norm: LayerNorm | RMSNorm, stand_in: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and eps; a tensor that is never read stands in for what a norm lacks."""
    weight, bias = (stand_in if tensor is None else tensor.contiguous() for tensor in (norm.weight, _bias(norm)))
    return weight, bias, norm.eps


def _norm_flags(norm: LayerNorm | RMSNorm) -> dict[str, bool]:
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
    x = tl.load(rows + tl.load(index + row).to(tl.int64) * stride + columns, mask=inside, other=0).to(tl.float32)
    y = normed(x, inside, columns, weight, bias, eps, WIDTH, CENTRED, WEIGHTED, BIASED)
    tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=inside)


def add_rows(terms: RowSum, out: Tensor, tile: int = 0) -> None:
    """``out`` (R, D) = the sums."""
    flags = {"NORMED": False, "CENTRED": False, "WEIGHTED": False, "BIASED": False}
    _launch(terms, out, out, terms.left_index, (out, out, 0.0), flags)


def add_normed(terms: RowSum, out: Tensor, normed: NormedRows, tile: int = 0) -> None:
    """``add_rows``, and the rows of ``out`` normed."""
    if not fuses(normed.norm, out.shape[1]):
        gathering.add_normed(terms, out, normed, tile)
        return
    flags = {"NORMED": True, **_norm_flags(normed.norm)}
    _launch(terms, out, normed.out, normed.place, _norm_arguments(normed.norm, out), flags)


def _launch(
    terms: RowSum, out: Tensor, into: Tensor, place: Tensor, norm: tuple[Tensor, Tensor, float], flags: dict[str, bool]
) -> None:
    left, left_index, right, right_index = terms
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
    a = tl.load(left + tl.load(left_index + row).to(tl.int64) * left_stride + columns, mask=inside, other=0).to(
        tl.float32
    )
    b = tl.load(right + tl.load(right_index + row).to(tl.int64) * right_stride + columns, mask=inside, other=0).to(
        tl.float32
    )
    total = (a + b).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, total, mask=inside)
    if NORMED:
        target = tl.load(place + row).to(tl.int64)
        if target >= 0:
            y = normed(total.to(tl.float32), inside, columns, weight, bias, eps, WIDTH, CENTRED, WEIGHTED, BIASED)
            tl.store(into + target * WIDTH + columns, y.to(into.dtype.element_ty), mask=inside)
