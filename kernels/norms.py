"""Norms over the last dimension of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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
        if rows.requires_grad and torch.is_grad_enabled():
            return _RMSNorm.apply(rows, self.weight, self.eps)
        parts = rows.to(self.weight.dtype).unflatten(-1, (-1, len(self.weight)))
        return F.rms_norm(parts, self.weight.shape, self.weight, self.eps).flatten(-2).to(rows.dtype)


class _RMSNorm(torch.autograd.Function):
    """With a frozen weight, in a third of the operations that autograd makes of torch's own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        parts = rows.to(weight.dtype).unflatten(-1, (-1, len(weight)))
        scale = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square_().div_(len(weight)).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, scale, weight)
        return (parts * scale).mul_(weight).flatten(-2).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, scale, weight = ctx.saved_tensors
        normed = rows.to(weight.dtype).unflatten(-1, (-1, len(weight))) * scale
        gradient = grads[0].to(weight.dtype).unflatten(-1, (-1, len(weight))) * weight
        along = torch.linalg.vecdot(gradient, normed)[..., None].div_(-len(weight))
        return gradient.addcmul_(normed, along).mul_(scale).flatten(-2).to(rows.dtype), None, None
