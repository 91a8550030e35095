"""Does localization inform editing? In one or two sentences, from the tables."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from causalcone.analysis.papers.tables import Table
from causalcone.analysis.stats.regressions import GROUP
from causalcone.analysis.tables.names import method_name

MAIN = "table3_rewrite"

_NONE = "There is no answer yet"


def answer(tables: Sequence[Table]) -> str:
    """What share of the rewrite scores' variance edit layers explain, and what tracing effects add to that; where it
    adds the most, and whether that is more than exchanged effects do."""
    main = next((table.frame for table in tables if table.name == MAIN), None)
    if main is None or main.is_empty():
        return f"{_NONE}: no regression of rewrite scores could be made."
    # R^2 of one layer, or of as many coefficients as edits, says nothing
    known = main.filter(pl.col("p").is_not_null() & (pl.col("layers") > 1))
    if known.is_empty():
        reasons = main["note"].drop_nulls().unique(maintain_order=True)
        return f"{_NONE}: no regression of rewrite scores could be tested ({'; '.join(reasons)})."
    layer, diff = known["r2_layer"].to_numpy(), known["diff"].to_numpy()
    most = known.sort("diff", descending=True).row(0, named=True)
    where = f"{method_name(most['method'], most['window'])} in {most['problem'].replace('_', ' ')}"
    text = (
        f"The choice of the edit layer explains {layer.min():z.0%} to {layer.max():z.0%} of the variance of rewrite "
        f"scores (mean {layer.mean():z.0%} over {len(known)} problems and methods). Knowing the tracing effect at that "
        f"layer adds {diff.min():z.1%} to {diff.max():z.1%} (mean {diff.mean():z.1%}), the most for {where} "
        f"({most['diff']:z.1%})."
    )
    chance = _chance(tables, most)
    return text if chance is None else f"{text} {chance}"


def _chance(tables: Sequence[Table], most: dict[str, object]) -> str | None:
    """What effects of other facts add where tracing adds the most, and in how many cases tracing adds more."""
    frame = next((table.frame for table in tables if table.name == "uncertainty"), None)
    if frame is None:
        return None
    rewrite = frame.filter(pl.col("score") == "rewrite").drop_nulls("p_permutation")
    if rewrite.is_empty():
        return None
    there = ""
    for row in rewrite.filter(**{name: most[name] for name in GROUP}).iter_rows(named=True):
        there = f"Effects taken from other facts add {row['chance']:z.1%} there by chance"
        if row["permutation_facts"] < row["facts"]:
            some = f"{row['permutation_facts']} of {row['facts']} facts"
            there += f", over the {some} that have all layers, whose own effects add {row['permutation_diff']:z.1%}"
        there += "; "
    clear = int((rewrite["p_permutation"].to_numpy() < 0.05).sum())
    return f"{there}in {clear} of {len(rewrite)} cases tracing adds more than that (permutation test, p < 0.05)."
