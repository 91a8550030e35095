"""Least squares of a score on the edited layer and on an effect, in closed form (docs/analysis.md, "The question").

With the layer as a factor, every model splits into sums over layers, each with a mean of its own, and with the
interaction a slope of its own. Columns that are constant within a layer add no slope, as R's ``lm`` drops them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

Floats = NDArray[np.float64]
Model = Literal["layer", "trace", "additive", "interaction"]

CONSTANT = 1e-14
"""The share of a column's squares within its layer below which it is constant there (R: 1e-7, of lengths)."""

ROUNDING = 1e-12
"""The range of numbers, as a share of the largest, below which they are the same but for rounding."""

EXACT = 1e-24
"""The share of the scores' squares below which those of residuals are rounding, and no basis for a test."""


def same(values: Floats) -> bool:
    """Whether there is nothing but rounding between the values."""
    return len(values) == 0 or bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def around_mean(values: Floats) -> float:
    return float(np.sum((values - values.mean()) ** 2))


@dataclass(frozen=True)
class Fit:
    """A model of n scores, and its errors in sample, over n. residuals: (n,); rank: of the design matrix,
    the constant included; total: the scores' squares around their mean."""

    residuals: Floats
    rank: int
    total: float

    @property
    def squares(self) -> float:
        return float(self.residuals @ self.residuals)

    @property
    def r2(self) -> float:
        return 1 - self.squares / self.total

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.squares <= EXACT * self.total

    @property
    def freedom(self) -> int:
        return len(self.residuals) - self.rank

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def mae(self) -> float:
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


def f_test(small: Fit, large: Fit) -> dict[str, float | str]:
    """Whether the larger of two nested models explains more than chance would, R's ``anova``: f, f_added, f_left and p;
    without f and p, but with the reason in ``lack``, where there is no such test."""
    added, left = large.rank - small.rank, large.freedom
    freedom: dict[str, float | str] = {"f_added": added, "f_left": left}
    if added < 1:
        return {**freedom, "lack": "nothing is added"}
    if left < 1:
        return {**freedom, "lack": "no degrees of freedom are left"}
    if large.exact:
        return {**freedom, "lack": EXPLAINED}
    statistic = (small.squares - large.squares) / added / (large.squares / left)
    return {"f": statistic, **freedom, "p": float(f_distribution.sf(statistic, added, left))}
