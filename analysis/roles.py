"""The role a prompt token plays: its place in or after the subject."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.traces import TraceSource, read_traces

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


def with_roles(table: TraceSource) -> pl.DataFrame:
    """The rows of a traces table with their token's ``role``, an enum in the order of ``ROLES`` (METHODS 3).

    A token can have several roles, and its row then occurs once for each: a subject of one token is both its first
    and its last; a single token after the subject is both the first subsequent and the last; the last subject token
    of a prompt that ends in its subject is also the last. Tokens before the subject, and rows about several tokens
    together, have no role and are left out.
    """
    traces = read_traces(table)
    return pl.concat(
        traces.filter(condition).with_columns(role=pl.lit(role, dtype=pl.Enum(ROLES)))
        for role, condition in _CONDITIONS.items()
    )
