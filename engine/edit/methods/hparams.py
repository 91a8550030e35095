"""Hyperparameters of the editing methods; the defaults are the published ones for GPT-J (METHODS 4)."""

from __future__ import annotations

from dataclasses import dataclass

from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True)
class _Optimised:
    """What all methods share: ``steps`` of Adam with learning rate ``lr``; once the loss is below ``stop_loss`` (None:
    never) the method stops, in its own way."""

    steps: int
    lr: float
    stop_loss: float | None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("steps", "noise_samples"):
                if not isinstance(value, int) or value < 1:
                    raise ExperimentError(f"{name} is {value!r}; give a whole number, at least one")
            elif name == "stop_loss" and value is None:
                continue
            elif not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ExperimentError(f"{name} is {value!r}; give a finite number that is not negative")


@dataclass(frozen=True)
class RomeHparams(_Optimised):
    """How ROME finds v* (Meng et al. 2022). The divergence weighs ``kl_factor``, the vector's norm ``weight_decay``
    over the square of the norm of v; the vector is kept within ``clamp`` norms of v. The last step only evaluates, but
    in Fact Erasure."""

    steps: int = 20
    lr: float = 0.5
    stop_loss: float | None = 0.05
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0


@dataclass(frozen=True)
class MemitHparams(_Optimised):
    """How MEMIT finds z* (as ``RomeHparams``) and spreads it over layers, against ``covariance_weight`` times the
    second moment of their keys (Meng et al. 2023)."""

    steps: int = 25
    lr: float = 0.5
    stop_loss: float | None = 0.05
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 0.75
    covariance_weight: float = 15_000.0


@dataclass(frozen=True)
class FinetuneHparams(_Optimised):
    """Constrained fine-tuning: every weight stays within ``norm_constraint`` of what it was (Zhu et al. 2020). No step
    is taken while the loss is below ``stop_loss``; five such checks in a row end it, but in Fact Erasure.

    noise_samples: how many draws of noise are trained on at once in Fact Forcing.
    """

    steps: int = 25
    lr: float = 5e-4
    stop_loss: float | None = 1e-2
    norm_constraint: float = 1e-4
    noise_samples: int = 10


Hparams = RomeHparams | MemitHparams | FinetuneHparams
