"""Does localization inform editing? In one or two sentences, from the tables."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from causalcone.analysis.names import method_name
from causalcone.analysis.paper_tables import Table

MAIN = "table3_rewrite"


def answer(tables: Sequence[Table]) -> str:
    """What share of the rewrite scores' variance edit layers explain, and what tracing effects add to that; where it
    adds the most, and whether that is more than exchanged effects do."""
    main = next((table.frame for table in tables if table.name == MAIN), None)
    known = None if main is None else main.drop_nulls("diff")
    if known is None or known.is_empty():
        return "There is no answer yet: no regression of rewrite scores could be made."
    layer, diff = known["r2_layer"].to_numpy(), known["diff"].to_numpy()
    most = known.sort("diff", descending=True).row(0, named=True)
    where = f"{method_name(most['method'], most['window'])} in {most['problem'].replace('_', ' ')}"
    text = (
        f"The choice of the edit layer explains {layer.min():.0%} to {layer.max():.0%} of the variance of rewrite "
        f"scores (mean {layer.mean():.0%} over {len(known)} problems and methods). Knowing the tracing effect at that "
        f"layer adds {diff.min():.1%} to {diff.max():.1%} (mean {diff.mean():.1%}), the most for {where} "
        f"({most['diff']:.1%})."
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
    own = rewrite.filter(**{name: most[name] for name in ("problem", "method", "window")})
    clear = int((rewrite["p_permutation"].to_numpy() < 0.05).sum())
    there = "" if own.is_empty() else f"Effects taken from other facts add {own['chance'][0]:.1%} there by chance; "
    return f"{there}in {clear} of {len(rewrite)} cases tracing adds more than that (permutation test, p < 0.05)."
