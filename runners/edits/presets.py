"""Published settings of model editing by name: hyperparameters per method and problem, layers, noise (METHODS 4).

They stand in ``presets/editing.toml``, each with its source; a file of one's own has the same form. A preset is named
"gptj", or by the path of such a file: "mine.toml" where it holds one preset, "mine.toml:NAME" where it holds several.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictFloat,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from causalcone.engine.edit.methods.hparams import FinetuneHparams, MemitHparams, RomeHparams
from causalcone.engine.errors import ExperimentError
from causalcone.runners.checked_files import CheckedTable, Count, complaints, noise_level, read_toml

Hparams = RomeHparams | MemitHparams | FinetuneHparams

HPARAMS: dict[str, type[Hparams]] = {
    "rome": RomeHparams,
    "memit": MemitHparams,
    "memit_joint": MemitHparams,
    "finetune": FinetuneHparams,
}

SETTINGS_OF = {"memit_joint": "memit"}
"""Methods that have the settings of another."""


def _never(given: Any) -> Any:
    return None if given == "never" else given


def _from_zero(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer - 1 for layer in layers)


def _by_window(given: Any) -> Any:
    """The keys of ``finetune.1`` and ``finetune.5`` as numbers."""
    if not isinstance(given, Mapping):
        return given
    for key in given:
        if not re.fullmatch(r"[1-9]\d*", str(key)):
            raise PydanticCustomError(
                "window", "has {key}, where a window is due, as in finetune.1.steps", {"key": repr(key)}
            )
    return {int(key): value for key, value in given.items()}


Amount = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
StopLoss = Annotated[Amount | None, BeforeValidator(_never)]


class _Optimised(CheckedTable):
    steps: Count | None = None
    lr: Amount | None = None
    stop_loss: StopLoss = None


class _Rome(_Optimised):
    kl_factor: Amount | None = None
    weight_decay: Amount | None = None
    clamp: Amount | None = None


class _Memit(_Rome):
    covariance_weight: Amount | None = None


class _Finetune(_Optimised):
    norm_constraint: Amount | None = None
    noise_samples: Count | None = None


class _Defaults(CheckedTable):
    rome: _Rome = _Rome()
    memit: _Memit = _Memit()
    finetune: _Finetune = _Finetune()


class _Problem(CheckedTable):
    rome: _Rome = _Rome()
    memit: _Memit = _Memit()
    finetune: Annotated[dict[int, _Finetune], BeforeValidator(_by_window)] = Field(default_factory=dict)


class _Problems(CheckedTable):
    error_injection: _Problem | None = None
    tracing_reversal: _Problem | None = None
    fact_erasure: _Problem | None = None
    fact_amplification: _Problem | None = None
    fact_forcing: _Problem | None = None


class Preset(CheckedTable):
    """What a preset says besides hyperparameters, which ``load_hparams`` puts together.

    edit_layers: layers to edit, counted from 0; sigma: noise on the subject, as ``Tracer.trace`` takes it;
    tracing_window: layers of a restored or zeroed window; aggregate: which prompts a paraphrase or neighbourhood score
    is of, as ``analysis.scores`` takes it.
    """

    edit_layers: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_from_zero)]
    sigma: Annotated[float | str, PlainValidator(noise_level)]
    tracing_window: Count
    aggregate: Literal["first", "mean"]
    defaults: _Defaults = _Defaults()
    problems: _Problems

    def problem_names(self) -> tuple[str, ...]:
        """The problems that the preset has settings for."""
        return tuple(name for name, settings in self.problems if settings is not None)


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    return tuple(_builtin())


def load_preset(preset: str) -> Preset:
    """The preset of this name, or of a file (see the module). Raises ``ExperimentError`` naming what there is, or the
    key that is wrong."""
    named, table = _table(preset)
    try:
        return Preset.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{named}: {'; '.join(complaints(error))}") from error


def edit_layers(preset: str) -> tuple[int, ...]:
    """The layers that the preset edits, counted from 0."""
    return load_preset(preset).edit_layers


def load_hparams(preset: str, method: str, problem: str, window: int = 1) -> Hparams:
    """The hyperparameters of ``method`` ("rome", "memit", "memit_joint" or "finetune") for ``problem``
    ("error_injection", ...).

    Fine-tuning has settings per ``window``; a window without its own takes those of the nearest one that has (the
    smaller of two as near). The other methods have one setting for all windows.
    Raises ``ExperimentError`` for names that are unknown or that the preset has no settings for.
    """
    if method not in HPARAMS:
        raise ExperimentError(f"there is no editing method {method!r}; choose from {', '.join(HPARAMS)}")
    if window < 1:
        raise ExperimentError(f"window is {window}; give at least one layer")
    chosen = load_preset(preset)
    settings = getattr(chosen.problems, problem, None) if problem in _Problems.model_fields else None
    if settings is None:
        raise ExperimentError(
            f"preset {preset!r} has no problem {problem!r}; it has {', '.join(chosen.problem_names())}"
        )
    named = SETTINGS_OF.get(method, method)
    own = getattr(settings, named)
    if method == "finetune":
        own = own[min(own, key=lambda size: (abs(size - window), size))] if own else _Finetune()
    values = getattr(chosen.defaults, named).model_dump(exclude_unset=True) | own.model_dump(exclude_unset=True)
    return HPARAMS[method](**values)


def _builtin() -> dict[str, Any]:
    return tomllib.loads(files("causalcone.runners").joinpath("presets/editing.toml").read_text(encoding="utf-8"))


def _table(preset: str) -> tuple[str, Any]:
    """What to call a preset in messages, and its table."""
    file, chosen, name = preset.rpartition(".toml:")
    if not chosen and not preset.endswith(".toml"):
        presets = _builtin()
        if preset not in presets:
            raise ExperimentError(
                f"there is no preset {preset!r}; choose from {', '.join(presets)}, or give the path of a .toml file"
            )
        return f"preset {preset!r}", presets[preset]
    path = Path(f"{file}.toml" if chosen else preset)
    presets = read_toml(path)
    if not chosen and len(presets) == 1:
        name = next(iter(presets))
    if name not in presets:
        listed = ", ".join(presets) or "none"
        wanted = f"no preset {name!r}" if chosen else "not one preset"
        raise ExperimentError(f"{path} holds {wanted}, but {listed}; name one as {path}:NAME")
    return f"{path}, preset {name!r}", presets[name]
