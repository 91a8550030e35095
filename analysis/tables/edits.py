"""Tables of editing as polars frames: edits, the prompts they were scored on, and metrics of generated texts."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.traces import (
    Schema,
    TableError,
    TraceSource,
    _parts,
    checked_probabilities,
    polars_schema,
)
from causalcone.engine import schemas

EDIT_SCHEMA = polars_schema(schemas.EDIT_SCHEMA)
PROBE_SCHEMA = polars_schema(schemas.PROBE_SCHEMA)
METRIC_SCHEMA = polars_schema(schemas.METRIC_SCHEMA)

_PROBABILITIES = ("p_pre", "p_post", "p_pre_other", "p_post_other")


def read_edits(source: TraceSource) -> pl.DataFrame:
    """A table of edits with the columns of ``EDIT_SCHEMA`` (further ones are kept), from any source that
    ``read_traces`` takes. One row is one edit; its ``status`` is "done" or "failed", and then ``reason`` says why.

    Raises ``TableError`` for files that cannot be read, missing columns, another status, and edits that occur twice.
    """
    edits = _read(source, EDIT_SCHEMA, "table of edits", ["edit_id"])
    strange = edits.filter(pl.col("status").is_in(["done", "failed"]).not_().fill_null(True))
    if strange.height:
        edit, status = strange.select("edit_id", "status").row(0)
        raise TableError(f"edit {edit!r} has the status {status!r}; it must be 'done' or 'failed'")
    return edits


def read_probes(source: TraceSource) -> pl.DataFrame:
    """A table of probes with the columns of ``PROBE_SCHEMA``, as ``read_edits`` reads edits.

    One row is one prompt of one edit: ``prompt_kind`` is rewrite, paraphrase, neighborhood or attribute, ``p_pre`` and
    ``p_post`` are the probabilities of the problem's target before and after the edit, ``p_pre_other`` and
    ``p_post_other`` those of the other target; null where there are none.
    """
    return _read(source, PROBE_SCHEMA, "table of probes", ["edit_id", "prompt_kind", "prompt_index"])


def read_metrics(source: TraceSource) -> pl.DataFrame:
    """A table of metrics with the columns of ``METRIC_SCHEMA``, as ``read_edits`` reads edits: one row is one metric of
    one edit, a mean over its prompts or texts before and after the edit."""
    return _read(source, METRIC_SCHEMA, "table of metrics", ["edit_id", "metric"])


def finished(edits: pl.DataFrame) -> pl.DataFrame:
    """The edits that did not fail."""
    return edits.filter(pl.col("status") == "done")


def checked_metrics(metrics: pl.DataFrame) -> pl.DataFrame:
    """``metrics`` as they are; ``TableError`` names the first without a number. After an edit, one may be infinite."""
    pre, post = pl.col("pre"), pl.col("post")
    wrong = metrics.filter(pre.is_nan() | pre.is_infinite() | post.is_nan())
    if wrong.height:
        row = wrong.row(0, named=True)
        raise TableError(
            f"edit {row['edit_id']!r}: {row['metric']} is {row['pre']} before and {row['post']} after the edit; "
            "give such an edit the status 'failed'"
        )
    return metrics


def checked_probes(probes: pl.DataFrame) -> pl.DataFrame:
    """``checked_probabilities`` of probes."""
    identity = ["edit_id", "prompt_kind", "prompt_index"]
    return checked_probabilities(probes, _PROBABILITIES, identity, "; give such an edit the status 'failed'")


def _read(source: TraceSource, schema: Schema, what: str, key: list[str]) -> pl.DataFrame:
    frame = pl.concat(_parts(source, schema, what), how="diagonal")
    repeated = frame.filter(frame.select(key).is_duplicated())
    if repeated.height:
        first = ", ".join(f"{name} {value}" for name, value in repeated.select(key).row(0, named=True).items())
        raise TableError(f"the {what} holds rows more than once, the first: {first}")
    return frame
