"""Correlation of a score with an effect at each edited layer, with p-values corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from scipy.stats import false_discovery_control, pearsonr

from causalcone.analysis.stats.least_squares import same
from causalcone.analysis.stats.regressions import samples
from causalcone.analysis.tables.traces import one_of

Correction = Literal["holm", "bh"]

CORRELATION_SCHEMA: dict[str, Any] = {
    "problem": pl.String,
    "method": pl.String,
    "window": pl.Int64,
    "score": pl.String,
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
    """Pearson's correlation of each score with the effect at every edited layer (Hase et al. 2023, Figs. 14-22; METHODS
    6): one row per problem, method, window, score and layer, with ``CORRELATION_SCHEMA``'s columns.

    ``table`` is what ``edits_with_effects`` gives. ``p`` is two-sided; ``p_corrected`` is corrected over the layers of
    each problem, method, window and score: "holm" (family-wise error) or "bh" (false discovery rate). Null, with the
    reason in ``note``, where there are fewer than three edits, or score or effect do not vary.
    """
    one_of("correction", correction, get_args(Correction))
    rows: list[dict[str, Any]] = []
    for sample in samples(table, scores):
        own = []
        for number, layer in enumerate(sample.layers):
            here = sample.layer == number
            own.append(
                {**sample.key, "score": sample.name, "layer": layer, **_one(sample.score[here], sample.effect[here])}
            )
        known = [row for row in own if row["p"] is not None]
        if known:
            corrected = _corrected(np.array([row["p"] for row in known]), correction)
            for row, p in zip(known, corrected, strict=True):
                row["p_corrected"] = float(p)
        rows += own
    return pl.DataFrame(rows, schema=CORRELATION_SCHEMA)


def _one(score: np.ndarray, effect: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"edits": len(score), "correlation": None, "p": None, "p_corrected": None, "note": None}
    if len(score) < 3:
        return {**row, "note": "fewer than three edits"}
    for what, values in (("score", score), ("effect", effect)):
        if same(values):
            return {**row, "note": f"the {what} is the same for all edits"}
    correlation, p = pearsonr(effect, score)
    return {**row, "correlation": float(correlation), "p": float(p)}


def _corrected(p: np.ndarray, correction: Correction) -> np.ndarray:
    if correction == "bh":
        return np.asarray(false_discovery_control(p))
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return corrected
