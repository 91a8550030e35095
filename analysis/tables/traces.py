"""Tables of results as polars frames, wherever they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import polars as pl
import pyarrow as pa

from causalcone.engine import schemas
from causalcone.engine.errors import CausalconeError

Schema: TypeAlias = dict[str, type[pl.DataType]]

_POLARS: dict[pa.DataType, type[pl.DataType]] = {pa.string(): pl.String, pa.int32(): pl.Int64, pa.float64(): pl.Float64}


def polars_schema(schema: pa.Schema) -> Schema:
    """The columns of an Arrow table as polars reads them, whole numbers in 64 bits."""
    return {field.name: _POLARS[field.type] for field in schema}


TRACE_SCHEMA = polars_schema(schemas.TRACE_SCHEMA)
GRADIENT_SCHEMA = polars_schema(schemas.GRADIENT_SCHEMA)
STATE = ["method", "kind", "window"]
IDENTITY = ["fact_id", *STATE, "layer", "token"]

_PROBABILITIES = ("p_clean", "p_corrupted", "p_patched")
_ROUNDING = 1e-6

TraceSource: TypeAlias = pl.DataFrame | pl.LazyFrame | pa.Table | pa.RecordBatch | str | os.PathLike[str]


class TableError(CausalconeError):
    """A table that lacks columns or rows, or holds what it should not."""


def read_traces(source: TraceSource) -> pl.DataFrame:
    """A traces table as a polars frame with the columns of ``TRACE_SCHEMA`` (further ones are kept).

    ``source`` is an Arrow table or record batch, a polars frame, a Parquet file, or a folder of Parquet files
    (searched in depth, read in the order of their names). One row is one restored state of one fact; probabilities
    are in [0, 1], layers and tokens count from 0, the subject is the half-open token range ``subject_start`` to
    ``subject_end``. Raises ``TableError`` for files that cannot be read, missing columns, numbers that are no
    probabilities, and states that occur twice.
    """
    return once(pl.concat(trace_parts(source), how="diagonal"))


def once(traces: pl.DataFrame) -> pl.DataFrame:
    """``traces`` as they are; ``TableError`` names the first state that occurs twice, and so would weigh double."""
    repeated = traces.filter(traces.select(IDENTITY).is_duplicated())
    if repeated.height:
        first = _named(repeated.select(IDENTITY).row(0, named=True))
        raise TableError(f"{repeated.height} rows are of states that occur more than once, the first: {first}")
    return traces


def trace_parts(source: TraceSource) -> Iterator[pl.DataFrame]:
    """A traces table piece by piece: the files of a folder one by one, anything else whole."""
    for part in _parts(source, TRACE_SCHEMA, "traces table"):
        yield checked_probabilities(part, _PROBABILITIES, IDENTITY)


def checked_probabilities(
    frame: pl.DataFrame, columns: Sequence[str], identity: Sequence[str], advice: str = ""
) -> pl.DataFrame:
    """``frame`` with what rounding put above 1 at 1; ``TableError`` names the first number that is no probability, by
    the row's ``identity``. Nulls may stay."""
    for column in columns:
        value = pl.col(column)
        wrong = frame.filter(value.is_nan() | (value < 0) | (value > 1 + _ROUNDING))
        if wrong.height:
            row = wrong.row(0, named=True)
            where = _named({name: row[name] for name in identity})
            raise TableError(f"{where}: {column} is {row[column]}, which is no probability{advice}")
    return frame.with_columns(pl.col(columns).clip(upper_bound=1))


def one_of(name: str, given: object, known: Sequence[str]) -> None:
    """Refuse an option that is not known."""
    if given not in known:
        raise TableError(f"{name} is {given!r}; choose from {', '.join(known)}")


def _named(row: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def read_gradients(source: TraceSource) -> pl.DataFrame:
    """A table of integrated gradients as a polars frame with the columns of ``GRADIENT_SCHEMA`` (further ones are
    kept), from any source that ``read_traces`` takes."""
    return pl.concat(_parts(source, GRADIENT_SCHEMA, "table of gradients"), how="diagonal")


def single_tokens(traces: pl.DataFrame) -> pl.DataFrame:
    """The rows about one token each; an error where there are only rows of several tokens restored together."""
    single = traces.filter(pl.col("token").is_not_null())
    if single.is_empty() and not traces.is_empty():
        raise TableError(
            "the table is of several tokens restored together, which have no place or role of their own; "
            "see joint_effects and plot.joint_effect"
        )
    return single


def _parts(source: TraceSource, schema: Schema, what: str) -> Iterator[pl.DataFrame]:
    if isinstance(source, str | os.PathLike):
        for file in parquet_files(Path(source)):
            yield _conform(_read_parquet(file), schema, f"{file} is no {what}")
        return
    if isinstance(source, pl.LazyFrame):
        source = source.collect()
    if isinstance(source, pa.Table | pa.RecordBatch):
        source = pl.DataFrame(source)
    if not isinstance(source, pl.DataFrame):
        raise TableError(f"a {what} cannot be a {type(source).__name__}; give an Arrow or polars table or a path")
    yield _conform(source, schema, f"the table is no {what}")


def _conform(frame: pl.DataFrame, schema: Schema, complaint: str) -> pl.DataFrame:
    missing = [column for column in schema if column not in frame.columns]
    if missing:
        raise TableError(f"{complaint}: it lacks {', '.join(missing)}")
    try:
        return frame.cast(schema)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{complaint}: {error}") from error


def scan_folder(folder: Path) -> pl.LazyFrame:
    """All Parquet files below a folder as they are, in the order of their names. Polars would take brackets in a path
    for a pattern."""
    return pl.scan_parquet(parquet_files(folder), glob=False)


def _read_parquet(file: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(file, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TableError(f"{file} is no Parquet file that can be read: {error}") from error


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files below a folder in the order of their names, or the one that is given."""
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise TableError(f"the folder {path} holds no .parquet file")
        return files
    if not path.exists():
        raise TableError(f"{path} does not exist")
    return [path]
