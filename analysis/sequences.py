"""Sequences of edits: scores of edits new and old, and the model's health, by the number of edits made."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.edits import read_checkpoints
from causalcone.analysis.tables.names import METHODS, position
from causalcone.analysis.tables.traces import TraceSource

BY = ["method", "window", "layer", "edits", "group", "metric"]


def sequence_scores(checkpoints: TraceSource) -> pl.DataFrame:
    """Means over the edits scored at each checkpoint of a sequence.

    Args:
        checkpoints: the table of checkpoints, any source that ``read_traces`` takes.

    Returns:
        A row for each method, window, layer, number of ``edits`` made, ``group`` (newest, earlier, model) and
        ``metric``, in this order: ``n`` edits with the metric; ``pre`` and ``post``, its mean in the unedited model and
        now; ``se``, the standard error of ``post``, null of one value.

    Raises:
        TableError: files cannot be read, columns are missing, or a row occurs twice.
    """
    frame = read_checkpoints(checkpoints).filter(pl.col("post").is_not_null())
    means = frame.group_by(BY).agg(
        n=pl.len(), pre=pl.mean("pre"), post=pl.mean("post"), se=pl.std("post") / pl.len().sqrt()
    )
    return means.sort(position("method", METHODS), *BY)


def health(scores: pl.DataFrame) -> pl.DataFrame:
    """The model as a whole at each checkpoint.

    Args:
        scores: as ``sequence_scores`` returns them.

    Returns:
        A row for each method, window, layer and number of edits: ``perplexity`` of held-out text now, over that before
        (``perplexity_ratio``), and ``relative_norm``, the largest of the changed layers'.
    """
    model = scores.filter(group="model")
    perplexity, norms = pl.col("metric") == "perplexity", pl.col("metric").str.starts_with("relative_norm.")
    return model.group_by(BY[:4], maintain_order=True).agg(
        perplexity=pl.col("post").filter(perplexity).first(),
        perplexity_ratio=(pl.col("post") / pl.col("pre")).filter(perplexity).first(),
        relative_norm=pl.col("post").filter(norms).max(),
    )
