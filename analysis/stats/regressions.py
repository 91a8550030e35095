"""Regressions of scores on layers and localization effects (docs/analysis.md, "The question")."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from causalcone.analysis.scores import refuse_unknown_scores
from causalcone.analysis.stats.least_squares import Fit, Floats, Model, f_test, fit, same

GROUP = ["problem", "method", "window"]
PREDICTORS = ("layer", "trace", "both")

Columns = dict[str, Any]
KEY_SCHEMA: Columns = {"problem": pl.String, "method": pl.String, "window": pl.Int64, "score": pl.String}
F_SCHEMA: Columns = {"f": pl.Float64, "f_added": pl.Int64, "f_left": pl.Int64, "p": pl.Float64}
REGRESSION_SCHEMA: Columns = {
    **KEY_SCHEMA,
    **dict.fromkeys(("edits", "facts", "layers"), pl.Int64),
    **{f"r2_{name}": pl.Float64 for name in PREDICTORS},
    "diff": pl.Float64,
    **F_SCHEMA,
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
        notes = [f"all edits are at layer {layer}" for layer in self.layers if len(self.layers) == 1]
        return notes + ["the effect is the same for all edits"] * (len(self) > 0 and same(self.effect))


def samples(table: pl.DataFrame, names: Sequence[str] = ("rewrite",)) -> Iterator[RegressionData]:
    """A sample of each problem, method, window and score of ``edits_with_effects``; ``TableError`` for other scores."""
    refuse_unknown_scores(names, "explain")
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
    """Ordinary least squares of each score on the edited layer as a factor, on the effect there, and on both, with
    interaction or without (Hase et al. 2023, Tables 2-8): a row per problem, method, window and score of
    ``edits_with_effects``. diff: r2_both - r2_layer; f, f_added, f_left, p: the F-test of both against the layer alone;
    rmse and mae: in sample, over n. Where a score is the same for all edits, or no edit has it, there are no
    coefficients, and ``note`` says why; it also names a single layer, and effects that do not vary."""
    return by_sample(table, scores, REGRESSION_SCHEMA, lambda sample: _row(sample, interaction))


def by_sample(
    table: pl.DataFrame, scores: Sequence[str], columns: Columns, row: Callable[[RegressionData], dict[str, Any]]
) -> pl.DataFrame:
    """Rows of columns besides the key, one for each sample; columns that a row lacks are null."""
    rows = [{**sample.key, **row(sample)} for sample in samples(table, scores)]
    return pl.DataFrame(rows, schema=KEY_SCHEMA | columns)


def fits(sample: RegressionData, interaction: bool = True) -> dict[str, Fit]:
    """The models of a sample by ``PREDICTORS``."""
    models: tuple[Model, ...] = ("layer", "trace", "interaction" if interaction else "additive")
    fitted = (fit(sample.score, sample.effect, sample.layer, model) for model in models)
    return dict(zip(PREDICTORS, fitted, strict=True))


def _row(sample: RegressionData, interaction: bool) -> dict[str, Any]:
    row = {"edits": len(sample), "facts": len(sample.facts), "layers": len(sample.layers)}
    if sample.lack is not None:
        return {**row, "note": sample.lack}
    models = fits(sample, interaction)
    test = f_test(models["layer"], models["both"])
    notes = [*sample.notes, *([f"there is no F-test: {test.pop('lack')}"] if "lack" in test else [])]
    errors = {f"{of}_{name}": getattr(model, of) for of in ("r2", "rmse", "mae") for name, model in models.items()}
    diff = models["both"].r2 - models["layer"].r2
    return {**row, **errors, "diff": diff, **test, "note": "; ".join(notes) or None}
