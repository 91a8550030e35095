"""Log-sum-exps over a tile of logits in one read of it; ``kernels/log_sums.py`` defines it.

The product that makes the tile is cuBLAS's. What follows in plain operations reads the tile five times and writes it
three times, in float32, which costs more than the product. Here a program reads its row once, in the logits' own dtype.
The most likely token needs no kernel: torch finds a tile's maxima and where they are in one read.
"""

import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels.fused.parts import power_of_two, tanh, warps_for

WIDEST = 8192
"""Logits of a row that a program holds at a time: a tile's usual width."""


def add_tile(
    logits: Tensor, start: int, softcap: float | None, targets: Tensor, total: Tensor, target_logits: Tensor
) -> None:
    """Take up the logits (r, v) of the tokens from ``start`` on, as ``kernels/log_sums.py`` says; they are kept."""
    assert logits.stride(1) == 1
    assert total.is_contiguous()
    assert target_logits.is_contiguous()
    rows, width = logits.shape
    if not rows:
        return
    block = min(power_of_two(width), WIDEST)
    _add_tile[(rows,)](
        logits, logits.stride(0), width, start, softcap or 0.0, targets.contiguous(), targets.numel() // rows, total,
        target_logits, CAPPED=softcap is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip


@triton.jit
def _logits(pointer, mask, softcap, CAPPED: tl.constexpr):
    x = tl.load(pointer, mask=mask, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(mask, softcap * tanh(x / softcap), float("-inf"))
    return x


@triton.jit(do_not_specialize=["start", "per_row"])
def _add_tile(logits, stride, width, start, softcap, targets, per_row, total, target_logits, CAPPED: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    top = float("-inf")
    sums = 0.0
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = _logits(row_logits + columns, columns < width, softcap, CAPPED)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    tile = tl.cast(top, tl.float64) + tl.log(tl.cast(sums, tl.float64))
    before = tl.load(total + row)
    high = tl.maximum(before, tile)
    low = tl.minimum(before, tile)
    after = high + tl.log(1.0 + tl.exp(low - high))
    after = tl.where(tile != tile, tile, tl.where(before != before, before, after))  # maxima leave NaNs out
    tl.store(total + row, after)
    for number in range(0, per_row):
        target = tl.load(targets + row * per_row + number) - start
        if (target >= 0) & (target < width):
            x = _logits(row_logits + target, target < width, softcap, CAPPED)
            tl.store(target_logits + row * per_row + number, x.to(tl.float64))
