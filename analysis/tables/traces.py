"""Tables of traces and gradients as polars frames, wherever they come from, and the roles of tokens."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from causalcone.engine import errors, schemas
from causalcone.engine.errors import CausalconeError

Schema: TypeAlias = dict[str, type[pl.DataType]]
TraceSource: TypeAlias = pl.DataFrame | pl.LazyFrame | pa.Table | pa.RecordBatch | str | os.PathLike[str]

_POLARS: dict[pa.DataType, type[pl.DataType]] = {
    pa.string(): pl.String,
    pa.int32(): pl.Int64,
    pa.float64(): pl.Float64,
    pa.bool_(): pl.Boolean,
}


def polars_schema(schema: pa.Schema) -> Schema:
    """The columns of an Arrow table as polars reads them, whole numbers in 64 bits."""
    return {field.name: _POLARS[field.type] for field in schema}


TRACE_SCHEMA = polars_schema(schemas.TRACE_SCHEMA)
GRADIENT_SCHEMA = polars_schema(schemas.GRADIENT_SCHEMA)

State: TypeAlias = tuple[str, str, int]
STATE = ["method", "kind", "window"]
IDENTITY = ["fact_id", *STATE, "layer", "token"]

_token, _start, _end = pl.col("token"), pl.col("subject_start"), pl.col("subject_end")
_last = pl.col("prompt_tokens") - 1
_CONDITIONS: dict[str, pl.Expr] = {
    "first_subject": _token == _start,
    "middle_subject": (_token > _start) & (_token < _end - 1),
    "last_subject": _token == _end - 1,
    "first_subsequent": _token == _end,
    "further": (_token > _end) & (_token < _last),
    "last": _token == _last,
}
ROLES = tuple(_CONDITIONS)

_TOKENS = dict.fromkeys(("p_clean", "p_corrupted", "p_patched"), "answer_tokens")
_ROUNDING = 1e-6

AnswerScore = Literal["product", "mean"]
"""What p of an answer is: the product over its tokens, or their geometric mean."""
ANSWER_SCORES: tuple[AnswerScore, ...] = get_args(AnswerScore)

SMALL = 1e-280
"""Probabilities below this lose digits, or are 0: their logarithms are taken."""


class TableError(CausalconeError):
    """A table lacks columns or rows, or holds what it should not."""


one_of = partial(errors.one_of, error=TableError)


def read_traces(source: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Read a traces table. One row is one restored or zeroed state of one fact (docs/results.md, "traces").

    Layers and tokens count from 0, the subject is the half-open token range ``subject_start`` to ``subject_end``.

    Args:
        source: an Arrow or polars table, a Parquet file, or a folder of such (in depth, in the order of their names).
        answer_score: what p is of answers of several tokens: the ``product`` of their probabilities, or their geometric
            ``mean``, with which ``answer_tokens`` becomes 1 (docs/methods.md, "Answers of several tokens").

    Returns:
        The columns of ``TRACE_SCHEMA``, with probabilities in [0, 1]; further ones are kept.

    Raises:
        TableError: files cannot be read, columns are missing, a number is not a probability, a state occurs twice, or
            the mean is asked for of a table without ``answer_tokens``.
    """
    return once(pl.concat(trace_parts(source, answer_score), how="diagonal"))


def once(traces: pl.DataFrame) -> pl.DataFrame:
    """``traces`` as they are; ``TableError`` names the first state that occurs twice, and so would weigh double."""
    repeated = traces.filter(traces.select(IDENTITY).is_duplicated())
    rows = f"{repeated.height} rows are of states that occur more than once"
    return refuse(repeated, f"{rows}, the first: {in_words(IDENTITY)}", traces)


def refuse(rows: pl.DataFrame, complaint: str, table: pl.DataFrame | None = None) -> pl.DataFrame:
    """``TableError`` of the first of some rows, whose values the complaint names; the table where there are none."""
    if rows.height:
        raise TableError(complaint.format(**rows.row(0, named=True)))
    return rows if table is None else table


