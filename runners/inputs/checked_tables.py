"""Tables of TOML files checked with pydantic: unknown keys are refused by name, and complaints are plain."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from causalcone.engine.errors import ExperimentError

Count = Annotated[StrictInt, Field(ge=1)]


class CheckedTable(BaseModel):
    """A table of the file; a key that it cannot have is refused by name."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        known = cls.model_fields
        unknown = [key for key in given if key not in known] if isinstance(given, Mapping) else []
        if unknown:
            named = {"unknown": ", ".join(map(repr, unknown)), "known": ", ".join(known)}
            raise PydanticCustomError("unknown_key", "cannot have {unknown}, only {known}", named)
        return given


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises ``ExperimentError`` for one that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExperimentError(f"{path} does not exist") from None
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{path} is not TOML: {error}") from error


def noise_level(given: Any) -> float | str:
    """A level of noise: a number, or a text such as "3sd"."""
    if isinstance(given, str) and re.fullmatch(r"\d+(\.\d+)?sd", given):
        return given
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < math.inf:
        return float(given)
    raise PydanticCustomError("sigma", 'must be a number that is not negative, or a text like "3sd"')


_PLAINER = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "greater_than_equal": "must be at least {ge}",
    "too_short": "is empty",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
}


_ALTERNATIVE = re.compile(r"bool|int|float|str|constrained-.*|.*\[.*")
"""What pydantic adds to a key's place for each of the types that its value may be of."""


def complaints(error: ValidationError) -> Iterator[str]:
    """What is wrong, key by key."""
    said: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        plainer = _PLAINER.get(problem["type"])
        text = plainer.format(**problem.get("ctx", {})) if plainer else problem["msg"]
        place = [str(part) for part in problem["loc"] if not _ALTERNATIVE.fullmatch(str(part))]
        said.setdefault(".".join(place), []).append(text)
    for key, texts in said.items():
        yield f"{key} {', or '.join(dict.fromkeys(texts))}".strip()
