"""Effects derived from traces: per state, per layer, and averaged by token role
(docs/methods.md, "What follows from the tables")."""

from __future__ import annotations

from typing import Literal, get_args

import polars as pl

from causalcone.analysis.tables.traces import (
    IDENTITY,
    STATE,
    AnswerScore,
    TraceSource,
    one_of,
    read_traces,
    refuse,
    scaled,
    single_tokens,
    trace_parts,
    with_roles,
)

At = Literal["max", "subject_last"]
Denominator = Literal["p_high", "p_clean"]
Compat = Literal["published"]

OTHER_LAYERS = 3
"""The most layers besides that of the largest effect that have half of it, where effects are concentrated."""

_LAYER = ["fact_id", *STATE, "layer"]
_LOOKUP = pl.col("token") == pl.col("subject_end") - 1
_CELL = [*STATE, "role", "layer"]
_LEN = pl.len().cast(pl.Int64)  # polars counts in 32 bits, whose squares overflow


def restore_effects(
    table: TraceSource, denominator: Denominator = "p_high", answer_score: AnswerScore = "product"
) -> pl.DataFrame:
    """How much of the answer's probability came back, per fact and restored state (Hase et al. 2023).

    - ``p_high``: max of p_clean and the largest p_patched of this fact, method, kind and window in the table (of tokens
      restored together, where the row is)
    - ``restore_effect``: p_patched - p_corrupted
    - ``relative_effect``: restore_effect / |d - p_corrupted|; null where that is 0
    - ``fraction_restored``: max(0, relative_effect), also 0 where nothing was restored of nothing; at most 1 with
      ``p_high``
    - ``flagged``: whether p_clean <= p_corrupted, so that there was nothing to restore

    Where a fact's probabilities are too small for a number, the last three are of their logarithms.

    Args:
        table: traces, as ``read_traces`` takes them; rows of method "zero" are left out.
        denominator: d in the relative effect, ``p_high`` (published) or ``p_clean``.
        answer_score: that of ``read_traces``.

    Returns:
        The rows with these further columns.

    Raises:
        TableError: the table cannot be read, or the denominator is unknown.
    """
    one_of("denominator", denominator, get_args(Denominator))
    traces = read_traces(table, answer_score).filter(pl.col("method") != "zero")
    compared = ["fact_id", *STATE, pl.col("token").is_null()]
    high = {f"{p}_high": pl.max_horizontal(f"{p}_clean", pl.max(f"{p}_patched").over(compared)) for p in ("p", "logp")}
    top = pl.max_horizontal("logp_high", "logp_corrupted")
    d, clean, corrupted, patched = (scaled(p, top) for p in (denominator, "p_clean", "p_corrupted", "p_patched"))
    effect, size = patched - corrupted, (d - corrupted).abs()
    return (
        traces.with_columns(**high, restore_effect=pl.col("p_patched") - pl.col("p_corrupted"))
        .with_columns(relative_effect=pl.when(size > 0).then(effect / size))
        .with_columns(
            fraction_restored=pl.when(effect <= 0).then(0.0).otherwise(pl.col("relative_effect")),
            flagged=clean <= corrupted,
        )
        .drop("logp_high")
    )


def tracing_effects(
    table: TraceSource, at: At = "max", denominator: Denominator = "p_high", answer_score: AnswerScore = "product"
) -> pl.DataFrame:
    """Tracing effects of layers (Hase et al. 2023); see ``restore_effects``.

    ``at`` "max" takes the largest fraction_restored over the prompt tokens (the first of equals), "subject_last" the
    relative_effect, not clipped, at the last subject token.

    Args:
        table: traces, as ``read_traces`` takes them; rows of several tokens restored together are left out.
        at: where effects are taken from.
        denominator: that of ``restore_effects``.
        answer_score: that of ``read_traces``.

    Returns:
        One row per fact, method, kind, window and layer: these, token, p_clean, p_corrupted, effect, flagged.

    Raises:
        TableError: the table cannot be read, has only tokens restored together, or an option is unknown.
    """
    one_of("at", at, get_args(At))
    effects = single_tokens(restore_effects(table, denominator, answer_score))
    if at == "max":
        order = effects.sort("fraction_restored", "token", descending=[True, False], nulls_last=True)
        return _by_layer(order.unique(_LAYER, keep="first"), "fraction_restored")
    return _by_layer(effects.filter(_LOOKUP), "relative_effect")


