"""A matrix product with a layer's weights: ``rows @ weight.T + bias``, and an activation after it.

The torch form is ``torch.nn.functional.linear``. On CPUs, torch sends float32 products to MKL, which leaves a third of
the speed of some processors unused; oneDNN's product with packed weights, the one that torch's own compiler emits,
uses it, and applies the activation while the result is still in cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalcone.kernels.tiles import SMALLEST, pieces

_PIECE = 1024

_FUSED = {"gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "relu": ("relu", ""), "silu": ("swish", "")}
_PLAIN_PRODUCT = ("none", "")
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Linear:
    """``weight`` (out, in) and ``bias`` (out,) or None made ready for many products; ``activation`` is a name known
    here (``gelu_tanh``, ``gelu``, ``relu``, ``silu``), any elementwise function of a tensor, or None.

    Calling it maps rows (R, in) to (R, out) in the weights' dtype. ``out`` (R, out) is memory for the product, without
    gradient; what is returned lies there but where oneDNN's product or an activation has made memory of its own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str | Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.name = activation if isinstance(activation, str) else ""
        self.activation = _PLAIN[activation] if isinstance(activation, str) else activation
        self.fused = _FUSED.get(self.name, _PLAIN_PRODUCT)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1024) if packs(weight) else None
        narrow = weight.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16)
        # the bias of a product that applies it and the activation itself, of unknown exactness in float32
        self.epilogue_bias = self.bias if narrow and self.name in ("gelu_tanh", "relu") else None

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        if rows.requires_grad and torch.is_grad_enabled():
            made = _Product.apply(rows, self)
        elif self.epilogue_bias is not None:  # on CUDA its GELU is that of tanh
            use_gelu = self.name == "gelu_tanh"
            return torch._addmm_activation(self.epilogue_bias, rows, self.weight.t(), use_gelu=use_gelu)
        elif self.packed is not None:
            made = self._packed_product(rows, *self.fused)
            if self.fused != _PLAIN_PRODUCT:
                return made
        else:
            made = self.product(rows, out)
        return self.activation(made) if self.activation else made

    @cached_property
    def transposed(self) -> Linear:
        """The product with the transposed weight: the way back."""
        return Linear(self.weight.t(), None)

    def product(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The product alone, without the activation."""
        if self.packed is not None:
            return self._packed_product(rows, *_PLAIN_PRODUCT)
        if out is None:
            return F.linear(rows, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)

    def _packed_product(self, rows: Tensor, name: str, form: str) -> Tensor:
        count = len(rows)
        # few sizes, for each of which the library keeps code
        missing = -count % (SMALLEST if count > 16 else 16)
        if missing:
            filled = rows.new_empty(count + missing, rows.shape[1])
            filled[:count], filled[count:] = rows, 0
            rows = filled
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, name, [], form)[:count]


class Changed(Linear):
    """A linear whose product goes through ``change``, with the rows that it is of, before the activation. It shares the
    weights; gradient flows through both."""

    def __init__(self, linear: Linear, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.__dict__.update(vars(linear))
        self.linear, self.change = linear, change

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        flows = rows.requires_grad and torch.is_grad_enabled()
        product = _Product.apply(rows, self.linear) if flows else self.linear.product(rows)
        made = self.change(rows, product)
        return self.activation(made) if self.activation else made


class _Product(torch.autograd.Function):
    """A product with frozen weights: gradient flows to the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, linear: Linear) -> Tensor:
        # packed anew on the way back, where nobody keeps the weights: those of all layers are a model more
        ctx.weight, ctx.linear = linear.weight, weakref.ref(linear)
        return _in_pieces(linear, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        linear = ctx.linear()
        back = linear.transposed if linear is not None else Linear(ctx.weight.t(), None)
        return _in_pieces(back, grads[0].contiguous()), None


def _in_pieces(linear: Linear, rows: Tensor) -> Tensor:
    """The product alone; of rows of any count in pieces of few sizes, where a library keeps code for each size."""
    if linear.packed is None or len(rows) <= _PIECE:
        return linear.product(rows)
    out = rows.new_empty(len(rows), len(linear.weight))
    for piece in pieces(len(rows), _PIECE, rows.device):
        out[piece] = linear.product(rows[piece])
    return out


def packs(weight: Tensor) -> bool:
    """Whether products with this weight go through oneDNN's packed form."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
