"""The least-squares problem that all closed forms of editing solve (docs/editing.md, "Closed forms").

The keys K (inner, n) of a layer's down-projection are to give R (hidden, n) more, and other texts what they gave:

    minimise |D K - R|^2 + tr(D A D^T) over the changes D (hidden, inner) with D = D P

    M = P K,  D = R (slack I + M^T A^-1 M)^-1 (A^-1 M)^T  with slack = 1

The metric A says what is to stay: moments of keys, a ridge, the keys of earlier edits. The projector P says where a
change may go. Without slack every key reaches what it is to give. All is in float64, and no (inner, inner) matrix is
made for an edit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError


class Metric(Protocol):
    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """A^-1 keys (inner, n), in float64."""


class Projector(Protocol):
    def project(self, layer: int, keys: Tensor) -> Tensor:
        """P keys (inner, n), in float64. The metric must not lead out of the projector's range, as a ridge does not."""


@dataclass(frozen=True)
class MomentMetric:
    """A = weight x C + ridge x I, with the second moment C of a layer's keys."""

    moments: Moments
    weight: float = 1.0
    ridge: float = 0.0

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        if not self.ridge:
            return self.moments.solve(layer, keys) / self.weight
        mean = self.moments.matrices[layer].diagonal().double().mean().item()
        return self.moments.solve(layer, keys, self.moments.ridge + self.ridge / (self.weight * mean)) / self.weight


@dataclass(frozen=True)
class RidgeMetric:
    """A = weight x I."""

    weight: float

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        return keys.double() / self.weight


@dataclass
class History:
    """Keys of earlier edits, K K^T of which is added to a metric: A^-1 less G G^T, with a factor G (inner, N) that
    grows by a column for every key, or, from N = inner on, with G G^T itself."""

    _factors: dict[int, Tensor] = field(default_factory=dict)
    _dense: dict[int, Tensor] = field(default_factory=dict)

    def solve(self, metric: Metric, layer: int, keys: Tensor) -> Tensor:
        """(A + K K^T)^-1 keys (inner, n)."""
        solved = metric.solve(layer, keys)
        if layer in self._dense:
            return solved - self._dense[layer] @ keys
        factor = self._factors.get(layer)
        return solved if factor is None else solved - factor @ (factor.T @ keys)

    def add(self, metric: Metric, layer: int, keys: Tensor) -> None:
        """Preserve these keys (inner, n) from here on."""
        solved = self.solve(metric, layer, keys)
        inner = keys.T @ solved
        inner.diagonal().add_(1.0)
        lower = torch.linalg.cholesky(inner)
        # (A + k k^T)^-1 = A^-1 - Y (I + k^T Y)^-1 Y^T with Y = A^-1 k
        more = torch.linalg.solve_triangular(lower, solved.T, upper=False).T
        if layer in self._dense:
            self._dense[layer] += more @ more.T
            return
        factor = torch.cat([self._factors[layer], more], dim=1) if layer in self._factors else more
        self._factors[layer] = factor
        if factor.shape[1] >= factor.shape[0]:
            self._dense[layer] = factor @ factor.T
            del self._factors[layer]

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return sum(tensor.nbytes for tensors in (self._factors, self._dense) for tensor in tensors.values())


@dataclass(frozen=True)
class LeastSquares:
    """The problem; keys (n, inner) and what they are to give, rest (n, hidden), are rows in float64."""

    metric: Metric
    slack: float = 1.0
    projector: Projector | None = None
    history: History | None = None

    def together(self, layer: int, keys: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """One change left @ right.T of a layer for all keys: left (hidden, n), right (inner, n)."""
        along, right = self._directions(layer, keys)
        matrix = along.T @ right
        matrix.diagonal().add_(self.slack)
        try:
            return torch.linalg.solve(matrix.T, rest).T, right
        except torch.linalg.LinAlgError as error:
            raise ExperimentError(
                "the facts' keys cannot be told apart; give a covariance_weight (of emmet a slack, of alphaedit a "
                "ridge) above zero, or leave out facts that share their prompt's beginning"
            ) from error

    def each(self, layer: int, keys: Tensor, rest: Tensor, reaching: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For each key a change of its own: row i of left (n, hidden) and of right (n, inner). reaching (n, inner):
        other keys that are to give the rest, along the directions of ``keys``."""
        along, right = self._directions(layer, keys)
        if reaching is not None:
            along = self._projected(layer, reaching.T)
        return rest / (self.slack + (along * right).sum(0))[:, None], right.T

    def remember(self, layer: int, keys: Tensor) -> None:
        """Let the history preserve keys (n, inner)."""
        assert self.history is not None
        self.history.add(self.metric, layer, self._projected(layer, keys.T))

    def _projected(self, layer: int, keys: Tensor) -> Tensor:
        return keys if self.projector is None else self.projector.project(layer, keys)

    def _directions(self, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """M = P K and A^-1 M (inner, n)."""
        along = self._projected(layer, keys.T)
        if self.history is None:
            return along, self.metric.solve(layer, along).to(along.device)
        return along, self.history.solve(self.metric, layer, along)
