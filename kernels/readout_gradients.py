"""Readouts under autograd: their gradients are computed with them, while the logits are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from causalcone.kernels.readout import Readout


def log_probability(states: Tensor, readout: Readout, targets: Tensor) -> Tensor:
    """log p of each row's target (R,), float64, differentiable by the states (R, D)."""
    return _LogProbability.apply(states, readout, targets)


def divergence(states: Tensor, readout: Readout, reference: Tensor, rows: Tensor) -> Tensor:
    """KL(p || q) of each row's distribution p (R,), float64, differentiable by the states (R, D); log q of row i is
    ``reference[rows[i]]``."""
    return _Divergence.apply(states, readout, reference, rows)


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, readout: Readout, targets: Tensor) -> Tensor:
        log_p, gradient = readout.differentiated(states, targets)
        ctx.save_for_backward(gradient)
        return log_p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None].to(gradient.dtype) * gradient, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, readout: Readout, reference: Tensor, rows: Tensor) -> Tensor:
        value, gradient = readout.divergence(states, reference, rows)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None].to(gradient.dtype) * gradient, None, None, None
