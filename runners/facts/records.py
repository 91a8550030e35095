"""Records of files as they lie there: JSON, JSON lines, tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalcone.engine.errors import FactError
from causalcone.runners.checked_files import parse_json, read_text
from causalcone.runners.facts.formats.flat import records_of_call

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".parquet": None}
"""Endings of tables, with what separates their columns."""


def is_table(path: Path) -> bool:
    return path.suffix.lower() in _SEPARATORS


def read_records(path: Path) -> list[Any]:
    """The rows of a table, the items of a JSON list, the one object of a file, or one object per line; of the arguments
    of a call of EasyEdit's ``edit``, a record for each prompt."""
    if is_table(path):
        return _read_table(path, _SEPARATORS[path.suffix.lower()])
    text = read_text(path)
    if not text.strip():
        raise FactError(f"{path} is empty")
    try:
        content = parse_json(text, path)
    except FactError as error:
        if getattr(error.__cause__, "msg", "") != "Extra data" or not text.lstrip().startswith("{"):
            raise
        lines = enumerate(text.split("\n"), start=1)
        return [parse_json(line, path, "JSON lines", number) for number, line in lines if line.strip()]
    if isinstance(content, Mapping) and isinstance(content.get("prompts"), list):
        try:
            return records_of_call(content)
        except FactError as error:
            raise FactError(f"{path}: {error}") from None
    return content if isinstance(content, list) else [content]


def _read_table(path: Path, separator: str | None) -> list[Any]:
    import polars as pl

    try:
        table = pl.read_csv(path, separator=separator, infer_schema=False) if separator else pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise FactError(f"{path} cannot be read as a table: {error}") from error
    if table.is_empty():
        raise FactError(f"{path} has no rows")
    return table.to_dicts()


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a record: tables have nulls, and structs of nothing else, where a record has no such key."""
    filled = {key: without_nulls(value) if isinstance(value, Mapping) else value for key, value in row.items()}
    return {key: value for key, value in filled.items() if value is not None and value != {}}
