"""MEMIT (Meng et al. 2023): by itself, of all requests in one change, and with the keys of earlier edits preserved."""

from dataclasses import dataclass, replace
from functools import partial

from causalcone.engine.edit.methods.closed_forms.spread import Spread, spread_method
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, MomentMetric


@dataclass(frozen=True)
class Memit(Spread):
    hparams: MemitHparams

    def problem(self, count: int) -> LeastSquares:
        weight = self.hparams.covariance_weight  # without any, keys reach their goals, by the smallest such change
        metric = MomentMetric(self.model.second_moments, weight or 1.0)
        return LeastSquares(metric, 1.0 if weight else 0.0)


MEMIT = spread_method("memit", Memit, MemitHparams, history=False)
MEMIT_JOINT = replace(
    MEMIT,
    name="memit_joint",
    build=partial(Memit, together=True),
    flops=lambda work, hparams: work.flops.memit_joint(work.searched, work.windows, hparams.steps),
    joint=True,
)
MEMIT_SEQUENCE = replace(MEMIT, name="memit-seq", history=True)
