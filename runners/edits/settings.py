"""What an editing study does, from its options: methods with their windows and hyperparameters, layers and contexts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from causalcone.engine.edit.methods.edits import JOINT_MEMIT
from causalcone.engine.edit.requests.requests import PROBLEMS
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.runners.checked_files import read_text
from causalcone.runners.edits.presets import HPARAMS, Hparams, load_hparams, load_preset
from causalcone.runners.options import EditingOptions

WINDOWS = {"rome": 1, "memit": 5, "memit_joint": 5, "finetune": 1}
"""Layers that a method edits together where nobody says."""

_CONTEXTS_OF = {"rome": "rome", "memit": "memit", "memit_joint": "memit"}
"""By method that needs contexts and second moments: whose contexts it has."""

Layers = str | tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """A method, how many layers it edits together, and its hyperparameters."""

    method: str
    window: int
    hparams: Hparams

    @property
    def joint(self) -> bool:
        """Whether all facts share one change of the weights."""
        return self.method == JOINT_MEMIT

    @property
    def contexts(self) -> str | None:
        """Whose contexts it has, if it has any: ``"rome"`` or ``"memit"``."""
        return _CONTEXTS_OF.get(self.method)

    def __str__(self) -> str:
        return self.method if self.method == "rome" else f"{self.method}:{self.window}"

    @property
    def configuration(self) -> dict[str, Any]:
        return {"method": self.method, "window": self.window, "hparams": asdict(self.hparams)}


@dataclass(frozen=True)
class EditPlan:
    """What can be said of a study without model and facts. layers: numbers from 0, or ``"all"``; sigma: noise on the
    subject; aggregate: which paraphrase and neighbour the summary's scores are of."""

    problem: str
    settings: tuple[Setting, ...]
    layers: Layers
    sigma: str
    aggregate: str

    @property
    def of_moments(self) -> list[Setting]:
        """The settings that need second moments."""
        return [setting for setting in self.settings if setting.contexts]


def plan_of(choice: EditingOptions, aggregate: str | None) -> EditPlan:
    """The checked options, those that are left out filled in from the preset."""
    if choice.problem not in PROBLEMS:
        raise ExperimentError(f"unknown problem {choice.problem!r}; choose from {', '.join(PROBLEMS)}")
    settings = _settings(choice)
    preset = None if choice.preset is None else load_preset(choice.preset)
    layers: Layers = "all" if preset is None else preset.edit_layers
    sigma, which = ("3sd", "first") if preset is None else (str(preset.sigma), preset.aggregate)
    if aggregate not in (None, "first", "mean"):
        raise ExperimentError(f"aggregate is {aggregate!r}; choose first or mean")
    if choice.layers is not None:
        layers = parse_layers(choice.layers)
    return EditPlan(choice.problem, settings, layers, choice.sigma or sigma, aggregate or which)


def parse_layers(layers: str) -> Layers:
    """Numbers, or ``"all"``."""
    if layers.strip() == "all":
        return "all"
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise ExperimentError(f"layers are {layers!r}; give all, or numbers such as 0,4,8") from None


def read_contexts(path: Path) -> Contexts:
    """The contexts of a JSON file, or of the ``run.json`` of an editing study."""
    try:
        found = json.loads(read_text(path))
        if isinstance(found, dict) and "contexts" in found:
            found = found["contexts"]
        if not isinstance(found, dict) or set(found) != {"rome", "memit"} or not all(map(_is_list, found.values())):
            raise ExperimentError('it is not {"rome": [texts], "memit": [texts]}, nor a run.json with contexts')
        return Contexts(**found)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ExperimentError(f"{path} holds no contexts: it is not JSON ({error})") from error
    except ExperimentError as error:
        raise ExperimentError(f"{path} holds no contexts: {error}") from error


def _is_list(found: Any) -> bool:
    return isinstance(found, list)


def _settings(choice: EditingOptions) -> tuple[Setting, ...]:
    if choice.window is not None and not any(method in WINDOWS and method != "rome" for method in choice.method):
        raise ExperimentError(f"--window {choice.window} goes with memit or finetune, and has none to say it of")
    named = [_named(method, choice.window) for method in choice.method]
    repeated = next((each for number, each in enumerate(named) if each in named[:number]), None)
    if repeated is not None:
        raise ExperimentError(f"the method {repeated[0]} with window {repeated[1]} is given twice; give it once")
    changes = [Change.parsed(text) for text in choice.changes or ()]
    settings = []
    for method, window in named:
        if choice.preset is None:
            hparams: Hparams = HPARAMS[method]()
        else:
            hparams = load_hparams(choice.preset, method, choice.problem, window)
        settings.append(Setting(method, window, changed(method, hparams, changes)))
    for change in changes:
        check_known(change, settings)
    return tuple(settings)


def check_known(change: Change, settings: Sequence[Setting]) -> None:
    """Refuse a change of what no setting has."""
    if not any(change.is_of(setting.method, setting.hparams) for setting in settings):
        known = sorted({name for setting in settings for name in asdict(setting.hparams)})
        raise ExperimentError(f"{change}: no chosen method has that hyperparameter; there are {', '.join(known)}")


def _named(text: str, window: int | None) -> tuple[str, int]:
    """A method and its window."""
    method, colon, own = text.partition(":")
    if method not in HPARAMS:
        raise ExperimentError(f"unknown method {method!r}; choose from {', '.join(HPARAMS)}")
    if colon and not (own.isdecimal() and int(own)):
        raise ExperimentError(f"the method {text!r} has no window; give one such as {method}:5, or the method alone")
    size = int(own or 1) if method == "rome" else int(own or window or WINDOWS[method])
    if method == "rome" and size != 1:
        raise ExperimentError(f"ROME edits one layer, not a window of {size}; use memit or finetune")
    return method, size


@dataclass(frozen=True)
class Change:
    """A hyperparameter, given as ``text`` behind ``option``, of one method or (None) of all that have it."""

    text: str
    method: str | None
    name: str
    value: str
    option: str = "--set"

    @classmethod
    def parsed(cls, text: str, option: str = "--set") -> Change:
        key, equals, value = text.partition("=")
        method, dot, name = key.strip().rpartition(".")
        if not equals or not name:
            raise ExperimentError(f"{option} {text!r} is no setting; give NAME=VALUE, such as steps=25 or rome.clamp=4")
        if dot and method not in HPARAMS:
            raise ExperimentError(f"{option} {text}: unknown method {method!r}; choose from {', '.join(HPARAMS)}")
        return cls(text, method or None, name, value.strip(), option)

    def __str__(self) -> str:
        return f"{self.option} {self.text}"

    def is_of(self, method: str, hparams: Hparams) -> bool:
        return self.method in (None, method) and self.name in asdict(hparams)

    def read(self, hparams: Hparams) -> int | float | None:
        whole = get_type_hints(type(hparams))[self.name] is int
        if self.name == "stop_loss" and self.value == "never":
            return None
        try:
            return int(self.value) if whole else float(self.value)
        except ValueError:
            raise ExperimentError(f"{self}: give a {'whole ' if whole else ''}number") from None


def changed(method: str, hparams: Hparams, changes: Sequence[Change]) -> Hparams:
    """The hyperparameters with those of the changes that are of them."""
    own = [change for change in changes if change.is_of(method, hparams)]
    try:
        return replace(hparams, **{change.name: change.read(hparams) for change in own})  # type: ignore[arg-type]
    except CausalconeError as error:
        raise ExperimentError(f"{' '.join(map(str, own))} of {method}: {error}") from error
