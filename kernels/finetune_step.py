"""A step of constrained fine-tuning of one weight: its gradient from few rows, Adam, and back within the bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class Moving:
    """A parameter's change, and what Adam (Kingma and Ba 2015) keeps of its gradients: their running mean and mean
    square, all in one shape; steps: how many were taken."""

    change: Tensor
    mean: Tensor
    square: Tensor
    steps: int = 0

    @classmethod
    def zeros_like(cls, parameter: Tensor, dtype: torch.dtype) -> Moving:
        """At rest, in ``dtype``."""
        change = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return cls(change, torch.zeros_like(change), torch.zeros_like(change))


def step_weight(weight: Moving, slopes: Tensor, keys: Tensor, lr: float, bound: float) -> None:
    """One step along the gradient ``slopes.T @ keys`` of a weight (hidden, inner), clamped to -bound .. bound.

    slopes (R, hidden): gradients of the rows that came out of the weight's product; keys (R, inner): what went in.
    """
    step(weight, (slopes.T @ keys).to(weight.change.dtype), lr, bound)


def step(parameter: Moving, gradient: Tensor, lr: float, bound: float) -> None:
    """One step along the gradient, clamped to -bound .. bound."""
    taken = torch.full((), parameter.steps, dtype=torch.float32, device=gradient.device)  # no copy to wait for
    adam(
        [parameter.change], [gradient], [parameter.mean], [parameter.square], [], [taken], fused=True, amsgrad=False,
        beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=0.0, eps=EPS, maximize=False,
    )  # fmt: skip
    parameter.steps += 1
    parameter.change.clamp_(-bound, bound)
