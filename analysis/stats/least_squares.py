"""Least squares of a score on the edited layer and on an effect, in closed form (docs/analysis.md, "The question").

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

ROUNDING = 1e-12
"""Numbers whose range is less than this share of the largest of them are the same, but for rounding."""

EXACT = 1e-24
"""Squares of residuals that sum up to less than this share of the scores' own are rounding, and no basis for a test."""


def same(values: Floats) -> bool:
    """Whether there is nothing but rounding between the values."""
    return len(values) == 0 or bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def around_mean(values: Floats) -> float:
    """The sum of squares around the mean."""
    return float(np.sum((values - values.mean()) ** 2))


@dataclass(frozen=True)
class Fit:
    """residuals: (n,); rank: of the design matrix, the constant included; total: the scores' squares around their
    mean."""

    residuals: Floats
    rank: int
    total: float

    @property
    def squares(self) -> float:
        return float(self.residuals @ self.residuals)

    @property
    def r2(self) -> float:
        """The coefficient of determination."""
        return 1 - self.squares / self.total

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.squares <= EXACT * self.total

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
    total = around_mean(score)
    if model == "trace":
        layer = np.zeros_like(layer)
    layers = int(layer.max()) + 1
    y, x = centred(score, layer, layers), centred(effect, layer, layers)
    if model == "layer":
        return Fit(y, layers, total)
    of_layer = np.zeros_like(layer) if model == "additive" else layer
    xx, xy, size = (np.bincount(of_layer, weights=values) for values in (x * x, x * y, effect * effect))
    varies = xx > CONSTANT * size
    slope = np.divide(xy, xx, out=np.zeros_like(xy), where=varies)
    return Fit(y - slope[of_layer] * x, layers + int(varies.sum()), total)


def centred(values: Floats, layer: NDArray[np.int64], layers: int) -> Floats:
    """Values less their layer's mean; twice, as the first mean is rounded."""
    counts = np.bincount(layer, minlength=layers)
    for _ in range(2):
        values = values - (np.bincount(layer, weights=values, minlength=layers) / counts)[layer]
    return values


EXPLAINED = "every score is explained exactly"


@dataclass(frozen=True)
class FTest:
    """Whether the larger of two nested models explains more than chance would: ``anova`` of R. lack: why there is no
    such test, where that is so."""

    added: int
    left: int
    statistic: float | None = None
    p: float | None = None
    lack: str | None = None


def f_test(small: Fit, large: Fit) -> FTest:
    added, left = large.rank - small.rank, large.freedom
    if added < 1:
        return FTest(added, left, lack="nothing is added")
    if left < 1:
        return FTest(added, left, lack="no degrees of freedom are left")
    if large.exact:
        return FTest(added, left, lack=EXPLAINED)
    statistic = (small.squares - large.squares) / added / (large.squares / left)
    return FTest(added, left, statistic, float(f_distribution.sf(statistic, added, left)))
