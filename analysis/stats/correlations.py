"""Correlation of a score with an effect at each edited layer, with p-values corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from scipy.stats import pearsonr
from statsmodels.stats.multitest import multipletests

from causalcone.analysis.stats.least_squares import same
from causalcone.analysis.stats.regressions import KEY_SCHEMA, samples
from causalcone.analysis.tables.traces import one_of

Correction = Literal["holm", "bh"]
_METHODS = {"holm": "holm", "bh": "fdr_bh"}

CORRELATION_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    "layer": pl.Int64,
    "edits": pl.Int64,
    "correlation": pl.Float64,
    "p": pl.Float64,
    "p_corrected": pl.Float64,
    "note": pl.String,
}


def layer_correlations(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, correction: Correction = "holm"
) -> pl.DataFrame:
    """Pearson's correlation of each score with the effect at every edited layer (Hase et al. 2023, Figs. 14-22): a row
    for each problem, method, window, score and layer, with ``CORRELATION_SCHEMA``'s columns.

    ``table``: as ``edits_with_effects`` returns it. ``p`` is two-sided; ``p_corrected`` is corrected over the layers of
    each problem, method, window and score: "holm" (family-wise error) or "bh" (false discovery rate). Null, with the
    reason in ``note``, where there are fewer than three edits, or score or effect do not vary.
    """
    one_of("correction", correction, get_args(Correction))
    rows: list[dict[str, Any]] = []
    for sample in samples(table, scores):
        by_layer = []
        for number, layer in enumerate(sample.layers):
            at_layer = sample.layer == number
            correlation = _correlation(sample.score[at_layer], sample.effect[at_layer])
            by_layer.append({**sample.key, "layer": layer, **correlation})
        known = [row for row in by_layer if row["p"] is not None]
        if known:
            corrected = multipletests([row["p"] for row in known], method=_METHODS[correction])[1]
            for row, p in zip(known, corrected, strict=True):
                row["p_corrected"] = float(p)
        rows += by_layer
    return pl.DataFrame(rows, schema=CORRELATION_SCHEMA)


def _correlation(score: np.ndarray, effect: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"edits": len(score), "correlation": None, "p": None, "p_corrected": None, "note": None}
    if len(score) < 3:
        return {**row, "note": "fewer than three edits"}
    for name, values in (("score", score), ("effect", effect)):
        if same(values):
            return {**row, "note": f"the {name} is the same for all edits"}
    correlation, p = pearsonr(effect, score)
    return {**row, "correlation": float(correlation), "p": float(p)}
