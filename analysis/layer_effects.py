"""Means by layer: effects of zeroing, of restoring several tokens together and with modules severed, and norms of
integrated gradients."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.effects import zeroing_effects
from causalcone.analysis.means import means_over_facts
from causalcone.analysis.tables.names import words
from causalcone.analysis.tables.traces import (
    IDENTITY,
    ROLES,
    STATE,
    AnswerScore,
    TableError,
    TraceSource,
    once,
    one_of,
    read_gradients,
    read_traces,
    trace_parts,
    with_roles,
)

_LAYER = [*STATE, "layer"]


def zeroing_curve(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Mean ``zeroing_effects`` over facts, by state and centre layer (Hase et al. 2023; docs/methods.md, "Zeroing").

    Args:
        table: traces, as ``read_traces`` takes them. Facts whose p_clean is 0 have no effect and are left out.
        answer_score: that of ``read_traces``.

    Returns:
        One row per state and layer: method, kind, window, layer, effect, standard_error (null for one fact), facts.

    Raises:
        TableError: the table holds no zeroed state.
    """
    effects = zeroing_effects(table, answer_score).filter(pl.col("effect").is_not_null())
    if effects.is_empty():
        raise TableError(
            "the table holds no zeroed state of a fact with p_clean above 0; Tracer.zero makes such tables"
        )
    return _means(effects, "effect")


def joint_effects(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Mean p_patched - p_corrupted of tokens restored together over facts, by state and centre layer.

    Args:
        table: traces, as ``read_traces`` takes them.
        answer_score: that of ``read_traces``.

    Returns:
        Rows and columns as those of ``zeroing_curve``.

    Raises:
        TableError: no row is of tokens restored together.
    """
    traces = read_traces(table, answer_score).filter(pl.col("method") != "zero", pl.col("token").is_null())
    if traces.is_empty():
        raise TableError("the table holds no tokens restored together; Tracer.trace(joint=True) makes such tables")
    return _means(traces.with_columns(effect=pl.col("p_patched") - pl.col("p_corrupted")), "effect")


def severed_effects(
    *tables: TraceSource,
    role: str = "last_subject",
    fact_id: str | None = None,
    token: int | None = None,
    common: bool = False,
    answer_score: AnswerScore = "product",
) -> pl.DataFrame:
    """How much severing takes from the effect of restoring a state, by layer (docs/methods.md, "Severed tracing").

    Args:
        tables: traces, as ``read_traces`` takes them, which together hold plain and severed ones of the same facts.
        role: whose tokens count.
        fact_id: only this fact counts.
        token: the number of a token that counts in place of a role's.
        common: whether only facts and tokens that all severed methods have count.
        answer_score: that of ``read_traces``.

    Returns:
        One row per severed method, kind, window and layer: these, the mean p_patched - p_corrupted of the facts and
        tokens that both have (plain, severed), difference = plain - severed, plain_error, severed_error and
        difference_error (standard errors, facts taken as independent; null for one fact), and facts.

    Raises:
        TableError: there are no such states, or the role is unknown.
    """
    one_of("role", role, ROLES)
    at = f"the {words(role)} token" if token is None else f"token {token}"
    parts = (rows for table in tables for rows in trace_parts(table, answer_score))
    rows = once(pl.concat(_effects(rows, role, fact_id, token) for rows in parts))
    same = [name for name in IDENTITY if name != "method"]
    severed = rows.filter(pl.col("method").str.starts_with("sever_")).rename({"effect": "severed"})
    plain = rows.filter(method="restore").drop("method").rename({"effect": "plain"})
    both = severed.join(plain, on=same).with_columns(difference=pl.col("plain") - pl.col("severed"))
    if common:
        both = both.filter(pl.len().over(same) == pl.col("method").n_unique().over("kind", "window"))
    if both.is_empty():
        missing = "severed" if severed.is_empty() else "plain" if plain.is_empty() else "common"
        of = "" if fact_id is None else f" of fact {fact_id!r}"
        raise TableError(f"there are no {missing} states at {at}{of}; trace both")
    plain, severed, difference = (
        _means(both, name).rename({"effect": name, "standard_error": f"{name}_error"})
        for name in ("plain", "severed", "difference")
    )
    means = plain.join(severed.drop("facts"), on=_LAYER).join(difference.drop("facts"), on=_LAYER)
    return means.select(pl.exclude("facts"), "facts").sort(_LAYER)


def gradient_norms(table: TraceSource) -> pl.DataFrame:
    """Mean norms of integrated gradients over facts and their tokens, each fact counted once.

    Args:
        table: gradients, as ``read_gradients`` takes them.

    Returns:
        One row per kind and layer: kind, layer, norm, facts.
    """
    per_fact = read_gradients(table).group_by("kind", "layer", "fact_id").agg(norm=pl.mean("norm"))
    return per_fact.group_by("kind", "layer").agg(norm=pl.mean("norm"), facts=pl.len()).sort("kind", "layer")


def gradient_summary(table: TraceSource) -> pl.DataFrame:
    """The layer of the largest mean norm (the lowest of equals), and how far totals are from the changes in p that they
    should add up to (docs/methods.md, "Integrated gradients").

    Args:
        table: gradients, as ``read_gradients`` takes them.

    Returns:
        One row per kind: kind, layer, norm, mean_gap and largest_gap (of |gap|), facts.
    """
    norms = gradient_norms(table).sort("norm", "layer", descending=[True, False]).unique("kind", keep="first")
    gap = pl.col("gap").abs()
    gaps = read_gradients(table).group_by("kind").agg(mean_gap=gap.mean(), largest_gap=gap.max())
    return norms.join(gaps, on="kind").select("kind", "layer", "norm", "mean_gap", "largest_gap", "facts").sort("kind")


def _effects(rows: pl.DataFrame, role: str, fact_id: str | None, token: int | None) -> pl.DataFrame:
    rows = rows.filter(pl.col("method") != "zero")
    if fact_id is not None:
        rows = rows.filter(fact_id=str(fact_id))
    rows = with_roles(rows).filter(pl.col("role") == role) if token is None else rows.filter(token=token)
    return rows.select(*IDENTITY, effect=pl.col("p_patched") - pl.col("p_corrupted"))


def _means(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    means = means_over_facts(rows, _LAYER, column)
    return means.rename({"mean": "effect"}).drop("n").sort(_LAYER)
