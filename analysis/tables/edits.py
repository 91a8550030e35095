"""Tables of editing as polars frames: edits, the prompts they were scored on, metrics, and texts that models wrote."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.names import counted as in_number
from causalcone.analysis.tables.traces import (
    AnswerScore,
    Schema,
    TraceSource,
    by_answer_score,
    checked_probabilities,
    in_words,
    polars_schema,
    refuse,
    table_parts,
)
from causalcone.engine import schemas

EDIT_SCHEMA = polars_schema(schemas.EDIT_SCHEMA)
PROBE_SCHEMA = polars_schema(schemas.PROBE_SCHEMA)
METRIC_SCHEMA = polars_schema(schemas.METRIC_SCHEMA)
TEXT_SCHEMA = polars_schema(schemas.TEXT_SCHEMA)
CHECKPOINT_SCHEMA = polars_schema(schemas.CHECKPOINT_SCHEMA)

_PROBE = ["edit_id", "prompt_kind", "prompt_index"]
MOST_NAMED = 5
_ADVICE = "; give such an edit the status 'failed'"
_TOKENS = {f"p_{name}{of}": f"answer_tokens{of}" for of in ("", "_other") for name in ("pre", "post")}


def read_edits(source: TraceSource) -> pl.DataFrame:
    """Read a table of edits, one row each (docs/results.md, "edits").

    Args:
        source: any that ``read_traces`` takes.

    Returns:
        The columns of ``EDIT_SCHEMA``; further ones are kept. ``reason`` says why where ``status`` is "failed".

    Raises:
        TableError: files cannot be read, columns are missing, another status, or an edit occurs twice.
    """
    edits = _read(source, EDIT_SCHEMA, "table of edits", ["edit_id"])
    others = edits.filter(pl.col("status").is_in(["done", "failed"]).not_().fill_null(True))
    return refuse(others, "edit {edit_id!r} has the status {status!r}; it must be 'done' or 'failed'", edits)


def read_probes(source: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Read a table of probes, one row per prompt of an edit (docs/results.md, "probes").

    ``p_pre`` and ``p_post`` are the probabilities of the problem's target before and after the edit, ``p_pre_other``
    and ``p_post_other`` those of the other target; null where there are none. On a fact's own probes, whose
    ``prompt_kind`` is their group, they are of the likeliest accepted answer.

    Args:
        source: any that ``read_traces`` takes.
        answer_score: that of ``read_traces``.

    Returns:
        The columns of ``PROBE_SCHEMA``; further ones are kept.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    probes = _read(source, PROBE_SCHEMA, "table of probes", _PROBE)
    return by_answer_score(probes, answer_score, _TOKENS, _PROBE)


def read_metrics(source: TraceSource) -> pl.DataFrame:
    """Read a table of metrics, one row per metric of an edit (docs/results.md, "metrics").

    Args:
        source: any that ``read_traces`` takes.

    Returns:
        The columns of ``METRIC_SCHEMA``, means over prompts or texts; further ones are kept.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    return _read(source, METRIC_SCHEMA, "table of metrics", ["edit_id", "metric"])


def read_texts(source: TraceSource) -> pl.DataFrame:
    """Read a table of texts, one row per prompt of an edit that models wrote after (docs/results.md, "texts").

    Args:
        source: any that ``read_traces`` takes.

    Returns:
        The columns of ``TEXT_SCHEMA``; further ones are kept. ``after`` is null where the edit failed.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    return _read(source, TEXT_SCHEMA, "table of texts", _PROBE)


def read_checkpoints(source: TraceSource) -> pl.DataFrame:
    """Read a table of checkpoints, one row per edit (or model) and metric (docs/results.md, "sequence and
    checkpoints").

    Args:
        source: any that ``read_traces`` takes.

    Returns:
        The columns of ``CHECKPOINT_SCHEMA``; further ones are kept. ``fact_id`` is null of the model.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    key = ["problem", "method", "window", "layer", "edits", "group", "fact_id", "metric"]
    return _read(source, CHECKPOINT_SCHEMA, "table of checkpoints", key)


def counted(probes: pl.DataFrame) -> pl.DataFrame:
    """Rows without those whose condition did not hold before the edit."""
    return probes.filter(pl.col("condition").fill_null(True))


def unmet(edits: TraceSource, probes: TraceSource) -> str | None:
    """A sentence on the facts' own probes whose condition held before none of the edits; None where there are none."""
    found = read_probes(probes).join(
        read_edits(edits).select("edit_id", "fact_id"), on="edit_id", maintain_order="left"
    )
    own = found.filter(pl.col("condition").is_not_null())
    each = own.group_by("fact_id", "prompt_kind", "prompt_index", maintain_order=True)
    never = each.agg(pl.any("condition"), name=pl.first("prompt_name")).filter(~pl.col("condition"))
    if never.is_empty():
        return None
    names = [
        f"{name or index} of {group} of fact {fact!r}"
        for fact, group, index, _, name in never.head(MOST_NAMED).iter_rows()
    ]
    more = f", and {never.height - len(names)} more" if never.height > len(names) else ""
    return (
        f"{in_number(never.height, 'probe')} not counted, since the unedited model does not say what is presupposed: "
        f"{', '.join(names)}{more} (their rows have condition = false)"
    )


def finished(edits: pl.DataFrame) -> pl.DataFrame:
    return edits.filter(pl.col("status") == "done")


def checked_metrics(metrics: pl.DataFrame) -> pl.DataFrame:
    """``metrics`` as they are; ``TableError`` names the first without a number. After an edit, one may be infinite."""
    pre, post = pl.col("pre"), pl.col("post")
    wrong = metrics.filter(pre.is_nan() | pre.is_infinite() | post.is_nan())
    return refuse(
        wrong, f"edit {{edit_id!r}}: {{metric}} is {{pre}} before and {{post}} after the edit{_ADVICE}", metrics
    )


def checked_probes(probes: pl.DataFrame) -> pl.DataFrame:
    """``checked_probabilities`` of probes."""
    return checked_probabilities(probes, list(_TOKENS), _PROBE, _ADVICE)


def _read(source: TraceSource, schema: Schema, name: str, key: list[str]) -> pl.DataFrame:
    frame = pl.concat(table_parts(source, schema, name), how="diagonal")
    repeated = frame.filter(frame.select(key).is_duplicated())
    return refuse(repeated, f"the {name} holds rows more than once, the first: {in_words(key)}", frame)
