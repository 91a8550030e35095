"""Adam (Kingma and Ba 2015), and its step in the constrained fine-tuning of a weight, whose gradient is of few rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class AdamState:
    """A change that Adam makes, and what it keeps of the gradients: their running mean and mean square, all in one
    shape; ``steps`` counts the updates."""

    change: Tensor
    mean: Tensor
    square: Tensor
    steps: int = 0

    @classmethod
    def zeros_like(cls, parameter: Tensor, dtype: torch.dtype) -> AdamState:
        """At rest, in ``dtype``."""
        change = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return cls(change, torch.zeros_like(change), torch.zeros_like(change))

    def step(self, gradient: Tensor, lr: float) -> None:
        """One step along the gradient."""
        steps = torch.full((), self.steps, dtype=torch.float32, device=gradient.device)  # no copy to wait for
        adam(
            [self.change], [gradient.contiguous()], [self.mean], [self.square], [], [steps], fused=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip
        self.steps += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.change, self.mean, self.square = self.change[rows], self.mean[rows], self.square[rows]


def step_weight(weight: AdamState, slopes: Tensor, keys: Tensor, lr: float, bound: float) -> None:
    """One step along the gradient ``slopes.T @ keys`` of a weight (hidden, inner), clamped to -bound .. bound.

    slopes (R, hidden): gradients of the rows that came out of the weight's product; keys (R, inner): what went in;
    bound: infinity for none.
    """
    dtype = weight.change.dtype
    weight.step(slopes.to(dtype).T @ keys.to(dtype), lr)
    if bound < math.inf:
        weight.change.clamp_(-bound, bound)
