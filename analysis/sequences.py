"""Sequences of edits: scores of edits new and old, and the model's health, by the number of edits made."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.edits import read_checkpoints
from causalcone.analysis.tables.names import in_order, position
from causalcone.analysis.tables.traces import TraceSource

BY = ["problem", "method", "window", "layer", "edits", "group", "metric"]
SEQUENCE, CHECKPOINT = BY[:4], BY[:5]

GROUPS = {"newest": "newest batch", "earlier": "sample of all before it", "model": ""}
"""Which edits a mean is of, in words."""

METRICS = ("rewrite_p", "efficacy_score", "paraphrase_score", "neighborhood_score")
HEALTH = ("perplexity_ratio", "relative_norm")


def sequence_scores(checkpoints: TraceSource) -> pl.DataFrame:
    """Means over the edits scored at each checkpoint of a sequence.

    Args:
        checkpoints: the table of checkpoints, any source that ``read_traces`` takes.

    Returns:
        A row for each problem, method, window, layer, number of ``edits`` made, ``group`` (newest, earlier, model) and
        ``metric``, in this order: ``n`` edits with the metric; ``pre`` and ``post``, its mean in the unedited model and
        now; ``se``, the standard error of ``post``, null of one value.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    frame = read_checkpoints(checkpoints).filter(pl.col("post").is_not_null())
    means = frame.group_by(BY).agg(
        n=pl.len(), pre=pl.mean("pre"), post=pl.mean("post"), se=pl.std("post") / pl.len().sqrt()
    )
    return in_order(means.sort(*CHECKPOINT, position("group", GROUPS), "metric"))


def health(scores: pl.DataFrame) -> pl.DataFrame:
    """The model as a whole at each checkpoint.

    Args:
        scores: as ``sequence_scores`` returns them.

    Returns:
        A row for each problem, method, window, layer and number of edits: ``perplexity`` of held-out text now, over
        that before (``perplexity_ratio``), and ``relative_norm``, the largest of the changed layers'.
    """
    model = scores.filter(group="model")
    perplexity, norms = pl.col("metric") == "perplexity", pl.col("metric").str.starts_with("relative_norm.")
    return model.group_by(CHECKPOINT, maintain_order=True).agg(
        perplexity=pl.col("post").filter(perplexity).first(),
        perplexity_ratio=(pl.col("post") / pl.col("pre")).filter(perplexity).first(),
        relative_norm=pl.col("post").filter(norms).max(),
    )


def with_health(scores: pl.DataFrame) -> pl.DataFrame:
    """Scores of edits, and health as further metrics, what is shown first; those values that are finite."""
    of_model = health(scores).unpivot(HEALTH, index=CHECKPOINT, variable_name="metric", value_name="post")
    of_model = of_model.with_columns(pl.lit("model").alias("group"), pl.lit(1, pl.UInt32).alias("n"))
    rows = pl.concat([scores.filter(pl.col("group") != "model"), of_model], how="diagonal")
    shown = position("metric", (*METRICS, *HEALTH))
    return in_order(rows.filter(pl.col("post").is_finite()).sort(shown, maintain_order=True))


def overview(scores: pl.DataFrame) -> pl.DataFrame:
    """A row for each checkpoint and group of edits: the means of ``METRICS``, those that there are, and the model's
    health."""
    edits = scores.filter(pl.col("group") != "model", pl.col("metric").is_in(METRICS))
    rows = edits.pivot("metric", index=[*CHECKPOINT, "group"], values="post", maintain_order=True)
    shown = [name for name in METRICS if name in rows.columns]
    rows = rows.join(health(scores), on=CHECKPOINT, how="left", maintain_order="left")
    return rows.select(*CHECKPOINT, "group", *shown, *HEALTH)
