"""Hyperparameters of the editing methods; the defaults are the published ones for GPT-J (docs/editing.md,
"Hyperparameters")."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from causalcone.engine.errors import ExperimentError, one_of


@dataclass(frozen=True)
class Hparams:
    """Base of a method's hyperparameters, a frozen dataclass with defaults. Whole numbers (``int``) are at least 1,
    others (``float``, or ``float | None``) finite and not negative; a ``Literal`` of words is one of these."""

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():
            value = getattr(self, name)
            if is_word(kind):
                one_of(name, value, get_args(kind))
            elif kind is int:
                if not isinstance(value, int) or value < 1:
                    raise ExperimentError(f"{name} is {value!r}; give a whole number, at least one")
            elif value is None and type(None) in get_args(kind):
                continue
            elif not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ExperimentError(f"{name} is {value!r}; give a finite number that is not negative")


def kinds_of(hparams: type[Hparams]) -> dict[str, Any]:
    """The type of each hyperparameter: ``int``, ``float``, ``float | None`` or a ``Literal`` of words."""
    hints = get_type_hints(hparams)
    return {field.name: hints[field.name] for field in fields(hparams)}


def is_word(kind: Any) -> bool:
    """Whether a hyperparameter of this type is one of some words."""
    return get_origin(kind) is Literal


@dataclass(frozen=True)
class ValueHparams(Hparams):
    """What the search for a value takes: the hyperparameters of ``RomeHparams``, which describes them."""

    steps: int = 20
    lr: float = 0.5
    stop_loss: float | None = 0.05
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0
    norm_anchor: float | None = field(default=None, kw_only=True)

    @property
    def stops_after(self) -> int | None:
        """Further steps once the target is the likeliest in all contexts, after which a search ends; None: it goes
        on."""
        return None


@dataclass(frozen=True)
class RomeHparams(ValueHparams):
    """How ROME searches v* (Meng et al. 2022).

    Args:
        steps: Steps of Adam; the last only evaluates the loss, except in Fact Erasure.
        lr: Learning rate of Adam.
        stop_loss: The search stops once the loss is below this; None: never.
        kl_factor: Weight of the divergence of the essence prompt's distribution.
        weight_decay: Weight of the vector's norm, over the squared norm of the unedited value v.
        clamp: Largest norm of the vector, in norms of v.
        norm_anchor: The norm that v* is brought to, once found (``Editor.norm_anchor``); None: v* stays as it is.
        keys: Which keys the edit solves for: ``"published"``, the direction from the mean key over all contexts and the
            rest from the bare prompt's; ``"mean"``, the mean key and value in both (R-ROME); ``"prompt"``, the bare
            prompt's in both (p-ROME).
    """

    keys: Literal["published", "mean", "prompt"] = "published"


@dataclass(frozen=True)
class MemitHparams(ValueHparams):
    """How MEMIT searches z* and spreads it over the layers of a window (Meng et al. 2023).

    Args:
        steps: As for ``RomeHparams``, like lr, stop_loss, kl_factor and norm_anchor (of the MLP's output at the
            lookup); the last step only evaluates the loss.
        weight_decay: Weight of the vector's norm, over the squared norm of the unedited output of the layer.
        clamp: Largest norm of the vector, in norms of that output.
        covariance_weight: Weight of the second moment of a layer's keys against the edited keys.
    """

    steps: int = 25
    clamp: float = 0.75
    covariance_weight: float = 15_000.0


@dataclass(frozen=True)
class FinetuneHparams(Hparams):
    """Constrained fine-tuning (Zhu et al. 2020).

    Args:
        steps: Steps of Adam at most.
        lr: Learning rate of Adam.
        stop_loss: Training ends once the loss is below this; None: never.
        norm_constraint: Every weight stays within this distance of its value before the edit; None: at any.
        noise_samples: Draws of noise that are trained on at once in Fact Forcing.
    """

    steps: int = 25
    lr: float = 5e-4
    stop_loss: float | None = 1e-2
    norm_constraint: float | None = 1e-4
    noise_samples: int = 10


@dataclass(frozen=True)
class FtmHparams(FinetuneHparams):
    """FT-M (Zhang et al. 2024, arXiv 2401.01286): as ``FinetuneHparams``, without a constraint by default; the loss is
    the mean over the target's tokens."""

    norm_constraint: float | None = None


@dataclass(frozen=True)
class LocftHparams(Hparams):
    """Fine-tuning of one change on all requests (LocFT-BF, arXiv 2509.22072).

    Args:
        epochs: How often all requests are gone through at most.
        minibatch: Requests that a step of Adam is of.
        lr: Learning rate of Adam.
        stop_loss: No step follows a minibatch whose mean loss is below this, and training ends after an epoch whose
            mean is; None: never.
        norm_constraint: As for ``FinetuneHparams``.
        noise_samples: As for ``FinetuneHparams``.
        seed: Of the order of requests, which every epoch draws anew.
    """

    epochs: int = 25
    minibatch: int = 100
    lr: float = 5e-4
    stop_loss: float | None = 1e-2
    norm_constraint: float | None = None
    noise_samples: int = 10
    seed: int = 1