def trace_parts(source: TraceSource, answer_score: AnswerScore = "product") -> Iterator[pl.DataFrame]:
    """A traces table piece by piece: the files of a folder one by one, anything else whole."""
    for frame in table_parts(source, TRACE_SCHEMA, "traces table"):
        checked = checked_probabilities(frame, list(_TOKENS), IDENTITY)
        yield by_answer_score(checked, answer_score, _TOKENS, IDENTITY)


def by_answer_score(
    frame: pl.DataFrame, answer_score: AnswerScore, tokens: Mapping[str, str], identity: Sequence[str]
) -> pl.DataFrame:
    """``frame`` as it is for "product". For "mean" p becomes exp(log p / tokens), and tokens, by the column of p, 1."""
    one_of("answer_score", answer_score, ANSWER_SCORES)
    if answer_score == "product":
        small = (pl.col(f"log{p}").is_finite() & (pl.col(f"log{p}") < math.log(SMALL)) for p in tokens)
        if frame.select(pl.any_horizontal(small).any()).item():
            warnings.warn(_TOO_SMALL, stacklevel=2)
        return frame
    untold = pl.any_horizontal(pl.col(p).is_not_null() & pl.col(of).is_null() for p, of in tokens.items())
    refuse(frame.filter(untold), f"{in_words(identity)}: {_UNTOLD}")
    logs = {f"log{p}": (pl.col(f"log{p}") / pl.col(of)).clip(upper_bound=0) for p, of in tokens.items()}
    ones = {of: pl.when(pl.col(of).is_not_null()).then(1).cast(pl.Int64) for of in tokens.values()}
    spreads = {name: pl.lit(None, pl.Float64) for p in tokens if (name := f"{p}_sd") in frame.columns}
    return frame.with_columns(**logs, **{p: logs[f"log{p}"].exp() for p in tokens}, **ones, **spreads)


_TOO_SMALL = (
    "some answers have probabilities below 1e-280: differences of these are 0, while shares of them are right; the "
    "mean per token (--answer-score mean, answer_score='mean') is of ordinary size"
)
_UNTOLD = (
    "the number of the answer's tokens is not known (answer_tokens), of which answer_score='mean' takes the mean; "
    "compute the table again, or take answer_score='product'"
)


def scaled(p: str, top: pl.Expr) -> pl.Expr:
    """A column of probabilities, or where those that it is compared with are all too small, what they are of the
    largest of these, whose logarithm is ``top``: differences over differences stay."""
    over_largest = (pl.col(f"log{p}") - top).exp().fill_nan(0)
    return pl.when(top > math.log(SMALL)).then(pl.col(p)).otherwise(over_largest)


def checked_probabilities(
    frame: pl.DataFrame, columns: Sequence[str], identity: Sequence[str], advice: str = ""
) -> pl.DataFrame:
    """``frame`` with what rounding put above 1 at 1; ``TableError`` names the first number that is not a probability,
    by the row's ``identity``. Nulls may stay."""
    for column in columns:
        wrong = pl.col(column).is_nan() | (pl.col(column) < 0) | (pl.col(column) > 1 + _ROUNDING)
        complaint = f"{in_words(identity)}: {column} is {{{column}}}, which is not a probability{advice}"
        refuse(frame.filter(wrong), complaint)
    return frame.with_columns(pl.col(columns).clip(upper_bound=1))


def rows_of(frame: pl.DataFrame, state: State) -> pl.DataFrame:
    return frame.filter(**dict(zip(STATE, state, strict=True)))


def in_words(columns: Sequence[str]) -> str:
    """Names and values of a row's columns, for ``refuse``."""
    return ", ".join(f"{name} {{{name}}}" for name in columns)


def read_gradients(source: TraceSource) -> pl.DataFrame:
    """Read a table of integrated gradients (docs/results.md, "gradients").

    Args:
        source: any that ``read_traces`` takes.

    Returns:
        The columns of ``GRADIENT_SCHEMA``; further ones are kept.

    Raises:
        TableError: files cannot be read, or columns are missing.
    """
    return pl.concat(table_parts(source, GRADIENT_SCHEMA, "table of gradients"), how="diagonal")


