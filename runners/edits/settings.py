"""The plan of an editing study from its options: methods with windows and hyperparameters, layers and contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from causalcone.engine.edit.methods.hparams import Hparams, is_word, kinds_of
from causalcone.engine.edit.methods.method import Method
from causalcone.engine.edit.methods.registry import method_named, methods
from causalcone.engine.edit.requests.windows import as_layers, as_windows
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.errors import CausalconeError, ExperimentError, one_of
from causalcone.engine.localize.options import DEFAULT_SIGMA
from causalcone.engine.schemas import PROBLEMS
from causalcone.runners.checked_files import parse_json, read_text
from causalcone.runners.edits.presets import Preset, load_hparams, load_preset
from causalcone.runners.options import EditMethodOptions

Layers = Literal["all"] | tuple[int, ...]

EDITED, SPREAD, FINETUNED = 1 / 6, 1 / 5, 2 / 3
"""Where most presets have the edited layer, over the number of layers: of methods of one layer, the centre of windows,
of fine-tuning. Those of GPT2-XL are higher, 17 and 13 to 17 of 48."""


@dataclass(frozen=True)
class Setting:
    """A method, how many layers it edits together, its hyperparameters, and the layers, or centres of windows, that are
    its own, if it has any."""

    method: str
    window: int
    hparams: Hparams
    layers: tuple[int, ...] | None = None

    @property
    def definition(self) -> Method:
        return method_named(self.method)

    def __str__(self) -> str:
        return self.method if self.definition.window is None else f"{self.method}:{self.window}"

    @property
    def configuration(self) -> dict[str, Any]:
        own = {} if self.layers is None else {"layers": list(self.layers)}
        return {"method": self.method, "window": self.window, "hparams": asdict(self.hparams), **own}

    def edited(self, layers: Layers, depth: int) -> set[int]:
        """The layers of its windows around ``layers``, or its own."""
        return {layer for window in as_windows(self.layers or layers, self.window, depth) for layer in window.layers}

    def guessed(self, depth: int) -> Setting:
        """The same at the layer where the method works best in most models of the presets, by its relative depth."""
        method = self.definition
        share = FINETUNED if method.rank is None else EDITED if method.window is None else SPREAD
        return replace(self, layers=(min(depth - 1, round(share * depth)),))


def record(hparams: Hparams) -> dict[str, Any]:
    """The hyperparameters that a tuning compares, by name: words only where they are not the default, so that one that
    was begun when there were none goes on."""
    usual = asdict(type(hparams)())
    return {
        name: value for name, value in asdict(hparams).items() if value != usual[name] or not isinstance(value, str)
    }


@dataclass(frozen=True)
class EditPlan:
    """A study as planned without model and facts. layers: numbers from 0, or ``"all"``; sigma: noise on the
    subject; aggregate: which paraphrase and neighbour the summary's scores are of."""

    problem: str
    settings: tuple[Setting, ...]
    layers: Layers
    sigma: str
    aggregate: str

    @classmethod
    def of(
        cls,
        methods: Sequence[str],
        problem: str,
        *,
        layers: Layers | Literal["preset"] = "all",
        preset: str | None = None,
        changes: Sequence[str] = (),
        sigma: str | float | None = None,
        window: int | None = None,
        aggregate: str | None = None,
    ) -> EditPlan:
        """A checked plan. methods: with or without their windows, such as "memit:5"; layers: also those of the
        ``"preset"``; preset: where hyperparameters, noise and aggregate are from; changes: hyperparameters that differ,
        such as "rome.clamp=4"; sigma: a number, or such as "3sd"; window: of methods without their own; aggregate:
        "first" or "mean". Raises ``ExperimentError`` for an argument that cannot be used."""
        one_of("problem", problem, PROBLEMS)
        loaded = None if preset is None else load_preset(preset)
        settings = _settings(methods, problem, window, preset, changes, loaded if layers == "preset" else None)
        if layers == "preset":
            if loaded is None:
                raise ExperimentError("layers are those of a preset, and none is given; give one, or the layers")
            layers = loaded.edit_layers
        one_of("aggregate", aggregate, (None, "first", "mean"))
        noise, which = (DEFAULT_SIGMA, "first") if loaded is None else (loaded.sigma, loaded.aggregate)
        return cls(problem, settings, layers, str(noise if sigma is None else sigma), aggregate or which)

    def layers_of(self, setting: Setting, depth: int) -> tuple[int, ...]:
        """The layers, or centres of windows, that a setting edits in a model."""
        return as_layers(setting.layers or self.layers, depth)

    def guessed(self, depth: int) -> EditPlan:
        """The plan with layers by relative depth."""
        return replace(self, settings=tuple(setting.guessed(depth) for setting in self.settings))

    @property
    def of_moments(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.definition.needs_moments]

    @property
    def of_contexts(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.definition.contexts]


