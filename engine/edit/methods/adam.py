"""Adam (Kingma and Ba 2015) on many vectors at once, of which some may leave before the others."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class Adam:
    """The state of Adam for parameters of one shape; all have taken the same number of steps."""

    def __init__(self, lr: float, like: Tensor) -> None:
        self.lr, self.steps = lr, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def change(self, gradient: Tensor) -> Tensor:
        """What is to be added to the parameters after one more step."""
        self.steps += 1
        first, second = BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = self.square.sqrt().div_((1 - second**self.steps) ** 0.5).add_(EPS)
        return (self.mean / spread).mul_(-self.lr / (1 - first**self.steps))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.mean, self.square = self.mean[rows], self.square[rows]
