"""Rotary positions: queries and keys turned by angles that grow with their position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


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
        steps = torch.arange(positions, device=inverse_frequencies.device)
        wide = inverse_frequencies.to(torch.promote_types(dtype, torch.float32))
        return cls(*RotaryFrequencies(wide, scaling).cos_sin(steps, dtype))

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R, n) of the angles at ``positions`` (R,), in the tables' dtype."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    @property
    def back(self) -> Rotary:
        """What turns the other way."""
        return Rotary(self.cos, -self.sin, self.interleaved)


@dataclass(frozen=True)
class RotaryFrequencies:
    """Rotary positions by their inverse frequencies (n,), in float32 or better; cos and sin are multiplied by
    ``scaling``. For models whose longest prompt makes a table of all positions large: computing the angles of the rows
    at hand takes about 1 % of the time of projecting them."""

    inverse: Tensor
    scaling: float
    interleaved: ClassVar[bool] = False

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R, n) of the angles at ``positions`` (R,)."""
        angles = torch.outer(positions.to(self.inverse.dtype), self.inverse)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    @property
    def back(self) -> RotaryFrequencies:
        """What turns the other way."""
        return RotaryFrequencies(-self.inverse, self.scaling)


Turn = Callable[[Tensor, Tensor, Rotary | RotaryFrequencies, int], None]


def turn(rows: Tensor, positions: Tensor, rotary: Rotary | RotaryFrequencies, head_dim: int) -> None:
    """Turn all heads of rows (R, H * head_dim) at ``positions`` (R,), in place."""
    cos, sin = (angles[:, None] for angles in rotary.cos_sin(positions, rows.dtype))
    n = cos.shape[-1]
    heads = rows.unflatten(1, (-1, head_dim))
    pairs = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rotary.interleaved else (slice(n), slice(n, 2 * n))
    left, right = (heads[..., place] for place in pairs)
    before = left.clone()
    left.mul_(cos).addcmul_(right, sin, value=-1)
    right.mul_(cos).addcmul_(before, sin)


class Turned(torch.autograd.Function):
    """``turn`` of a copy of the rows, under autograd."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, positions: Tensor, rotary: Rotary | RotaryFrequencies, head_dim: int, turn: Turn
    ) -> Tensor:
        ctx.arguments, ctx.turn = (positions, rotary.back, head_dim), turn
        out = rows.clone()
        turn(out, positions, rotary, head_dim)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grads[0].clone()
        ctx.turn(gradient, *ctx.arguments)
        return gradient, *(None,) * 4
