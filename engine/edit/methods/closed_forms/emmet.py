"""EMMET (Gupta et al. 2024b, arXiv 2403.14236): ROME for many facts at once, in one layer; every key reaches its
value."""

from dataclasses import dataclass

from causalcone.engine.edit.methods.closed_forms.spread import Spread, spread_method
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, MomentMetric


@dataclass(frozen=True)
class EmmetHparams(MemitHparams):
    """EMMET's; the others as for ``MemitHparams``.

    Args:
        covariance_weight: Scale of the second moment, which matters against ``slack`` alone.
        slack: How far several keys in one change may stay from their goals, so that it can be solved for.
    """

    covariance_weight: float = 1.0
    slack: float = 0.1


@dataclass(frozen=True)
class Emmet(Spread):
    hparams: EmmetHparams

    def problem(self, count: int) -> LeastSquares:
        metric = MomentMetric(self.model.second_moments, self.hparams.covariance_weight or 1.0)
        return LeastSquares(metric, slack=self.hparams.slack if count > 1 else 0.0)


EMMET = spread_method("emmet", Emmet, EmmetHparams, window=None, history=False)
