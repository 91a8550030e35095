"""The public API, the command line with its help, and the names in the documentation are still there."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import typer
from helpers.guards import HERE, differences, run, snapshot
from typer.testing import CliRunner

import causalcone as cc
from causalcone import analysis

# --- names in Python ---


def documented_signature(thing: Any) -> list[list[str]] | str:
    """Parameters of a function or class: name, kind, annotation and default, without the modules of types."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "none"
    rows = [
        [each.name, each.kind.name, _plain(each.annotation), _plain(each.default)]
        for each in signature.parameters.values()
    ]
    return [*rows, ["return", "", _plain(signature.return_annotation), ""]]


def _plain(value: Any) -> str:
    """A text of a value or annotation that does not tell where its types live."""
    if value is inspect.Parameter.empty:
        return ""
    text = (
        value if isinstance(value, str) else inspect.formatannotation(value) if isinstance(value, type) else repr(value)
    )
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", re.sub(r" at 0x[0-9a-f]+", "", text))


def api() -> dict[str, Any]:
    """Every public name: what it is, its parameters, and those of its public methods."""
    found: dict[str, Any] = {}
    for name in cc.__all__:
        thing = getattr(cc, name)
        if isinstance(thing, ModuleType):
            own = {
                key: documented_signature(value)
                for key, value in sorted(vars(thing).items())
                if inspect.isfunction(value) and not key.startswith("_") and _is_public_in(thing, key, value)
            }
            found[name] = {"kind": "module", "functions": own}
        elif inspect.isclass(thing):
            found[name] = {
                "kind": "class",
                "signature": documented_signature(thing),
                "fields": sorted(getattr(thing, "__dataclass_fields__", {})),
                "methods": {key: _member(thing, key) for key in sorted(dir(thing)) if _is_own(thing, key)},
            }
        else:
            found[name] = {"kind": "function", "signature": documented_signature(thing)}
    return {"names": list(cc.__all__), "version": cc.__version__, "members": found, "analysis": _analysis_api()}


def _analysis_api() -> dict[str, Any]:
    functions = {name: getattr(analysis, name) for name in analysis.__all__}
    own = {name: documented_signature(each) for name, each in functions.items() if inspect.isfunction(each)}
    return {"names": list(analysis.__all__), "functions": own}


def _is_public_in(module: ModuleType, name: str, function: Any) -> bool:
    """Those that the module says are public, or else its own and those it takes from other modules of analysis."""
    listed = getattr(module, "__all__", None)
    return name in listed if listed is not None else function.__module__.startswith("causalcone")


def _is_own(cls: type, name: str) -> bool:
    return not name.startswith("_") and any(
        name in vars(base) for base in cls.__mro__ if base.__module__.startswith("causalcone")
    )


def _member(cls: type, name: str) -> Any:
    member = inspect.getattr_static(cls, name)
    if isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
        return documented_signature(getattr(cls, name))
    return "attribute"


def test_the_public_api_is_still_there():
    """Names, parameters, annotations and defaults of functions, classes and their methods. What has been changed with
    intent is written anew by ``make_artifacts.py --api``."""
    told = differences(json.loads(json.dumps(api())), snapshot("api.json"))
    assert not told, "\n".join(told)


# --- the command line ---


def app() -> typer.Typer:
    """What ``python -m causalcone`` calls."""
    found = []
    with patch.object(typer.Typer, "__call__", lambda self, *_, **__: found.append(self)):
        run()
    return found[0]


def commands() -> dict[str, Any]:
    """Every command: its arguments and options with names, types, defaults and help."""
    group: Any = typer.main.get_command(app())
    return {name: _command(command) for name, command in group.commands.items()}


def _command(command: Any) -> dict[str, Any]:
    if hasattr(command, "commands"):
        return {name: _command(each) for name, each in command.commands.items()}
    told = {}
    for each in command.params:
        told[each.name] = {
            "kind": each.param_type_name,
            "names": [*each.opts, *each.secondary_opts],
            "type": _type_of(each),
            "default": repr(each.default() if callable(each.default) else each.default),
            "required": each.required,
            "several": getattr(each, "multiple", False) or each.nargs != 1,
            "flag": getattr(each, "is_flag", False),
            "help": getattr(each, "help", None),
        }
    return {"help": " ".join((command.help or "").split()), "parameters": told}


def _type_of(parameter: Any) -> str:
    """The type of a parameter, as typer has it by itself or on top of click."""
    described = getattr(parameter, "type_descriptor", None)
    if described is None:
        return str(parameter.type.name)
    return _plain(described.annotation)


def help_texts() -> dict[str, str]:
    """What ``--help`` prints of every command, 120 columns wide, without the boxes."""
    own = app()
    group: Any = typer.main.get_command(own)

    def names(command: Any, before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield before
        for name, each in getattr(command, "commands", {}).items():
            yield from names(each, (*before, name))

    env = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    found = {}
    for path in names(group, ()):
        result = CliRunner().invoke(own, [*path, "--help"], env=env)
        assert result.exit_code == 0, path
        lines = (
            re.sub(" {3,}", "  ", re.sub(r"[^\x20-\x7e]", " ", line)).rstrip() for line in result.output.splitlines()
        )
        found[" ".join(path)] = "\n".join(filter(None, lines))
    return found


def test_the_command_line_is_still_there():
    """Commands, their options, types, defaults and help."""
    told = differences(json.loads(json.dumps(commands())), snapshot("commands.json"))
    assert not told, "\n".join(told)


def test_help_names_the_options_that_it_named():
    found = help_texts()
    for name, text in snapshot("help.json")["texts"].items():
        options = {word for word in text.split() if re.fullmatch(r"--[a-z][a-z-]*", word)}
        assert options <= set(found[name].split()), name


# --- names in the documentation ---


def resolved(name: str) -> Any:
    """What a dotted name stands for: the longest beginning that is a module, and attributes from there on."""
    pieces = name.split(".")
    for length in range(len(pieces), 0, -1):
        module = ".".join(pieces[:length])
        try:
            thing = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
            continue
        for attribute in pieces[length:]:
            thing = getattr(thing, attribute)
        return thing
    raise ModuleNotFoundError(name)


def test_documented_names_are_there():
    """Every name that a page takes can be imported, the old ones too."""
    names = json.loads((HERE / "documented_names.json").read_text(encoding="utf-8"))["names"]
    lacking = []
    for name, places in names.items():
        try:
            resolved(name)
        except (ImportError, AttributeError) as error:
            lacking.append(f"{name} ({', '.join(places)}): {error}")
    assert len(names) > 60
    assert not lacking, "\n".join(lacking)