def plan_of(options: EditMethodOptions, problem: str, layers: Layers | None, aggregate: str | None) -> EditPlan:
    """The plan of a command; layers that are not given are the preset's, or all."""
    return EditPlan.of(
        options.method or (),
        problem,
        layers=layers or ("all" if options.preset is None else "preset"),
        preset=options.preset,
        changes=options.changes or (),
        sigma=options.sigma,
        window=options.window,
        aggregate=aggregate,
    )


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
    text = read_text(path)
    try:
        content = parse_json(text, path)
        if isinstance(content, dict) and "contexts" in content:
            content = content["contexts"]
        lists = isinstance(content, dict) and all(isinstance(texts, list) for texts in content.values())
        if not lists or set(content) != {"rome", "memit"}:
            raise ExperimentError('it is not {"rome": [texts], "memit": [texts]}, nor a run.json with contexts')
        return Contexts(**content)
    except CausalconeError as error:
        raise ExperimentError(f"{path} holds no contexts: {error}") from error


def _settings(
    named: Sequence[str],
    problem: str,
    window: int | None,
    preset: str | None,
    changes: Sequence[str],
    layers_of: Preset | None,
) -> tuple[Setting, ...]:
    """layers_of: where methods have windows of their own from."""
    pairs = [_method_and_window(text, window, layers_of) for text in named]
    if window is not None and all(method.window is None for method, _ in pairs):
        known = " or ".join(name for name, method in methods().items() if method.window is not None)
        raise ExperimentError(f"--window {window} applies to methods of several layers; add --method {known}")
    settings: list[Setting] = []
    parsed = [Change.parsed(text) for text in changes]
    for method, size in pairs:
        if any((method.name, size) == (setting.method, setting.window) for setting in settings):
            raise ExperimentError(f"the method {method.name} with window {size} is given twice; give it once")
        hparams = method.checked(None) if preset is None else load_hparams(preset, method.name, problem, size)
        own = None if layers_of is None else layers_of.window_of(method)
        layers = None if own is None else (own.layer,)
        settings.append(Setting(method.name, size, changed(method.name, hparams, parsed), layers))
    for change in parsed:
        check_known(change, settings)
    return tuple(settings)


def check_known(change: Change, settings: Sequence[Setting]) -> None:
    if not any(change.is_of(setting.method, setting.hparams) for setting in settings):
        known = sorted({name for setting in settings for name in asdict(setting.hparams)})
        raise ExperimentError(f"{change}: no chosen method has that hyperparameter; there are {', '.join(known)}")


def _method_and_window(text: str, window: int | None, layers_of: Preset | None) -> tuple[Method, int]:
    name, colon, size = text.partition(":")
    method = method_named(name)
    if colon and not (size.isdecimal() and int(size)):
        raise ExperimentError(f"the method {text!r} has no window; give one such as {name}:5, or the method alone")
    usual = None if method.window is None else window
    if usual is None and layers_of is not None and (own := layers_of.window_of(method)):
        usual = own.size
    return method, method.size(int(size) if size else usual)


@dataclass(frozen=True)
class Change:
    """A hyperparameter, given as ``text`` of ``option``, of one method or (None) of all that have it. value: a text
    that is still to be read, or the value."""

    text: str
    method: str | None
    name: str
    value: str | float | None
    option: str = "--set"

    @classmethod
    def parsed(cls, text: str, option: str = "--set") -> Change:
        key, equals, value = text.partition("=")
        method, dot, name = key.strip().rpartition(".")
        if not equals or not name:
            raise ExperimentError(
                f"{option} {text!r} is not a setting; give NAME=VALUE, such as steps=25 or rome.clamp=4"
            )
        if dot:
            try:
                method_named(method)
            except ExperimentError as error:
                raise ExperimentError(f"{option} {text}: {error}") from None
        return cls(text, method or None, name, value.strip(), option)

    def __str__(self) -> str:
        return f"{self.option} {self.text}"

    def is_of(self, method: str, hparams: Hparams) -> bool:
        return self.method in (None, method) and self.name in kinds_of(type(hparams))

    def read(self, hparams: Hparams) -> int | float | str | None:
        kind = kinds_of(type(hparams))[self.name]
        if not isinstance(self.value, str) or is_word(kind):
            return self.value
        if self.value == "never" and type(None) in get_args(kind):
            return None
        try:
            return int(self.value) if kind is int else float(self.value)
        except ValueError:
            raise ExperimentError(f"{self}: give a {'whole ' if kind is int else ''}number") from None


def changed(method: str, hparams: Hparams, changes: Sequence[Change]) -> Hparams:
    applying = [change for change in changes if change.is_of(method, hparams)]
    try:
        given = replace(hparams, **{change.name: change.read(hparams) for change in applying})
        if given != (meant := method_named(method).checked(given)):
            raise ExperimentError(f"the name stands for {meant}; leave it out, or choose another method")
        return given
    except CausalconeError as error:
        raise ExperimentError(f"{' '.join(map(str, applying))} of {method}: {error}") from error
