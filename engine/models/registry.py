"""Families of models by the ``model_type`` of their config: built in, registered, or brought by installed packages."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture

GROUP = "causalcone.families"
"""The group of entry points in which packages bring families: a ``model_type``, and its ``Architecture``."""

Family = TypeVar("Family", bound=type[Architecture])

_FAMILIES: dict[str, type[Architecture]] = {}


def register(model_type: str) -> Callable[[Family], Family]:
    """Make a class the architecture of models whose config has this ``model_type``."""

    def registered(family: Family) -> Family:
        _FAMILIES[model_type] = family
        return family

    return registered


def families() -> Mapping[str, type[Architecture]]:
    """All families by ``model_type``. Raises ``ModelError`` naming an entry point that cannot be used."""
    _load_entry_points()
    return _FAMILIES


def family_of(model_type: str) -> type[Architecture]:
    """The family of this name. Raises ``ModelError`` naming those that are supported where there is none."""
    if model_type not in _FAMILIES and model_type not in families():
        supported = ", ".join(sorted(_FAMILIES))
        raise ModelError(f"the architecture {model_type!r} is not supported; supported are: {supported}")
    return _FAMILIES[model_type]


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=GROUP):
        try:
            family = point.load()
        except Exception as error:
            raise ModelError(f"the family {point.name!r} ({GROUP}: {point.value}) cannot be loaded: {error}") from error
        if not (isinstance(family, type) and issubclass(family, Architecture)):
            raise ModelError(f"the family {point.name!r} ({GROUP}: {point.value}) is not an Architecture")
        _FAMILIES.setdefault(point.name, family)
