"""Mean effects by layer: of zeroing, of restoring several tokens together, and of restoring with modules severed."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from causalcone.analysis.effects import zeroing_effects
from causalcone.analysis.roles import ROLES, with_roles
from causalcone.analysis.tables.traces import (
    IDENTITY,
    STATE,
    TableError,
    TraceSource,
    once,
    one_of,
    read_traces,
    trace_parts,
)

_LAYER = [*STATE, "layer"]


def zeroing_curve(table: TraceSource) -> pl.DataFrame:
    """The mean over facts of ``zeroing_effects``, by state and centre layer (Hase et al. 2023; METHODS 3).

    Facts whose p_clean is 0 have no effect and are left out. Columns: method, kind, window, layer, effect,
    standard_error (null for one fact), facts. Raises ``TableError`` where the table holds no zeroed state.
    """
    effects = zeroing_effects(table).filter(pl.col("effect").is_not_null())
    if effects.is_empty():
        raise TableError(
            "the table holds no zeroed state of a fact with p_clean above 0; Tracer.zero makes such tables"
        )
    return _means(effects, _LAYER)


def joint_effects(table: TraceSource) -> pl.DataFrame:
    """The mean over facts of p_patched - p_corrupted of tokens restored together, by state and centre layer.

    Columns as those of ``zeroing_curve``. Raises ``TableError`` where no row is of tokens restored together.
    """
    traces = read_traces(table).filter(pl.col("method") != "zero", pl.col("token").is_null())
    if traces.is_empty():
        raise TableError("the table holds no tokens restored together; Tracer.trace(joint=True) makes such tables")
    return _means(traces.with_columns(effect=pl.col("p_patched") - pl.col("p_corrupted")), _LAYER)


def severed_effects(
    *tables: TraceSource,
    role: str = "last_subject",
    fact_id: str | None = None,
    token: int | None = None,
    common: bool = False,
) -> pl.DataFrame:
    """What severing takes from the effect of restoring a state, by layer (Meng et al. 2022; METHODS 3).

    ``tables`` hold together what plain and what severed tracing gave for the same facts, at the tokens of ``role``, or
    at the one of number ``token``; with ``fact_id`` only that fact's. ``common``: only facts and tokens that all
    severed methods have.
    Per severed method, kind, window and layer: ``plain`` and ``severed``, the mean p_patched - p_corrupted of the facts
    and tokens that both have, ``difference`` = plain - severed, ``plain_error``, ``severed_error`` and
    ``difference_error``, their standard errors (facts taken as independent; null for one fact), and ``facts``.
    """
    one_of("role", role, ROLES)
    at = f"the {role.replace('_', ' ')} token" if token is None else f"token {token}"
    rows = once(pl.concat(_chosen(part, role, fact_id, token) for table in tables for part in trace_parts(table)))
    same = [name for name in IDENTITY if name != "method"]
    severed = rows.filter(pl.col("method").str.starts_with("sever_")).rename({"effect": "severed"})
    plain = rows.filter(method="restore").drop("method").rename({"effect": "plain"})
    both = severed.join(plain, on=same).with_columns(difference=pl.col("plain") - pl.col("severed"))
    if common:
        both = both.filter(pl.len().over(same) == pl.col("method").n_unique().over("kind", "window"))
    if both.is_empty():
        missing = "severed" if severed.is_empty() else "plain" if plain.is_empty() else "common"
        raise TableError(f"there are no {missing} states at {at}{_of(fact_id)}; trace both")
    means = (
        _means(both.rename({name: "effect"}), _LAYER).rename({"effect": name, "standard_error": f"{name}_error"})
        for name in ("plain", "severed", "difference")
    )
    first, *others = means
    for other in others:
        first = first.join(other.drop("facts"), on=_LAYER)
    return first.select(pl.exclude("facts"), "facts").sort(_LAYER)


def _of(fact_id: str | None) -> str:
    return "" if fact_id is None else f" of fact {fact_id!r}"


def _chosen(part: pl.DataFrame, role: str, fact_id: str | None, token: int | None) -> pl.DataFrame:
    """Effects of a role's tokens, or of one token."""
    rows = part.filter(pl.col("method") != "zero")
    if fact_id is not None:
        rows = rows.filter(fact_id=str(fact_id))
    rows = with_roles(rows).filter(pl.col("role") == role) if token is None else rows.filter(token=token)
    return rows.select(*IDENTITY, effect=pl.col("p_patched") - pl.col("p_corrupted"))


def _means(rows: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Means of ``effect`` over all rows of a group, and their standard errors; a fact's rows are not independent."""
    per_fact = rows.group_by(*by, "fact_id").agg(total=pl.sum("effect"), rows=pl.len().cast(pl.Float64))
    total, count, facts = pl.col("total"), pl.col("rows"), pl.col("facts")
    mean = total.sum() / count.sum()
    spread = ((total - mean * count) ** 2).sum() / count.sum() ** 2
    means = per_fact.group_by(by).agg(effect=mean, spread=spread, facts=pl.len().cast(pl.Int64))
    error = pl.when(facts > 1).then((pl.col("spread") * facts / (facts - 1)).sqrt())
    return means.select(*by, "effect", standard_error=error, facts="facts").sort(by)
