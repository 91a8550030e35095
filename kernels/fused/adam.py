"""A step of constrained fine-tuning in one trip over the weight; ``kernels/adam.py`` defines it.

The gradient is a product of few rows, tens of them, and is made tile by tile where it is used, in float32, and never
written. What passes through memory is the change and Adam's two means, read and written once: 24 bytes per weight. The
plain form writes the gradient and reads it again, and reads and writes the change once more to clamp it: 40.
"""

import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels.adam import BETAS, EPS, AdamState
from causalcone.kernels.fused.parts import INTERPRETED

TALL, WIDE, DEEP = 32, 64, 16


def step_weight(weight: AdamState, slopes: Tensor, keys: Tensor, lr: float, bound: float) -> None:
    """One step along the gradient ``slopes.T @ keys`` of a weight (hidden, inner), clamped to -bound .. bound."""
    assert weight.change.is_contiguous()
    weight.steps += 1
    hidden, inner = weight.change.shape
    first, second = (1 - beta**weight.steps for beta in BETAS)
    _step[(triton.cdiv(hidden, TALL) * triton.cdiv(inner, WIDE),)](
        weight.change, weight.mean, weight.square, slopes.contiguous(), keys.contiguous(), len(keys), hidden, inner,
        lr / first, second**-0.5, bound, BETA1=BETAS[0], BETA2=BETAS[1], EPS=EPS, TALL=TALL, WIDE=WIDE, DEEP=DEEP,
        INTERPRETED=INTERPRETED, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _step(change, mean, square, slopes, keys, rows, hidden, inner, rate, root, bound,
          BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
          DEEP: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    across = tl.cdiv(inner, WIDE)
    number = tl.program_id(0)
    row = number // across * TALL + tl.arange(0, TALL)
    column = number % across * WIDE + tl.arange(0, WIDE)
    gradient = tl.zeros([TALL, WIDE], tl.float32)
    for first in range(0, rows, DEEP):
        text = (first + tl.arange(0, DEEP)).to(tl.int64)
        there = (text < rows)[:, None]
        slope = tl.load(slopes + text[:, None] * hidden + row[None, :], mask=there & (row < hidden)[None, :], other=0)
        key = tl.load(keys + text[:, None] * inner + column[None, :], mask=there & (column < inner)[None, :], other=0)
        if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
            slope, key = slope.to(tl.float32), key.to(tl.float32)
        gradient += tl.dot(tl.trans(slope), key, input_precision="ieee")

    cell = row.to(tl.int64)[:, None] * inner + column[None, :]
    inside = (row < hidden)[:, None] & (column < inner)[None, :]
    m = tl.load(mean + cell, mask=inside, other=0)
    v = tl.load(square + cell, mask=inside, other=0)
    x = tl.load(change + cell, mask=inside, other=0)
    m += (1 - BETA1) * (gradient - m)
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    x -= rate * m / (tl.sqrt(v) * root + EPS)
    x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))  # keeps NaNs, which end an edit
    tl.store(mean + cell, m, mask=inside)
    tl.store(square + cell, v, mask=inside)
    tl.store(change + cell, x, mask=inside)
