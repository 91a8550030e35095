"""Published settings of model editing by name: hyperparameters per method and problem, layers, noise (docs/editing.md,
"Hyperparameters").

They stand in ``presets/editing.toml``, each with its source; a user's file has the same form. A preset is named "gptj",
or by the path of such a file: "mine.toml" where it holds one preset, "mine.toml:NAME" where it holds several.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StrictFloat, ValidationError, create_model
from pydantic_core import PydanticCustomError

from causalcone.engine.edit.methods.hparams import Hparams, kinds_of
from causalcone.engine.edit.methods.method import Method
from causalcone.engine.edit.methods.registry import method_named, methods
from causalcone.engine.edit.requests.requests import PROBLEMS
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.options import DEFAULT_SIGMA
from causalcone.runners.checked_files import CheckedTable, Count, complaints, noise_level, read_toml

if TYPE_CHECKING:
    from causalcone.runners.edits.settings import Setting

NEVER = "never"
"""How files write the value None, which TOML does not have."""

AUTO = "auto"
"""What stands for the preset of the model's name."""

TUNED = "tuned"
"""The name of a preset that is written."""

Chosen = tuple[str, "Setting", Iterable[str]]
"""A problem, the setting chosen for it, and the names of what was tuned."""

_Layers = Annotated[
    tuple[Count, ...], Field(min_length=1), AfterValidator(lambda layers: tuple(layer - 1 for layer in layers))
]


