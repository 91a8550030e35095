"""Least squares of a score on the edited layer and on an effect, in closed form (METHODS 6).

With the layer as a factor, every model splits into sums over layers: each layer has a mean of its own, and with the
interaction a slope of its own. Columns that are constant within a layer add no slope, as R's ``lm`` drops them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

Floats = NDArray[np.float64]
Model = Literal["layer", "trace", "additive", "interaction"]

CONSTANT = 1e-14
"""A column whose squares within its layer sum up to less than this share of all is constant there (R: 1e-7, of
lengths)."""


@dataclass(frozen=True)
class Fit:
    """residuals: (n,); rank: of the design matrix, the constant included."""

    residuals: Floats
    rank: int

    @property
    def squares(self) -> float:
        return float(self.residuals @ self.residuals)

    @property
    def freedom(self) -> int:
        """Degrees of freedom that are left."""
        return len(self.residuals) - self.rank

    @property
    def rmse(self) -> float:
        """Root mean squared error, in sample, over n."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def mae(self) -> float:
        """Mean absolute error, in sample."""
        return float(np.mean(np.abs(self.residuals)))


def fit(score: Floats, effect: Floats, layer: NDArray[np.int64], model: Model) -> Fit:
    """Ordinary least squares of ``score`` (n,) on the layer as a factor ("layer"), on the effect ("trace"), on both, or
    on both with their interaction. layer: (n,), numbers from 0 without gaps."""
    if model == "trace":
        layer = np.zeros_like(layer)
    layers = int(layer.max()) + 1
    y, x = centred(score, layer, layers), centred(effect, layer, layers)
    if model == "layer":
        return Fit(y, layers)
    of_layer = np.zeros_like(layer) if model == "additive" else layer
    xx, xy, size = (np.bincount(of_layer, weights=values) for values in (x * x, x * y, effect * effect))
    varies = xx > CONSTANT * size
    slope = np.divide(xy, xx, out=np.zeros_like(xy), where=varies)
    return Fit(y - slope[of_layer] * x, layers + int(varies.sum()))


def centred(values: Floats, layer: NDArray[np.int64], layers: int) -> Floats:
    """Values less their layer's mean; twice, as the first mean is rounded."""
    counts = np.bincount(layer, minlength=layers)
    for _ in range(2):
        values = values - (np.bincount(layer, weights=values, minlength=layers) / counts)[layer]
    return values


@dataclass(frozen=True)
class FTest:
    """Whether the larger of two nested models explains more than chance would: ``anova`` of R. None where no degrees of
    freedom are left, or nothing is added."""

    statistic: float | None
    added: int
    left: int
    p: float | None


def f_test(small: Fit, large: Fit) -> FTest:
    added, left = large.rank - small.rank, large.freedom
    if added < 1 or left < 1 or large.squares == 0:
        return FTest(None, added, left, None)
    statistic = (small.squares - large.squares) / added / (large.squares / left)
    return FTest(statistic, added, left, float(f_distribution.sf(statistic, added, left)))
