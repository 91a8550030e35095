"""Correlation of a score with an effect at each edited layer, with p-values corrected for how many there are."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from scipy.stats import false_discovery_control, pearsonr

from causalcone.analysis.stats.least_squares import same
from causalcone.analysis.stats.regressions import KEY_SCHEMA, samples
from causalcone.analysis.tables.traces import one_of

Correction = Literal["holm", "bh"]

CORRELATION_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    **dict.fromkeys(("layer", "edits"), pl.Int64),
    **dict.fromkeys(("correlation", "p", "p_corrected"), pl.Float64),
    "note": pl.String,
}


def layer_correlations(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, correction: Correction = "holm"
) -> pl.DataFrame:
    """Pearson's correlation of each score with the effect at every edited layer of ``edits_with_effects`` (Hase et al.
    2023, Figs. 14-22): a row for each problem, method, window, score and layer. ``p`` is two-sided; ``p_corrected`` is
    corrected over the layers: "holm" (family-wise error) or "bh" (false discovery rate). Null, with the reason in
    ``note``, where there are fewer than three edits, or score or effect do not vary."""
    one_of("correction", correction, get_args(Correction))
    rows: list[dict[str, Any]] = []
    for sample in samples(table, scores):
        layers = [(layer, sample.layer == number) for number, layer in enumerate(sample.layers)]
        by_layer = [
            {**sample.key, "layer": layer, **_correlation(sample.score[edits], sample.effect[edits])}
            for layer, edits in layers
        ]
        if known := [row for row in by_layer if "p" in row]:
            corrected = _CORRECTIONS[correction](np.array([row["p"] for row in known]))
            for row, p in zip(known, corrected, strict=True):
                row["p_corrected"] = float(p)
        rows += by_layer
    return pl.DataFrame(rows, schema=CORRELATION_SCHEMA)


def _holm(p: np.ndarray) -> np.ndarray:
    """P-values after Holm (1979): the smallest times their number, the next times one less, and so on, none below one
    before. statsmodels' own collects all of Python's garbage at every call."""
    order, stepped = p.argsort(), np.empty_like(p)
    stepped[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return stepped


_CORRECTIONS = {"holm": _holm, "bh": false_discovery_control}


def _correlation(score: np.ndarray, effect: np.ndarray) -> dict[str, Any]:
    if len(score) < 3:
        return {"edits": len(score), "note": "fewer than three edits"}
    for name, values in (("score", score), ("effect", effect)):
        if same(values):
            return {"edits": len(score), "note": f"the {name} is the same for all edits"}
    correlation, p = pearsonr(effect, score)
    return {"edits": len(score), "correlation": float(correlation), "p": float(p)}
