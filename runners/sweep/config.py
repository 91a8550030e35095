"""Reads the configuration of a sweep: a TOML file or the name of a preset, checked key by key."""

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from causalcone.engine.errors import ExperimentError
from causalcone.engine.memory import parse_bytes
from causalcone.runners.checked_files import complaints, read_toml
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.stages import as_sweep, stage_types, stages_of
from causalcone.runners.sweep.stages.stage import errors_of


def sweep_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def load_sweep(preset: str, changes: Sequence[str] = ()) -> Sweep:
    """The sweep of a preset's name, or of a TOML file, with changes such as "edit.layers=[0, 4]".

    Raises ``ExperimentError`` naming the key that is wrong and what it may be.
    """
    if preset.endswith(".toml"):
        named, table = preset, read_toml(Path(preset))
    elif preset in sweep_names():
        named = f"preset {preset!r}"
        table = tomllib.loads(_presets().joinpath(f"{preset}.toml").read_text(encoding="utf-8"))
    else:
        raise ExperimentError(
            f"there is no sweep {preset!r}; choose from {', '.join(sweep_names())}, or give the path of a .toml file"
        )
    for change in changes:
        _apply(table, change)
    try:
        sweep = as_sweep(table)
    except ValidationError as error:
        raise ExperimentError(f"{named}: {'; '.join(dict.fromkeys(complaints(error)))}") from error
    _check(named, sweep)
    return sweep


def _presets() -> Any:
    return files("causalcone.runners").joinpath("presets/sweeps")


def _apply(table: dict[str, Any], change: str) -> None:
    """Set a key, in tables of tables, to a value in TOML's form; any other value is a text."""
    key, equals, value = change.partition("=")
    *folders, last = [part.strip() for part in key.split(".")]
    if not equals or not all([*folders, last]):
        raise ExperimentError(f"--set {change!r} is not a setting; give KEY=VALUE, such as edit.layers=[0,4]")
    for folder in folders:
        table = table.setdefault(folder, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {change}: {folder} is not a table, and has no {last}")
    text = value.strip()
    if text == "none":
        table.pop(last, None)
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _check(named: str, sweep: Sweep) -> None:
    """Refuse what can be seen to be wrong without model and facts."""
    with errors_of(named):
        if sweep.memory is not None:
            with errors_of("memory"):
                parse_bytes(sweep.memory)
        if len(sweep.moments.sources) > 1:
            raise ExperimentError(f"moments: {' and '.join(sweep.moments.sources)} are both given; give one of the two")
        if not sweep.moments.sources and sweep.moments.tokens == "all":
            raise ExperimentError("moments.tokens is all; a model writes texts without end, so give a number, or texts")
        if sweep.moments.dataset_config is not None and sweep.moments.dataset is None:
            raise ExperimentError("moments.dataset_config goes with moments.dataset; name the data set")
        if all(getattr(sweep, name, None) is None for name in stage_types()):
            raise ExperimentError(f"there is nothing to do; give one of {', '.join(stage_types())}")
        stages_of(sweep)
