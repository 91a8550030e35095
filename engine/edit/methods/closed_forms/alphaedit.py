"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): changes that leave alone what most keys are made of, and the keys of
earlier edits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from causalcone.engine.edit.methods.closed_forms.spread import Spread, spread_method
from causalcone.engine.edit.methods.hparams import ValueHparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, RidgeMetric
from causalcone.engine.edit.moments.null_space import NullSpace


@dataclass(frozen=True)
class AlphaEditHparams(ValueHparams):
    """AlphaEdit's; the search as for ``MemitHparams``.

    Args:
        ridge: Weight of the change's own squared norm.
        null_space: Which directions of a layer's keys a change may use, in the order of their second moments'
            eigenvalues.
        null_space_by: What ``null_space`` is: ``"eigenvalue"``, below which directions are used, as published;
            ``"rank"``, how many directions, the smallest ones; ``"share"``, of the moment's trace that they hold
            together at most.
    """

    steps: int = 25
    clamp: float = 0.75
    ridge: float = 10.0
    null_space: float = 0.02
    null_space_by: Literal["eigenvalue", "rank", "share"] = "eigenvalue"


@dataclass(frozen=True)
class AlphaEdit(Spread):
    hparams: AlphaEditHparams

    def problem(self, count: int) -> LeastSquares:
        ridge = self.hparams.ridge  # without any, keys reach their goals, by the smallest such change
        return LeastSquares(RidgeMetric(ridge or 1.0), 1.0 if ridge else 0.0, projector=self._space)

    def notes(self, layers: Sequence[int]) -> dict[str, Any]:
        """The null space's rank by layer; warns ``ShortMoments``."""
        self._space.warn_if_short(layers)
        return {"null_space_rank": {str(layer): self._space.rank(layer) for layer in layers}}

    @property
    def _space(self) -> NullSpace:
        return NullSpace(self.model.second_moments, self.hparams.null_space_by, self.hparams.null_space)


ALPHAEDIT = spread_method("alphaedit", AlphaEdit, AlphaEditHparams, history=True)
