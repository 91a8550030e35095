"""Means over edits, tokens or texts whose facts are taken as independent."""

from collections.abc import Sequence

import polars as pl


def means_over_facts(rows: pl.DataFrame, by: Sequence[str], column: str) -> pl.DataFrame:
    """Means of a column over all rows of a group that have it: the columns of ``by``, mean, standard_error (a fact's
    rows are not independent; null for one fact), n (values), and facts that have one."""
    value = pl.col(column)
    groups = rows.group_by({*by, "fact_id"}, maintain_order=True)  # so that sums are the same every time
    per_fact = groups.agg(total=value.sum(), count=value.count().cast(pl.Float64))
    total, count = pl.col("total"), pl.col("count")
    n, facts = count.sum(), (count > 0).sum()
    mean = pl.when(n > 0).then(total.sum() / n)
    spread = ((total - mean * count) ** 2).sum() / n**2
    error = pl.when(facts > 1).then((spread * facts / (facts - 1)).sqrt())
    means = per_fact.group_by(by, maintain_order=True)
    return means.agg(mean=mean, standard_error=error, n=n.cast(pl.Int64), facts=facts.cast(pl.Int64))
