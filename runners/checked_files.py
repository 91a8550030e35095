"""Files that users write, read with plain complaints; tables of TOML files checked with pydantic."""

import json
import math
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from causalcone.engine.errors import CausalconeError, ExperimentError, FactError

STANDARD_INPUT = "-"

Count = Annotated[StrictInt, Field(ge=1)]


class CheckedTable(BaseModel):
    """A table of the file; a key that it cannot have is refused by name. younger: keys that earlier versions did not
    have, which are written where they are set only, so that what was begun without them goes on."""

    model_config = ConfigDict(frozen=True)
    younger: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, table: Any) -> Any:
        known = cls.model_fields
        unknown = [key for key in table if key not in known] if isinstance(table, Mapping) else []
        if unknown:
            names = {"unknown": ", ".join(map(repr, unknown)), "known": ", ".join(known)}
            raise PydanticCustomError("unknown_key", "cannot have {unknown}, only {known}", names)
        return table

    @model_serializer(mode="wrap")
    def _without_silent(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        silent = {key for key in self.younger if getattr(self, key) == fields[key].default}
        return {key: value for key, value in written(self).items() if key not in silent}


def read_text(path: Path, error: type[CausalconeError] = FactError) -> str:
    """The text of a UTF-8 file, or of the standard input, which is called ``-``; raises an ``error`` that says why
    there is none."""
    if path.is_dir():
        raise error(f"{path} is a folder; give a file in it")
    try:
        content = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text (byte {reason.start}); save it as UTF-8") from reason


def parse_json(text: str, path: Path, kind: str = "JSON", line: int = 1) -> Any:
    """The value of a JSON text, which begins at a line of a file. Raises ``FactError`` where it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise FactError(f"{path} is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise FactError(f"{path} is not {kind}: {error.msg} at {place}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ``ExperimentError`` for one that cannot be read."""
    try:
        return tomllib.loads(read_text(path, ExperimentError))
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{path} is not TOML: {error}") from error


def noise_level(value: Any) -> float | str:
    """A level of noise: a number, or a string such as "3sd"."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?sd", value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise PydanticCustomError("sigma", 'must be a number that is not negative, or a string like "3sd"')


PLAINER: Mapping[str, str] = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "greater_than_equal": "must be at least {ge}",
    "too_short": "is empty",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
}
"""Plain words for pydantic's kinds of errors."""


def plainly(problem: Mapping[str, Any], words: Mapping[str, str] = PLAINER) -> str:
    """What is wrong with a value, of pydantic's account of it."""
    if problem["type"] == "value_error":  # of our own, which says it
        return str(problem["ctx"]["error"])
    plainer = words.get(problem["type"])
    return plainer.format(**problem.get("ctx", {})) if plainer else str(problem["msg"])


_ALTERNATIVE = re.compile(r"bool|int|float|str|constrained-.*|.*\[.*")
"""Pydantic adds such names to a key for each of the types that its value may be of."""


def complaints(error: ValidationError) -> Iterator[str]:
    """Complaints about a table, a line for each key."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        keys = [str(key) for key in problem["loc"] if not _ALTERNATIVE.fullmatch(str(key))]
        lines.setdefault(".".join(keys), []).append(plainly(problem))
    for key, texts in lines.items():
        yield f"{key} {', or '.join(dict.fromkeys(texts))}".strip()