def _following(windows: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Refuses names of no method, and layers that are no window."""
    for name, layers in windows.items():
        method_named(name)
        if layers != tuple(range(layers[0], layers[0] + len(layers))):
            raise PydanticCustomError("window", "{name} has layers that do not follow each other", {"name": name})
    return windows


def _by_window(tables: Any) -> Any:
    """The keys of ``finetune.1`` and ``finetune.5`` as numbers."""
    if not isinstance(tables, Mapping):
        return tables
    for key in tables:
        if not re.fullmatch(r"[1-9]\d*", str(key)):
            raise PydanticCustomError(
                "window", "has {key}, where a window is due, as in finetune.1.steps", {"key": repr(key)}
            )
    return {int(key): table for key, table in tables.items()}


_Amount = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
_FIELDS: dict[Any, Any] = {
    int: Count,
    float: _Amount,
    float | None: Annotated[_Amount | None, BeforeValidator(lambda value: None if value == NEVER else value)],
}
"""How a file's value is checked, by the type of the hyperparameter; words by themselves."""


@cache
def _forms(known: tuple[Method, ...]) -> tuple[type[CheckedTable], type[CheckedTable]]:
    """The forms of a preset's defaults (hyperparameters by method) and problems (the same by problem)."""
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for method in known:
        kinds = kinds_of(method.hparams).items()
        fields: dict[str, Any] = {name: (_FIELDS.get(kind, kind), None) for name, kind in kinds}
        form: Any = create_model(method.preset_name, __base__=CheckedTable, **fields)
        defaults[method.preset_name] = (form, None)
        by_window = Annotated[dict[int, form], BeforeValidator(_by_window)]
        settings[method.preset_name] = (by_window if method.by_window else form, None)
    problem: Any = create_model("Problem", __base__=CheckedTable, **settings)
    problems: dict[str, Any] = dict.fromkeys(PROBLEMS, (problem, None))
    return (
        create_model("Defaults", __base__=CheckedTable, **defaults),
        create_model("Problems", __base__=CheckedTable, **problems),
    )


def _checked_by(form: int) -> PlainValidator:
    """Checks a table against the hyperparameters of all methods; what it leaves out stays left out."""
    return PlainValidator(
        lambda table: _forms(tuple(methods().values()))[form].model_validate(table).model_dump(exclude_unset=True)
    )


class Preset(CheckedTable):
    """A preset. ``load_hparams`` puts its hyperparameters together. edit_layers: layers to edit, counted from 0; sigma:
    noise on the subject, as ``Tracer.trace`` takes it; tracing_window: layers of a restored or zeroed window;
    aggregate: which prompts a paraphrase or neighbourhood score is of, as ``analysis.scores`` takes it; windows: the
    window of methods that edit one, in place of edit_layers; defaults: hyperparameters by method; problems: by problem
    and method (and window) what differs from the defaults."""

    edit_layers: _Layers
    sigma: Annotated[float | str, PlainValidator(noise_level)]
    tracing_window: Count
    aggregate: Literal["first", "mean"]
    windows: Annotated[dict[str, _Layers], AfterValidator(_following)] = Field(default_factory=dict)
    defaults: Annotated[dict[str, Any], _checked_by(0)] = Field(default_factory=dict)
    problems: Annotated[dict[str, Any], _checked_by(1)]

    def window_of(self, method: Method) -> Window | None:
        """The window that a method edits where no layers are asked for, if it has one of its own."""
        layers = self.windows.get(method.name, self.windows.get(method.preset_name, ()))
        return Window(layers[len(layers) // 2], len(layers), layers) if layers else None

    def problem_names(self) -> tuple[str, ...]:
        return tuple(problem for problem in PROBLEMS if problem in self.problems)


def preset_names() -> tuple[str, ...]:
    return tuple(_builtin())


def preset_of(model: str) -> str | None:
    """The preset of a model, by the name of its folder or on the hub: "llama-2-7b" of "meta-llama/Llama-2-7b-hf"."""
    plain = _plain(Path(model).name)
    return next((name for name in preset_names() if _plain(name) in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def load_preset(preset: str) -> Preset:
    """The preset of this name, or of a file (see the module). Raises ``ExperimentError`` naming what there is, or the
    key that is wrong."""
    title, table = _table(preset)
    try:
        return Preset.model_validate(table)
    except ValidationError as error:
        raise ExperimentError(f"{title}: {'; '.join(complaints(error))}") from error


def edit_layers(preset: str) -> tuple[int, ...]:
    return load_preset(preset).edit_layers


def load_hparams(preset: str, method: str, problem: str, window: int = 1) -> Hparams:
    """The hyperparameters of ``method`` ("rome", "memit", ...) for ``problem`` ("error_injection", ...). Fine-tuning
    has settings per ``window``; a window without settings takes those of the nearest one that has (the smaller of two
    as near). The other methods have one setting for all windows. Raises ``ExperimentError`` for names that are unknown
    or that the preset has no settings for."""
    kind = method_named(method)
    if window < 1:
        raise ExperimentError(f"window is {window}; give at least one layer")
    loaded = load_preset(preset)
    if problem not in loaded.problems:
        known = ", ".join(loaded.problem_names())
        raise ExperimentError(f"preset {preset!r} has no problem {problem!r}; it has {known}")
    settings = loaded.problems[problem].get(kind.preset_name, {})
    if kind.by_window and settings:
        settings = settings[min(settings, key=lambda size: (abs(size - window), size))]
    return kind.checked(kind.hparams(**{**loaded.defaults.get(kind.preset_name, {}), **settings}))


# --- writing ---


def keys_of(setting: Setting) -> tuple[str, ...]:
    """The keys that a preset has hyperparameters under: the method, and the window where that counts."""
    method = setting.definition
    return (method.preset_name, str(setting.window)) if method.by_window else (method.preset_name,)


def tuned_preset(
    preset: str | None, depth: int, sigma: str, aggregate: str, chosen: Iterable[Chosen]
) -> dict[str, Any]:
    """The table of a preset: that named ``preset``, or one that edits all ``depth`` layers, with what was chosen and
    what noise and prompts it was chosen for."""
    table: dict[str, Any] = {"edit_layers": [*range(1, depth + 1)], "sigma": DEFAULT_SIGMA, "tracing_window": 10}
    if preset is not None:
        table = _writable(load_preset(preset).model_dump(exclude_unset=True))
        table |= {name: _table(preset)[1][name] for name in ("edit_layers", "windows") if name in table}  # from 1
    table |= {"sigma": sigma if sigma.endswith("sd") else float(sigma), "aggregate": aggregate}
    defaults, problems = table.setdefault("defaults", {}), table.setdefault("problems", {})
    for problem, setting, names in chosen:
        method, *window = keys_of(setting)
        usual = {name: None if value == NEVER else value for name, value in defaults.get(method, {}).items()}
        values, unchanged = asdict(setting.hparams), asdict(setting.definition.hparams(**usual))
        differing = {name: value for name, value in values.items() if name in names or value != unchanged[name]}
        settings = problems.setdefault(problem, {})
        if window:
            settings.setdefault(method, {})[window[0]] = _writable(differing)
        else:
            settings[method] = _writable(differing)
    return table


def preset_text(table: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A TOML file with one preset, ``comments`` above it."""
    lines = [f"# {' '.join(comment.split())}\n" for comment in comments]
    return "".join(lines) + tomli_w.dumps({TUNED: table})


def _writable(value: Any) -> Any:
    """The same as TOML has it: keys are texts, None is "never"."""
    if isinstance(value, Mapping):
        return {str(key): _writable(entry) for key, entry in value.items()}
    return NEVER if value is None else value


# --- files ---


def _builtin() -> dict[str, Any]:
    return tomllib.loads(files("causalcone.runners").joinpath("presets/editing.toml").read_text(encoding="utf-8"))


def _table(preset: str) -> tuple[str, Any]:
    file, colon, name = preset.rpartition(".toml:")
    if not colon and not preset.endswith(".toml"):
        presets = _builtin()
        if preset not in presets:
            raise ExperimentError(
                f"there is no preset {preset!r}; choose from {', '.join(presets)}, or give the path of a .toml file"
            )
        return f"preset {preset!r}", presets[preset]
    path = Path(f"{file}.toml" if colon else preset)
    presets = read_toml(path)
    if not colon and len(presets) == 1:
        name = next(iter(presets))
    if name not in presets:
        listed = ", ".join(presets) or "none"
        wanted = f"no preset {name!r}" if colon else "not one preset"
        raise ExperimentError(f"{path} holds {wanted}, but {listed}; name one as {path}:NAME")
    return f"{path}, preset {name!r}", presets[name]
