"""Norms over the last dimension of rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor], Tensor]
"""Any function of rows (R, D) that treats each by itself; kernels know those of this file."""


def unchanged(rows: Tensor) -> Tensor:
    """Stands where there is no norm."""
    return rows


@dataclass(frozen=True)
class LayerNorm:
    """LayerNorm of rows (R, D), with its weight and bias (D,), or None. A weight (n,) shorter than the rows norms every
    n values by themselves: each head."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        if self.weight is None or len(self.weight) == rows.shape[-1]:
            return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)
        heads = rows.unflatten(-1, (-1, len(self.weight)))
        return F.layer_norm(heads, self.weight.shape, self.weight, self.bias, self.eps).flatten(-2)


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm of rows (R, D), in the dtype of its weight, which is float32 or better. A weight (n,)
    shorter than the rows norms every n values by themselves: each head."""

    weight: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        parts = rows.to(self.weight.dtype).unflatten(-1, (-1, len(self.weight)))
        return F.rms_norm(parts, self.weight.shape, self.weight, self.eps).flatten(-2).to(rows.dtype)
