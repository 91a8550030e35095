"""The layer that most decoders share: plain projections to keys, values and queries, and an MLP of two products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalcone.engine.models.base import Block
from causalcone.engine.models.parts import Rotary
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import LayerNorm, Norm
from causalcone.kernels.transfer import on_device


@dataclass(frozen=True)
class PlainLayer(Block):
    """Attention and MLP each read their own norm of the rows. Where there are ``query_norm`` and ``key_norm``, they go
    over every head's (head_dim,) before ``rotary`` turns it."""

    scale: float
    head_dim: int
    attn_norm: LayerNorm
    kv: Linear
    query: Linear
    output: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear
    rotary: Rotary | None = None
    query_norm: LayerNorm | None = None
    key_norm: LayerNorm | None = None
    window: int | None = None

    @property
    def attn_in(self) -> Norm:
        return self.attn_norm

    @property
    def mlp_in(self) -> Norm:
        return self.mlp_norm

    def keys_values_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        keys_values = self.kv(normed)
        if self.rotary is None and self.key_norm is None:
            return keys_values
        keys, values = keys_values.chunk(2, dim=1)
        return torch.cat([self._placed(keys, self.key_norm, positions), values], dim=1)

    def queries_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        return self._placed(self.query(normed), self.query_norm, positions)

    def attention_output(self, rows: Tensor) -> Tensor:
        return self.output(rows)

    def mlp_keys_of(self, normed: Tensor) -> Tensor:
        return self.up(normed)

    def _placed(self, rows: Tensor, norm: LayerNorm | None, positions: Tensor) -> Tensor:
        """Keys or queries (R, heads * head_dim), normed and turned by their positions."""
        heads = rows.unflatten(1, (-1, self.head_dim))
        if norm is not None:
            heads = norm(heads)
        if self.rotary is not None:
            heads = self.rotary(heads, positions)
        return heads.flatten(1)


@dataclass(frozen=True)
class Reader:
    """Takes a model's modules onto the device and into the dtype of the pass."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, *modules: torch.nn.Linear, activation: str | Callable[[Tensor], Tensor] | None = None) -> Linear:
        """One product that puts the outputs of all modules side by side."""
        if len(modules) == 1:  # no copy
            return self.product(modules[0].weight, modules[0].bias, activation)
        weights: list[Tensor] = [module.weight for module in modules]
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        return self.product(torch.cat(weights), torch.cat(biases) if biases else None, activation)

    def product(
        self, weight: Tensor, bias: Tensor | None, activation: str | Callable[[Tensor], Tensor] | None = None
    ) -> Linear:
        """The product with a weight (out, in) and a bias (out,)."""
        return Linear(self.tensor(weight), None if bias is None else self.tensor(bias), activation)

    def norm(self, module: torch.nn.LayerNorm) -> LayerNorm:
        bias = None if module.bias is None else self.tensor(module.bias)
        return LayerNorm(None if module.weight is None else self.tensor(module.weight), bias, module.eps)

    def tensor(self, parameter: Tensor) -> Tensor:
        return free(parameter).to(self.device, self.dtype)


def free(parameter: Tensor) -> Tensor:
    """A parameter's values, which no gradient flows to, and which may be saved for the way back."""
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        return parameter.clone()
    return parameter.detach()


def look_up(embedding: torch.nn.Embedding, indices: Tensor) -> Tensor:
    """Rows (R, width) of an embedding at ``indices`` (R,), in its own dtype and on its device."""
    return embedding.weight[on_device(indices, embedding.weight.device)]
