"""Success of edits: scores of Hase et al. 2023 per edit, their means, and metrics of Meng et al. 2022
(docs/editing.md, "Scores"); and scores beside localization effects, for regressions and correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import polars as pl

from causalcone.analysis.means import means_over_facts
from causalcone.analysis.tables.edits import (
    checked_metrics,
    checked_probes,
    counted,
    finished,
    read_edits,
    read_metrics,
    read_probes,
)
from causalcone.analysis.tables.names import position
from causalcone.analysis.tables.traces import AnswerScore, TableError, TraceSource, one_of, refuse, scaled
from causalcone.engine.schemas import ERROR_INJECTION, FACT_ERASURE, PROBLEMS, PROMPT_KINDS, TRACING_REVERSAL

Aggregate = Literal["first", "mean"]

SCORES = ("rewrite", "paraphrase", "neighborhood", "essence", "overall", "overall_essence", "rewrite_magnitude")

_EDIT = ["edit_id", "fact_id", "problem", "method", "layer", "window"]
_GROUP = ["problem", "method", "window", "layer"]
EDIT = ["fact_id", *_GROUP]

_KINDS = {"efficacy": "E", "paraphrase": "P", "neighborhood": "N"}
_COUNTERFACT = {
    f"{kind}_{of}": f"{k}{of[0].upper()}" for kind, k in _KINDS.items() for of in ("score", "magnitude")
} | {
    "generation_entropy": "GE",
    "reference_score": "RS",
}
_ZSRE = {"rewrite_accuracy": "efficacy", "paraphrase_accuracy": "paraphrase", "neighborhood_accuracy": "specificity"}


def scores(
    edits: TraceSource,
    probes: TraceSource,
    metrics: TraceSource | None = None,
    aggregate: Aggregate = "first",
    answer_score: AnswerScore = "product",
) -> pl.DataFrame:
    """Scores of edits (Hase et al. 2023; docs/editing.md, "Scores").

    - ``rewrite``, ``paraphrase``: the share of what p(target) lacked that came back, (p_post - p_pre) / (1 - p_pre),
      in Fact Erasure the share that was erased, (p_pre - p_post) / p_pre; 0 where that is negative, null where p_pre
      leaves nothing to recover or to erase
    - ``neighborhood``: 1 - |p_post - p_pre| / max(p_pre, 1 - p_pre), the divisor being the furthest p can move
    - ``essence``: 1 - clip(perplexity_post - perplexity_pre, 0, 5) / 5, of the metric "perplexity"
    - ``overall``: the mean of rewrite, paraphrase and neighborhood; ``overall_essence``: of these and essence
    - ``rewrite_magnitude``: p_post(target_new) - p_post(target_true) on the rewrite prompt, in [-1, 1]; in Tracing
      Reversal the trained-towards target takes target_new's place

    All others lie in [0, 1]. Scores are null where a fact has no such prompts or target, and for edits that failed.

    Args:
        edits: as ``read_edits`` takes them.
        probes: as ``read_probes`` takes them; those of other edits, and attribute prompts, are passed over.
        metrics: as ``read_metrics`` takes them; without them there is no essence.
        aggregate: of an edit's paraphrases and neighbours, the first (as published) or the mean of their scores.
        answer_score: that of ``read_traces``.

    Returns:
        One row per edit, in the order of ``edits``: edit_id, fact_id, problem, method, layer, window, and the scores.

    Raises:
        TableError: a problem is unknown, or a probability is outside [0, 1].
    """
    one_of("aggregate", aggregate, get_args(Aggregate))
    every = read_edits(edits)
    unknown = every.filter(pl.col("problem").is_in(PROBLEMS).not_().fill_null(True))
    refuse(unknown, f"edit {{edit_id!r}} is of the problem {{problem!r}}; known are {', '.join(PROBLEMS)}")
    done = finished(every).select("edit_id", "problem")
    prompts = checked_probes(read_probes(probes, answer_score).join(done, on="edit_id")).sort("prompt_index")
    reversed_target = pl.col("problem").is_in([ERROR_INJECTION, TRACING_REVERSAL])
    difference = (pl.col("p_post") - pl.col("p_post_other")) * pl.when(reversed_target).then(1.0).otherwise(-1.0)
    rows = prompts.with_columns(score=_prompt_score(), magnitude=difference)
    picked = {kind: _pick("score", kind, aggregate) for kind in ("rewrite", "paraphrase", "neighborhood")}
    magnitude = _pick("magnitude", "rewrite", aggregate)
    per_edit = rows.group_by("edit_id").agg(**picked, rewrite_magnitude=magnitude)
    three = pl.col("rewrite") + pl.col("paraphrase") + pl.col("neighborhood")
    return (
        every.select(_EDIT)
        .join(per_edit, on="edit_id", how="left", maintain_order="left")
        .join(_essence(done, metrics), on="edit_id", how="left", maintain_order="left")
        .with_columns(overall=three / 3, overall_essence=(three + pl.col("essence")) / 4)
        .select(*_EDIT, *SCORES)
    )


def _prompt_score() -> pl.Expr:
    """The score of one prompt. Differences come first: 1 - (1 - p_post) / (1 - p_pre) would lose small changes."""
    pre, post = pl.col("p_pre"), pl.col("p_post")
    recovered = pl.when(pre < 1).then((post - pre) / (1 - pre)).clip(lower_bound=0)
    top = pl.max_horizontal("logp_pre", "logp_post")
    lost = (scaled("p_pre", top) - scaled("p_post", top)) / scaled("p_pre", top)
    erased = pl.when(pl.col("logp_pre").is_finite()).then(lost).clip(lower_bound=0)
    unchanged = 1 - (post - pre).abs() / pl.max_horizontal(pre, 1 - pre)
    target = pl.when(pl.col("problem") == FACT_ERASURE).then(erased).otherwise(recovered)
    return pl.when(pl.col("prompt_kind") == "neighborhood").then(unchanged).otherwise(target)


def _pick(column: str, kind: str, aggregate: str) -> pl.Expr:
    values = pl.col(column).filter(pl.col("prompt_kind") == kind)
    return values.first() if aggregate == "first" else values.mean()


def _essence(done: pl.DataFrame, metrics: TraceSource | None) -> pl.DataFrame:
    if metrics is None:
        return pl.DataFrame(schema={"edit_id": pl.String, "essence": pl.Float64})
    perplexity = checked_metrics(read_metrics(metrics).filter(metric="perplexity").join(done, on="edit_id", how="semi"))
    lost = (pl.col("post") - pl.col("pre")).clip(0, 5)
    return perplexity.select("edit_id", essence=1 - lost / 5)


def mean_scores(scores: pl.DataFrame, by: Sequence[str] = ("problem", "method", "window", "layer")) -> pl.DataFrame:
    """Mean scores over the edits of each group.

    Args:
        scores: as the function ``scores`` returns them.
        by: columns that make a group.

    Returns:
        One row per group and score, in the order of ``SCORES``: the columns of ``by``, score, mean, standard_error
        (facts taken as independent; null for one fact), n, the edits that have the score (mean is null for 0), and
        facts, which these are of.

    Raises:
        TableError: ``scores`` lack columns, or ``by`` is empty.
    """
    missing = [column for column in (*by, "fact_id", *SCORES) if column not in scores.columns]
    if missing or not by:
        raise TableError(f"scores have no columns {', '.join(missing)}" if missing else "by is empty; name a column")
    means = [means_over_facts(scores, by, score).with_columns(score=pl.lit(score)) for score in SCORES]
    columns = [*by, "score", "mean", "standard_error", "n", "facts"]
    return pl.concat(means).select(columns).sort(by, maintain_order=True)


def refuse_unknown_scores(names: Sequence[str], purpose: str) -> None:
    """``TableError`` for names of scores that there are not, or for none to explain or draw."""
    unknown = [name for name in names if name not in SCORES]
    if unknown or not names:
        raise TableError(
            f"there are no scores {', '.join(unknown) or f'to {purpose}'}; choose from {', '.join(SCORES)}"
        )


def edits_with_effects(scores: pl.DataFrame, effects: pl.DataFrame) -> pl.DataFrame:
    """Scores of edits beside the effect of their fact at the edited layer, or at the centre of the edited window
    (docs/analysis.md, "The question"). Edits of facts without effects, and effects that are null, are left out.

    Args:
        scores: as the function ``scores`` returns them.
        effects: ``tracing_effects`` or ``zeroing_effects`` of a single state (columns fact_id, layer, effect).

    Returns:
        One row per edit whose fact has an effect at its layer: the columns of ``EDIT``, edit_id, effect, ``SCORES``.

    Raises:
        TableError: a fact has two effects at one layer, or nothing is left.
    """
    per_layer = effects.select("fact_id", "layer", "effect").drop_nulls()
    twice = per_layer.filter(pl.struct("fact_id", "layer").is_duplicated())
    complaint = "fact {fact_id!r} has several effects at layer {layer}; choose one method, kind and window of effects"
    refuse(twice, complaint)
    joined = scores.join(per_layer, on=["fact_id", "layer"], how="inner", maintain_order="left")
    if joined.is_empty():
        raise TableError(
            "no edit is of a fact and layer that effects are known of; trace the facts that are edited, and look at "
            f"the layers: edits are at {_some(scores['layer'])}, effects at {_some(per_layer['layer'])}"
        )
    return joined.select(*EDIT, "edit_id", "effect", *SCORES)


def counterfact_metrics(edits: TraceSource, metrics: TraceSource) -> pl.DataFrame:
    """Metrics of Meng et al. 2022 on CounterFact (docs/editing.md, "Scores"). Failed edits are left out.

    ``metric`` is ES, EM, PS, PM, NS, NM (efficacy, paraphrase and neighbourhood, score and magnitude), S (the harmonic
    mean of ES, PS and NS), GE (generation entropy, in bits) and RS (reference score), as far as there are any; all but
    GE are fractions where the paper prints percent. ``pre`` and ``post`` are means over edits, before and after them;
    ``pre_interval`` and ``post_interval`` are half the width of their 95 % intervals (1.96 standard errors, facts taken
    as independent; null for one fact and for S); ``n`` counts the edits.

    Args:
        edits: as ``read_edits`` takes them.
        metrics: as ``read_metrics`` takes them.

    Returns:
        One row per problem, method, window, layer and metric.

    Raises:
        TableError: there are none of these metrics.
    """
    means = _metric_means(edits, metrics, _COUNTERFACT)
    parts = means.filter(pl.col("metric").is_in(["ES", "PS", "NS"])).filter(pl.len().over(_GROUP) == 3)
    harmonic = 3 / (1 / pl.col("pre", "post")).sum()
    total = parts.group_by(_GROUP).agg(harmonic.name.keep(), pl.min("n")).with_columns(metric=pl.lit("S"))
    order = position("metric", ("S", *_COUNTERFACT.values()))
    return pl.concat([means, total], how="diagonal").sort(*_GROUP, order)


def zsre_metrics(edits: TraceSource, metrics: TraceSource) -> pl.DataFrame:
    """Metrics of Meng et al. 2022 on zsRE (docs/editing.md, "Scores"): efficacy, paraphrase and specificity, the shares
    of target tokens that are the model's most likely ones on the rewrite prompt, paraphrases and neighbours.

    Args:
        edits: as ``read_edits`` takes them.
        metrics: as ``read_metrics`` takes them.

    Returns:
        Rows and columns as those of ``counterfact_metrics``.

    Raises:
        TableError: there are none of these metrics.
    """
    return _metric_means(edits, metrics, _ZSRE).sort(*_GROUP, position("metric", _ZSRE.values()))


def probe_metrics(edits: TraceSource, probes: TraceSource, metrics: TraceSource | None = None) -> pl.DataFrame:
    """What models answer by group of prompts: rewrite, paraphrase, neighborhood, attribute, and those of facts' own
    probes (docs/editing.md, "Scores"). Failed edits, and probes whose condition does not hold, are left out.

    ``metric`` is p (of the target, or of a probe's likeliest accepted answer), accuracy (teacher forcing: the share of
    the answer's tokens that are the likeliest; in ``locality`` groups of likeliest tokens that stay) and exact_match
    (the share of free answers that are accepted ones), as far as there are any.

    Args:
        edits: as ``read_edits`` takes them.
        probes: as ``read_probes`` takes them.
        metrics: as ``read_metrics`` takes them; without them there is p only.

    Returns:
        One row per problem, method, window, layer, group and metric; further columns as of ``counterfact_metrics``.

    Raises:
        TableError: there is no edit that was done, or a number is not a probability.
    """
    of_kind = counted(checked_probes(read_probes(probes))).group_by("edit_id", "prompt_kind", maintain_order=True)
    p = of_kind.agg(pre=pl.mean("p_pre"), post=pl.mean("p_post"))
    known = [p.select("edit_id", metric=pl.col("prompt_kind") + "_p", pre="pre", post="post")]
    if metrics is not None:
        other = read_metrics(metrics).filter(pl.col("metric").str.contains("_(accuracy|exact_match)$"))
        known.append(other.select(known[0].columns))
    table = pl.concat(known)
    means = _metric_means(edits, table, {name: name for name in table["metric"].unique()})
    names = pl.col("metric").str.extract_groups("^(?<group>.+)_(?<metric>p|accuracy|exact_match)$").struct
    parts = means.with_columns(group=names.field("group"), metric=names.field("metric"))
    order = position("group", PROMPT_KINDS), "group", position("metric", ("p", "accuracy", "exact_match"))
    return parts.select(*_GROUP, "group", *means.columns[len(_GROUP) :]).sort(*_GROUP, *order)


def own_groups(metrics: pl.DataFrame) -> pl.DataFrame:
    """Rows of ``probe_metrics`` that no other function gives: of facts' own probes, and of free answers."""
    return metrics.filter(~pl.col("group").is_in(PROMPT_KINDS) | (pl.col("metric") == "exact_match"))


def _metric_means(edits: TraceSource, metrics: TraceSource, names: Mapping[str, str]) -> pl.DataFrame:
    done = finished(read_edits(edits)).select(_EDIT)
    named = read_metrics(metrics).filter(pl.col("metric").is_in(list(names)))
    known = checked_metrics(named.join(done, on="edit_id")).drop_nulls(["pre", "post"])
    if known.is_empty():
        raise TableError(f"no edit that was done has any of the metrics {', '.join(names)}")
    by = [*_GROUP, "metric"]
    interval = 1.96 * pl.col("standard_error")
    pre, post = (
        means_over_facts(known, by, side).select(
            *by, "n", pl.col("mean").alias(side), interval.alias(f"{side}_interval")
        )
        for side in ("pre", "post")
    )
    columns = ["pre", "pre_interval", "post", "post_interval", "n"]
    both = pre.drop("n").join(post, on=by, nulls_equal=True)
    return both.select(*_GROUP, pl.col("metric").replace_strict(names), *columns)


def _some(layers: pl.Series) -> str:
    numbers = layers.unique().sort().to_list()
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "") if numbers else "none"
