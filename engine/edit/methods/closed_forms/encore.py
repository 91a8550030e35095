"""ENCORE (Gupta et al. 2025, arXiv 2502.01636): MEMIT that bounds the norm of changes and stops its search early, for
long sequences of edits."""

from dataclasses import dataclass

from causalcone.engine.edit.methods.closed_forms.spread import Spread, spread_method
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, MomentMetric, RidgeMetric


@dataclass(frozen=True)
class EncoreHparams(MemitHparams):
    """ENCORE's; the others as for ``MemitHparams``.

    Args:
        norm_weight: Weight of the change's own squared norm.
        patience: Steps that a search goes on for once the target is the likeliest in all contexts.
    """

    norm_weight: float = 10.0
    patience: int = 3

    @property
    def stops_after(self) -> int | None:
        return self.patience


@dataclass(frozen=True)
class Encore(Spread):
    hparams: EncoreHparams

    def problem(self, count: int) -> LeastSquares:
        weight, ridge = self.hparams.covariance_weight, self.hparams.norm_weight
        if ridge and not weight:
            return LeastSquares(RidgeMetric(ridge))
        return LeastSquares(MomentMetric(self.model.second_moments, weight or 1.0, ridge), 1.0 if weight else 0.0)


ENCORE = spread_method("encore", Encore, EncoreHparams, history=True)
