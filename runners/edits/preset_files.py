"""Writing a preset: a file that ``presets`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from causalcone.runners.edits.presets import HPARAMS, SETTINGS_OF, load_preset
from causalcone.runners.edits.settings import Setting

NAME = "tuned"
WITHOUT_PRESET: dict[str, Any] = {"sigma": "3sd", "tracing_window": 10, "aggregate": "first"}
"""What a preset says where none is begun from: the defaults of tracing and editing."""

Chosen = tuple[str, Setting, Iterable[str]]
"""A problem, the setting chosen for it, and the names of what was chosen."""


def place_of(setting: Setting) -> tuple[str, ...]:
    """The keys that a preset has the setting's values under: its method, and its window where that counts."""
    method = SETTINGS_OF.get(setting.method, setting.method)
    return (method, str(setting.window)) if method == "finetune" else (method,)


def tuned_preset(
    preset: str | None, depth: int, sigma: str, aggregate: str, chosen: Iterable[Chosen]
) -> dict[str, Any]:
    """The table of a preset: that named ``preset``, or one that edits all ``depth`` layers, with what was chosen and
    what noise and prompts it was chosen for."""
    table = {**WITHOUT_PRESET, "edit_layers": range(1, depth + 1)} if preset is None else _table(preset)
    table |= {"sigma": sigma if sigma.endswith("sd") else float(sigma), "aggregate": aggregate}
    defaults, problems = table.setdefault("defaults", {}), table.setdefault("problems", {})
    for problem, setting, names in chosen:
        *methods, last = place_of(setting)
        place = problems.setdefault(problem, {})
        for method in methods:
            place = place.setdefault(method, {})
        place[last] = _values(setting, defaults.get(methods[0] if methods else last, {}), names)
    return table


def preset_text(table: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A TOML file with one preset, ``comments`` above it."""
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines.append(f"[{NAME}]")
    lines += [f"{key} = {_value(table[key])}" for key in ("edit_layers", "sigma", "tracing_window", "aggregate")]
    sections = {"defaults": table["defaults"]}
    sections |= {f"problems.{problem}": settings for problem, settings in table["problems"].items()}
    for heading, settings in sections.items():
        lines += ["", f"[{NAME}.{heading}]", *(f"{key} = {_value(value)}" for key, value in _dotted(settings))]
    return "\n".join(lines) + "\n"


def _table(preset: str) -> dict[str, Any]:
    """The preset as its file has it."""
    table = load_preset(preset).model_dump(exclude_unset=True)
    problems = table["problems"].items()
    return {
        **table,
        "edit_layers": [layer + 1 for layer in table["edit_layers"]],
        "problems": {problem: _with_texts_as_keys(settings) for problem, settings in problems if settings is not None},
    }


def _with_texts_as_keys(settings: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(key): _with_texts_as_keys(value) if isinstance(value, Mapping) else value for key, value in settings.items()
    }


def _values(setting: Setting, defaults: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What was chosen, and all else that differs from the preset's defaults."""
    usual = asdict(HPARAMS[setting.method](**defaults))
    return {name: value for name, value in asdict(setting.hparams).items() if name in names or value != usual[name]}


def _dotted(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of tables in tables, with their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _value(value: Any) -> str:
    """A value in TOML's form; None is how a preset's "never" is read."""
    if value is None:
        return '"never"'
    return repr(value) if isinstance(value, int | float) else json.dumps(value if isinstance(value, str) else [*value])
