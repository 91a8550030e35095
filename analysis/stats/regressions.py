"""Regressions of scores on layers and localization effects (docs/analysis.md, "The question")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from causalcone.analysis.scores import SCORES
from causalcone.analysis.stats.least_squares import Fit, Floats, f_test, fit, same
from causalcone.analysis.tables.traces import TableError

GROUP = ["problem", "method", "window"]
PREDICTORS = ("layer", "trace", "both")

KEY_SCHEMA: dict[str, Any] = {"problem": pl.String, "method": pl.String, "window": pl.Int64, "score": pl.String}
REGRESSION_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    "edits": pl.Int64,
    "facts": pl.Int64,
    "layers": pl.Int64,
    **{f"r2_{name}": pl.Float64 for name in PREDICTORS},
    "diff": pl.Float64,
    "f": pl.Float64,
    "f_added": pl.Int64,
    "f_left": pl.Int64,
    "p": pl.Float64,
    **{f"{error}_{name}": pl.Float64 for error in ("rmse", "mae") for name in PREDICTORS},
    "note": pl.String,
}


@dataclass(frozen=True, kw_only=True)
class RegressionData:
    """The edits of a problem, method and window that have a score and an effect. key: these and the score's name;
    score, effect: (n,); layer, fact: (n,), numbers from 0 without gaps, in the order of ``layers`` and ``facts``."""

    key: dict[str, Any]
    score: Floats
    effect: Floats
    layer: NDArray[np.int64]
    fact: NDArray[np.int64]
    layers: Sequence[int]
    facts: Sequence[str]

    def __len__(self) -> int:
        return len(self.score)

    @property
    def lack(self) -> str | None:
        """Why there is nothing to explain, where that is so."""
        if len(self) == 0:
            return "no edit has this score"
        if same(self.score):
            return "the score is the same for all edits"
        return None

    @property
    def notes(self) -> list[str]:
        """Why the regressions are less than they could be."""
        notes = []
        if len(self.layers) == 1:
            notes.append(f"all edits are at layer {self.layers[0]}")
        if len(self) and same(self.effect):
            notes.append("the effect is the same for all edits")
        return notes


def samples(table: pl.DataFrame, names: Sequence[str] = ("rewrite",)) -> Iterator[RegressionData]:
    """Data to explain: a sample for each problem, method, window, and score of ``names``; table: as
    ``edits_with_effects`` returns it."""
    unknown = [name for name in names if name not in SCORES]
    if unknown or not names:
        raise TableError(f"there are no scores {', '.join(unknown) or 'to explain'}; choose from {', '.join(SCORES)}")
    for key, group in table.group_by(GROUP, maintain_order=True):
        for name in names:
            edits = group.filter(pl.col(name).is_not_null() & pl.col("effect").is_not_null())
            layers, facts = (edits[column].unique().sort() for column in ("layer", "fact_id"))
            yield RegressionData(
                key=dict(zip(KEY_SCHEMA, (*key, name), strict=True)),
                score=edits[name].to_numpy(),
                effect=edits["effect"].to_numpy(),
                layer=layers.search_sorted(edits["layer"]).cast(pl.Int64).to_numpy(),
                fact=facts.search_sorted(edits["fact_id"]).cast(pl.Int64).to_numpy(),
                layers=layers.to_list(),
                facts=facts.to_list(),
            )


def regressions(table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, interaction: bool = True) -> pl.DataFrame:
    """Ordinary least squares of each score on the edited layer as a factor, on the effect there, and on both (Hase et
    al. 2023, Tables 2-8): one row per problem, method, window and score, with ``REGRESSION_SCHEMA``'s columns.

    ``table`` is as ``edits_with_effects`` returns it. ``interaction``: both with their interaction, as published, or
    without. r2_layer, r2_trace, r2_both: the coefficients of determination; diff: r2_both - r2_layer; f, f_added,
    f_left, p: the F-test of both against the layer alone and its degrees of freedom; rmse and mae: in sample, over n.
    Where a score is the same for all edits, or no edit has it, there are no coefficients, and ``note`` says why; it
    also names a single layer, and effects that do not vary. Raises ``TableError`` for unknown scores.
    """
    rows = [_row(sample, interaction) for sample in samples(table, scores)]
    return pl.DataFrame(rows, schema=REGRESSION_SCHEMA)


def fits(sample: RegressionData, interaction: bool = True) -> dict[str, Fit]:
    """The three models of a sample."""
    both = "interaction" if interaction else "additive"
    return {
        "layer": fit(sample.score, sample.effect, sample.layer, "layer"),
        "trace": fit(sample.score, sample.effect, sample.layer, "trace"),
        "both": fit(sample.score, sample.effect, sample.layer, both),  # type: ignore[arg-type]
    }


def _row(sample: RegressionData, interaction: bool) -> dict[str, Any]:
    row = {**sample.key, "edits": len(sample), "facts": len(sample.facts), "layers": len(sample.layers)}
    if sample.lack is not None:
        return {**row, "note": sample.lack}
    models = fits(sample, interaction)
    test = f_test(models["layer"], models["both"])
    notes = sample.notes
    if test.lack is not None:
        notes.append(f"there is no F-test: {test.lack}")
    return {
        **row,
        **{f"r2_{name}": model.r2 for name, model in models.items()},
        "diff": models["both"].r2 - models["layer"].r2,
        "f": test.statistic,
        "f_added": test.added,
        "f_left": test.left,
        "p": test.p,
        **{f"rmse_{name}": model.rmse for name, model in models.items()},
        **{f"mae_{name}": model.mae for name, model in models.items()},
        "note": "; ".join(notes) or None,
    }
