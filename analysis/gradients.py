"""What a table of integrated gradients says, kind by kind."""

from __future__ import annotations

import polars as pl

from causalcone.analysis.tables.traces import TraceSource, read_gradients


def gradient_norms(table: TraceSource) -> pl.DataFrame:
    """The mean norm of integrated gradients over facts and their tokens, each fact counted once, by kind and layer.

    Columns: kind, layer, norm, facts.
    """
    per_fact = read_gradients(table).group_by("kind", "layer", "fact_id").agg(norm=pl.mean("norm"))
    return per_fact.group_by("kind", "layer").agg(norm=pl.mean("norm"), facts=pl.len()).sort("kind", "layer")


def gradient_summary(table: TraceSource) -> pl.DataFrame:
    """Per kind: the layer of the largest mean norm (the lowest of equals) and that norm, and how far the totals are
    from the changes in p that they should add up to (METHODS 3): the mean and the largest |gap|.

    Columns: kind, layer, norm, mean_gap, largest_gap, facts.
    """
    norms = gradient_norms(table).sort("norm", "layer", descending=[True, False]).unique("kind", keep="first")
    gaps = (
        read_gradients(table)
        .group_by("kind")
        .agg(mean_gap=pl.col("gap").abs().mean(), largest_gap=pl.col("gap").abs().max())
    )
    return norms.join(gaps, on="kind").select("kind", "layer", "norm", "mean_gap", "largest_gap", "facts").sort("kind")
