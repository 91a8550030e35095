"""The gate of an MLP in one trip through memory after its product; ``kernels/gating.py`` defines it."""

import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels import gating as plain
from causalcone.kernels.fused.parts import tanh, warps_for
from causalcone.kernels.linear import Linear

BLOCK = 4096
"""Numbers that a program multiplies."""


def gate(inner: Tensor, gating: Linear, rows: Tensor) -> None:
    """Multiply ``inner`` (R, inner) by ``gating`` of ``rows`` (R, hidden), in place."""
    if gating.packed is not None or gating.name not in ("silu", "gelu_tanh"):
        plain.gate(inner, gating, rows)
        return
    product = gating.product(rows)
    assert inner.is_contiguous()
    assert product.is_contiguous()
    count = inner.numel()
    if count:
        _gate[(triton.cdiv(count, BLOCK),)](
            inner, product, count, SILU=gating.name == "silu", BLOCK=BLOCK, num_warps=warps_for(BLOCK)
        )


@triton.jit
def _gate(inner, product, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(product + place, mask=inside, other=0).to(tl.float32)
    y = tl.load(inner + place, mask=inside, other=0).to(tl.float32)
    if SILU:
        y *= x / (1 + tl.exp(-x))
    else:
        y *= 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    tl.store(inner + place, y.to(inner.dtype.element_ty), mask=inside)
