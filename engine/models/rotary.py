"""Rotary positions: queries and keys turned by angles that grow with their position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalcone.engine.errors import ModelError


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: ``cos`` and ``sin`` (P, n) turn the first 2n dimensions of every head.

    Dimension i is turned with i + n, or, where ``interleaved``, 2i with 2i + 1.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def of(cls, inverse_frequencies: Tensor, positions: int, dtype: torch.dtype, scaling: float = 1.0) -> Rotary:
        """Tables of ``positions`` rows; angles are taken in float32 or better, as the models themselves do."""
        wide = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(positions, device=inverse_frequencies.device, dtype=wide)
        angles = torch.outer(steps, inverse_frequencies.to(wide))
        return cls((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))

    def __call__(self, heads: Tensor, positions: Tensor) -> Tensor:
        """heads (R, H, d) of rows at ``positions`` (R,), turned; a new tensor."""
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        return turn(heads, cos, sin, self.interleaved)


@dataclass(frozen=True)
class RotaryFrequencies:
    """Rotary positions by their inverse frequencies (n,), in float32 or better; cos and sin are multiplied by
    ``scaling``. For models whose longest prompt makes a table of all positions large: computing the angles of the rows
    at hand takes about 1 % of the time of projecting them."""

    inverse: Tensor
    scaling: float

    def __call__(self, heads: Tensor, positions: Tensor) -> Tensor:
        """heads (R, H, d) of rows at ``positions`` (R,), turned; a new tensor."""
        angles = torch.outer(positions.to(self.inverse.dtype), self.inverse)
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return turn(heads, cos.to(heads.dtype), sin.to(heads.dtype))


def turn(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The first 2n dimensions of heads (R, H, d) turned by angles (R, n), in pairs as ``Rotary`` says; a new tensor."""
    if heads.requires_grad and torch.is_grad_enabled():
        return _Turned.apply(heads, cos[:, None], sin[:, None], interleaved)
    return _turned(heads, cos[:, None], sin[:, None], interleaved)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    n = cos.shape[-1]
    turned = heads.clone()
    left, right = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    turned[..., left].mul_(cos).addcmul_(heads[..., right], sin, value=-1)
    turned[..., right].mul_(cos).addcmul_(heads[..., left], sin)
    return turned


class _Turned(torch.autograd.Function):
    """The way back turns by the opposite angles; autograd would copy all heads for each half that is written."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(heads, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin, ctx.interleaved), None, None, None


def refuse_length_dependent(module: Any) -> None:
    """Raise ``ModelError`` where a rotary module's angles depend on the length of the prompt."""
    types = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
    for kind in types:
        if kind == "longrope" or "dynamic" in kind:
            raise ModelError(f"rotary positions of type {kind!r} depend on the prompt's length: not supported")