def _by_layer(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    return rows.select(*IDENTITY, "p_clean", "p_corrupted", pl.col(column).alias("effect"), "flagged").sort(_LAYER)


def zeroing_effects(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Effects of zeroing, clip((p_clean - p_zeroed) / p_clean, 0, 1) (docs/methods.md, "Zeroing").

    Args:
        table: traces, as ``read_traces`` takes them; only rows of method "zero" count.
        answer_score: that of ``read_traces``.

    Returns:
        One row per fact, method, kind, window and layer: these, p_clean, p_zeroed, effect (null where p_clean is 0).
    """
    names = {"p_patched": "p_zeroed", "logp_patched": "logp_zeroed"}
    zeroed = read_traces(table, answer_score).filter(pl.col("method") == "zero").rename(names)
    top = pl.max_horizontal("logp_clean", "logp_zeroed")
    p_clean, p_zeroed = scaled("p_clean", top), scaled("p_zeroed", top)
    effect = pl.when(pl.col("logp_clean").is_finite()).then(((p_clean - p_zeroed) / p_clean).clip(0, 1))
    return zeroed.select(*_LAYER, "p_clean", "p_zeroed", effect=effect).sort(_LAYER)


def absolute_effects(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """The absolute effect of each layer at the last subject token, p_patched - p_corrupted (Hase et al. 2023, Fig. 14;
    Meng et al. 2022): one row per fact, method, kind, window and layer, with the columns of ``tracing_effects``."""
    return _by_layer(single_tokens(restore_effects(table, answer_score=answer_score)).filter(_LOOKUP), "restore_effect")


def flagged_facts(table: TraceSource, answer_score: AnswerScore = "product") -> pl.DataFrame:
    """Facts whose clean run is not more probable than the corrupted one.

    Args:
        table: traces, as ``read_traces`` takes them.
        answer_score: that of ``read_traces``.

    Returns:
        One row per such fact: fact_id, p_clean, p_corrupted.
    """
    top = pl.max_horizontal("logp_clean", "logp_corrupted")
    flagged = read_traces(table, answer_score).filter(scaled("p_clean", top) <= scaled("p_corrupted", top))
    return flagged.select("fact_id", "p_clean", "p_corrupted").unique(maintain_order=True)


def average_indirect_effect(
    table: TraceSource, clip: bool = False, answer_score: AnswerScore = "product"
) -> pl.DataFrame:
    """Average indirect effects by token role (Meng et al. 2022, Fig. 15): the mean p_patched of the role's tokens minus
    the mean p_corrupted of all facts, each fact counted once. Middle and further tokens are pooled over facts.

    A folder is read file by file, each holding whole facts, so any number of facts fits in memory. ``standard_error``
    is that of the mean p_patched; facts, not tokens, are taken as independent; null for one fact.

    Args:
        table: traces, as ``read_traces`` takes them; rows of several tokens restored together are left out.
        clip: whether negative effects are raised to 0, as the published heat maps do.
        answer_score: that of ``read_traces``.

    Returns:
        One row per method, kind, window, role and layer: these, mean_patched, mean_corrupted, effect, standard_error,
        count (tokens), facts.

    Raises:
        TableError: the table cannot be read, or a fact is in two files.
    """
    roles, corrupted, facts_of, together = zip(*(_sums(rows) for rows in trace_parts(table, answer_score)), strict=True)
    every = pl.concat(facts_of)
    twice = "fact {fact_id!r} has {method} of {kind}:{window} in several files; give each fact once"
    refuse(every.filter(every.is_duplicated()), twice)
    cells = pl.concat(roles).group_by(_CELL).agg(pl.all().sum())
    if cells.is_empty():
        single_tokens(pl.concat(together))
    states = pl.concat(corrupted).group_by(STATE).agg(pl.all().sum())
    total, count, facts = pl.col("patched"), pl.col("count"), pl.col("facts")
    mean = total / count
    squares = pl.col("patched_squared") - 2 * mean * pl.col("patched_times_tokens") + mean**2 * pl.col("tokens_squared")
    variance = squares.clip(0) * facts / (facts - 1) / count.cast(pl.Float64) ** 2
    averages = cells.join(states, on=STATE).with_columns(
        mean_patched=mean,
        mean_corrupted=pl.col("corrupted") / pl.col("corrupted_facts"),
        standard_error=pl.when(facts > 1).then(variance.sqrt()),
    )
    effect = pl.col("mean_patched") - pl.col("mean_corrupted")
    averages = averages.with_columns(effect=effect.clip(0) if clip else effect)
    columns = [*_CELL, "mean_patched", "mean_corrupted", "effect", "standard_error", "count", "facts"]
    return averages.select(columns).sort(_CELL)


def _sums(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Sums of whole facts per role and layer, and per state; these facts; and an example of rows without a token."""
    restored = rows.filter(pl.col("method") != "zero")
    traces = restored.filter(pl.col("token").is_not_null())
    per_fact = with_roles(traces).group_by(*_CELL, "fact_id").agg(total=pl.sum("p_patched"), tokens=_LEN)
    total, tokens = pl.col("total"), pl.col("tokens").cast(pl.Float64)
    cells = per_fact.group_by(_CELL).agg(
        patched=total.sum(),
        patched_squared=(total**2).sum(),
        patched_times_tokens=(total * tokens).sum(),
        tokens_squared=(tokens**2).sum(),
        count=pl.sum("tokens"),
        facts=_LEN,
    )
    facts = traces.unique(["fact_id", *STATE])
    states = facts.group_by(STATE).agg(corrupted=pl.sum("p_corrupted"), corrupted_facts=_LEN)
    return cells, states, facts.select("fact_id", *STATE), restored.filter(pl.col("token").is_null()).head(1)


def peak_layers(averages: pl.DataFrame) -> pl.DataFrame:
    """Layers of the largest average indirect effect.

    Args:
        averages: as ``average_indirect_effect`` returns them.

    Returns:
        The row of the largest effect for each method, kind, window and role; of effects that are equal to six digits,
        as those of windows that are cut at the first layer to the same layers, the row of the lowest layer.
    """
    group = [*STATE, "role"]
    ranked = averages.sort(pl.col("effect").round_sig_figs(6), "layer", descending=[True, False])
    return ranked.unique(group, keep="first").sort(group)


def mean_effects(effects: pl.DataFrame, compat: Compat | None = None) -> pl.DataFrame:
    """Means by layer of one state's ``tracing_effects``: layer, mean, standard_error, facts. Effects that are not
    positive count as 0; ``compat="published"`` leaves them out, as published plots do. Nulls are left out."""
    if compat is not None:
        one_of("compat", compat, get_args(Compat))
    effect, positive = pl.col("effect"), pl.col("effect") > 0
    known = effects.drop_nulls("effect")
    counted = known.filter(positive) if compat == "published" else known.with_columns(effect.clip(lower_bound=0))
    means = counted.group_by("layer").agg(mean=effect.mean(), spread=effect.std(), facts=_LEN)
    error = pl.col("spread") / pl.col("facts").sqrt()
    return means.select("layer", "mean", standard_error=error, facts="facts").sort("layer")


def concentrated_facts(layer_effects: pl.DataFrame, others: int = OTHER_LAYERS, share: float = 0.5) -> pl.DataFrame:
    """Which facts have their effect in few layers (Hase et al. 2023, appendix D).

    A fact is concentrated if its largest effect is positive and, besides the layer of that, at most ``others`` layers
    have at least ``share`` of it; in a model of at most ``others`` + 1 layers, every fact with a positive effect is.

    Args:
        layer_effects: as ``tracing_effects`` returns them.
        others: how many other layers may have that much.
        share: of the largest effect.

    Returns:
        One row per fact, method, kind and window: these, peak_layer (the lowest of those equal to six digits),
        peak_effect, other_layers, concentrated; all but the last are null where no effect is known.
    """
    effect, by = pl.col("effect"), ["fact_id", *STATE]
    largest = effect.max()
    high = (effect.clip(0) >= share * largest.clip(0)).sum().cast(pl.Int64)
    peaks = (
        layer_effects.sort("layer")
        .group_by(by, maintain_order=True)
        .agg(
            peak_layer=pl.col("layer").get(effect.round_sig_figs(6).arg_max()),
            peak_effect=largest,
            other_layers=pl.when(largest.is_not_null()).then(high - 1),
        )
    )
    concentrated = (pl.col("peak_effect") > 0) & (pl.col("other_layers") <= others)
    return peaks.with_columns(concentrated=concentrated.fill_null(False)).sort(by)
