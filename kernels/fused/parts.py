"""What several kernels are made of."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is neither below ``size`` nor below ``least``."""
    return max(least, triton.next_power_of_2(size))


def warps_for(elements: int, per_thread: int = 32) -> int:
    """How many warps share a block of ``elements`` values, each thread holding about ``per_thread`` of them."""
    return min(16, max(1, power_of_two(elements) // (32 * per_thread)))


@triton.jit
def tanh(x):
    """Float32 tanh to a few units in the last place: the quotient of exponentials cancels near zero, where a series
    stands in for it. Triton's own is a call into CUDA's library, which the interpreter lacks."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    size = tl.abs(x)
    shrunk = tl.exp(-2 * size)
    quotient = (1 - shrunk) / (1 + shrunk)
    return tl.where(size < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def normed(x, inside, columns, weight, bias, eps, WIDTH: tl.constexpr, CENTRED: tl.constexpr, WEIGHTED: tl.constexpr,
           BIASED: tl.constexpr):  # fmt: skip
    """LayerNorm (``CENTRED``) or RMSNorm of one row (BLOCK,) in float32, zero beyond its WIDTH."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    if WEIGHTED:
        y *= tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    return y
