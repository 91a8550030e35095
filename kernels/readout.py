"""Log-probabilities of target tokens, without ever holding the logits of more than a tile of rows and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.linear import Linear
from causalcone.kernels.log_sums import capped
from causalcone.kernels.tiles import pieces


@dataclass(frozen=True)
class Readout:
    """The output projection: ``weight`` (V, D), ``bias`` (V,) or None, walked in tiles of ``rows`` x ``vocabulary``;
    ``softcap`` bounds the logits by ``softcap * tanh(logit / softcap)``. backends: of the sums over logits."""

    weight: Tensor
    bias: Tensor | None
    rows: int = 512
    vocabulary: int = 4096
    softcap: float | None = None
    prepared: tuple[tuple[int, Linear], ...] | None = None
    backends: Backends = TORCH

    def keeping(self, dtype: torch.dtype) -> Readout:
        """The same with its weights made ready once, for states of ``dtype``: they take as much memory again."""
        return replace(self, prepared=tuple(self._products(self.weight.new_empty(0, dtype=dtype))))

    def target_log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """log p(target) of each row, float64, in the shape of ``targets``.

        states (R, D): final, normed; targets (R,) or, several of each row, (R, k) token ids. Logits have the states'
        dtype; everything after them is float32 inside a tile and float64 across tiles, so that large logits cost no
        precision and p stays below 1.
        """
        total = torch.full((len(states),), float("-inf"), dtype=torch.float64, device=states.device)
        logit = torch.zeros(targets.shape, dtype=torch.float64, device=states.device)
        for start, product in self._products(states):
            for tile in pieces(len(states), self.rows, states.device):
                logits = product(states[tile])
                self.backends.add_tile(logits, start, self.softcap, targets[tile], total[tile], logit[tile])
        return logit - (total if targets.dim() == 1 else total[:, None])

    def log_probability(self, states: Tensor, targets: Tensor) -> Tensor:
        """log p of each row's target (R,), float64, differentiable by the states (R, D)."""

        def of_logits(logits: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
            target = targets[tile, None]
            target_logits = logits.gather(1, target)[:, 0].double()
            top = logits.amax(-1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(-1)
            slope = logits.div_(-sums[:, None]).scatter_add_(1, target, torch.ones_like(target, dtype=logits.dtype))
            return target_logits - top[:, 0].double() - sums.double().log(), slope

        return _Differentiable.apply(states, partial(self._through_logits, of_logits=of_logits))

    def divergence(self, states: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        """KL(p || q) of each row's distribution p (R,), float64, differentiable by the states (R, D); log q of row i is
        ``reference[rows[i]]``."""

        def of_logits(logits: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
            log_p = logits.log_softmax(-1)
            slope = log_p - reference.index_select(0, rows[tile]).to(log_p)
            p = log_p.exp_()
            value = (p * slope).sum(-1, dtype=torch.float64)
            return value, slope.sub_(value[:, None].to(slope)).mul_(p)

        return _Differentiable.apply(states, partial(self._through_logits, of_logits=of_logits))

    def _through_logits(
        self, states: Tensor, of_logits: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """A number of each row (R,), float64, and its gradient by the states (R, D), from ``of_logits``: the number of
        each row of a tile, and its gradient by the logits, which are all there at once and serve for both."""
        wide = torch.promote_types(states.dtype, torch.float32)
        numbers = torch.empty(len(states), dtype=torch.float64, device=states.device)
        gradient = torch.empty_like(states)
        rows = min(len(states), self.rows)
        buffer = torch.empty(rows, len(self.weight), dtype=wide, device=states.device)
        products = list(self._products(states)) if len(states) else []
        for tile in pieces(len(states), rows, states.device):
            logits = buffer[: len(states[tile])]
            for start, product in products:
                logits[:, start : start + len(product.weight)] = product(states[tile])
            bent = None if self.softcap is None else 1 - (capped(logits, self.softcap) / self.softcap).square_()
            numbers[tile], slope = of_logits(logits, tile)
            if bent is not None:
                slope *= bent
            gradient[tile] = sum(
                product.transposed(slope[:, start : start + len(product.weight)].to(states.dtype))
                for start, product in products
            )
        return numbers, gradient

    def logits(self, states: Tensor) -> Tensor:
        """All logits (R, V) of rows (R, D), in their dtype."""
        out = states.new_empty(len(states), len(self.weight))
        if len(states):
            for start, product in self._products(states):
                tile = product(states)
                out[:, start : start + tile.shape[1]] = capped(tile, self.softcap)
        return out

    def most_likely(self, states: Tensor) -> Tensor:
        """The most likely next token of each row (R, D): ids (R,); the lowest where several are equally likely."""
        best = torch.full((len(states),), float("-inf"), dtype=states.dtype, device=states.device)
        token = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        for start, product in self._products(states):
            for tile in pieces(len(states), self.rows, states.device):
                value, index = product(states[tile]).max(-1)
                better = value > best[tile]
                token[tile] = torch.where(better, index + start, token[tile])
                best[tile] = torch.where(better, value, best[tile])
        return token

    def _products(self, states: Tensor) -> Iterator[tuple[int, Linear]]:
        if self.prepared is not None:
            yield from self.prepared
            return
        for start in range(0, len(self.weight), self.vocabulary):
            tile = slice(start, start + self.vocabulary)
            bias = None if self.bias is None else self.bias[tile].to(states)
            yield start, Linear(self.weight[tile].to(states), bias)


class _Differentiable(torch.autograd.Function):
    """A number of each row, whose gradient by the states is computed with it, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        numbers, gradient = with_gradient(states)
        ctx.save_for_backward(gradient)
        return numbers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None].to(gradient.dtype) * gradient, None
