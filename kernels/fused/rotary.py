"""Heads turned by their positions where they lie, in one trip through memory; ``kernels/rotary.py`` defines it.

A program turns a row, whose angles are worked out or looked up once for all its heads. Dimensions that are not turned
are neither read nor written, so that keys can be turned beside their values.
"""

import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels.fused.parts import power_of_two, warps_for
from causalcone.kernels.rotary import Rotary, RotaryFrequencies


def turn(rows: Tensor, positions: Tensor, rotary: Rotary | RotaryFrequencies, head_dim: int) -> None:
    """Turn all heads of rows (R, H * head_dim) at ``positions`` (R,), in place."""
    assert rows.stride(1) == 1
    if isinstance(rotary, Rotary):
        cos, sin, scaling = rotary.cos, rotary.sin, 1.0
    else:
        cos, sin, scaling = rotary.inverse, rotary.inverse, rotary.scaling
    assert cos.stride(-1) == sin.stride(-1) == 1
    heads, pairs = rows.shape[1] // head_dim, cos.shape[-1]
    block, padded = power_of_two(heads), power_of_two(pairs)
    if len(rows):
        _turn[(len(rows),)](
            rows, rows.stride(0), positions.contiguous(), cos, cos.stride(0), sin, sin.stride(0), scaling,
            HEADS=heads, HEAD_DIM=head_dim, PAIRS=pairs, BLOCK=block, PADDED=padded, INTERLEAVED=rotary.interleaved,
            TABLE=isinstance(rotary, Rotary), num_warps=warps_for(2 * block * padded),
        )  # fmt: skip


@triton.jit
def _turn(rows, row_stride, positions, cos, cos_stride, sin, sin_stride, scaling, HEADS: tl.constexpr,
          HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
          INTERLEAVED: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    pair = tl.arange(0, PADDED)
    there = pair < PAIRS
    if TABLE:
        c = tl.load(cos + position * cos_stride + pair, mask=there, other=0).to(tl.float32)
        s = tl.load(sin + position * sin_stride + pair, mask=there, other=0).to(tl.float32)
    else:
        angle = position.to(tl.float32) * tl.load(cos + pair, mask=there, other=0)
        c = tl.cos(angle) * scaling
        s = tl.sin(angle) * scaling
    head = tl.arange(0, BLOCK)[:, None]
    first = rows + row * row_stride + head * HEAD_DIM
    if INTERLEAVED:
        both = tl.arange(0, 2 * PADDED)[None, :]
        inside = (head < HEADS) & (both < 2 * PAIRS)
        pairs = tl.load(first + both, mask=inside, other=0).to(tl.float32).reshape(BLOCK, PADDED, 2)
        left, right = tl.split(pairs)
        turned = tl.interleave(left * c - right * s, right * c + left * s)
        tl.store(first + both, turned.to(rows.dtype.element_ty), mask=inside)
    else:
        inside = (head < HEADS) & there[None, :]
        left = tl.load(first + pair[None, :], mask=inside, other=0).to(tl.float32)
        right = tl.load(first + PAIRS + pair[None, :], mask=inside, other=0).to(tl.float32)
        tl.store(first + pair[None, :], (left * c - right * s).to(rows.dtype.element_ty), mask=inside)
        tl.store(first + PAIRS + pair[None, :], (right * c + left * s).to(rows.dtype.element_ty), mask=inside)