def single_tokens(traces: pl.DataFrame) -> pl.DataFrame:
    """The rows about one token each; an error where there are only rows of several tokens restored together."""
    single = traces.filter(pl.col("token").is_not_null())
    if single.is_empty() and not traces.is_empty():
        raise TableError(
            "the table is of several tokens restored together, which have no place or role of their own; "
            "see joint_effects and plot.joint_effect"
        )
    return single


def with_roles(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """The rows of a traces table by the role of their token (docs/methods.md, "What follows from the tables").

    A row occurs once for each role of its token: a subject of one token is both its first and its last, a single token
    after it both the first subsequent and the last, the last subject token of a prompt that ends there also the last.
    Tokens before the subject, and rows about several tokens together, have no role and are left out.

    Args:
        table: traces, as ``read_traces`` takes them.
        answer_score: that of ``read_traces``.

    Returns:
        The rows with a column ``role``, an enum in the order of ``ROLES``.
    """
    traces = read_traces(table, answer_score)
    return pl.concat(
        traces.filter(condition).with_columns(role=pl.lit(role, dtype=pl.Enum(ROLES)))
        for role, condition in _CONDITIONS.items()
    )


def table_parts(source: TraceSource, schema: Schema, name: str) -> Iterator[pl.DataFrame]:
    """A table piece by piece with the columns of ``schema``; name: of the table, for messages."""
    if isinstance(source, str | os.PathLike):
        for file in parquet_files(Path(source)):
            yield _conform(_read_parquet(file), schema, f"{file} is not a {name}")
        return
    if isinstance(source, pl.LazyFrame):
        source = source.collect()
    if isinstance(source, pa.Table | pa.RecordBatch):
        source = pl.DataFrame(source)
    if not isinstance(source, pl.DataFrame):
        raise TableError(f"a {name} cannot be a {type(source).__name__}; give an Arrow or polars table or a path")
    yield _conform(source, schema, f"the table is not a {name}")


def _conform(frame: pl.DataFrame, schema: Schema, complaint: str) -> pl.DataFrame:
    """The frame with the schema's columns and types; those that are younger than the table are filled."""
    lacking = [column for column in schema if column not in frame.columns]
    missing = [column for column in lacking if column not in schemas.ADDED]
    if missing:
        raise TableError(f"{complaint}: it lacks {', '.join(missing)}")
    try:
        typed = frame.with_columns(pl.lit(None).alias(column) for column in lacking).cast(schema)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{complaint}: {error}") from error
    logs = [column for column in schema if column.startswith("logp_")]
    p = {column: pl.col(column.removeprefix("log")).clip(upper_bound=1) for column in logs}
    return typed.with_columns(pl.coalesce(column, p[column].log()).alias(column) for column in logs)


def scan_folder(folder: Path) -> pl.LazyFrame:
    """All Parquet files below a folder in the order of their names; columns that some of them lack are null there.
    Polars would take brackets in a path for a pattern."""
    alike = groupby(parquet_files(folder), _columns)
    return pl.concat([pl.scan_parquet(list(files), glob=False) for _, files in alike], how="diagonal")


def _columns(file: Path) -> list[str]:
    """Names of a file's columns; ``TableError`` for a file of a later version, or one that cannot be read."""
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{file} is not a Parquet file that can be read: {error}") from error
    schemas.refuse_newer(int((footer.metadata or {}).get(schemas.VERSION_KEY, 1)), file, TableError)
    return list(footer.schema.names)


def _read_parquet(file: Path) -> pl.DataFrame:
    _columns(file)
    try:
        return pl.read_parquet(file, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TableError(f"{file} is not a Parquet file that can be read: {error}") from error


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files below a folder in the order of their names, or a single file."""
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise TableError(f"the folder {path} holds no .parquet file")
        return files
    if not path.exists():
        raise TableError(f"{path} does not exist")
    return [path]
