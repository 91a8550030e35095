"""The tables of Hase et al. 2023 (2-8) from a sweep's folder, with what the paper prints beside the user's numbers, and
tables of what reviewers ask for besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl

from causalcone.analysis.correlations import Correction, layer_correlations
from causalcone.analysis.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.effects import Denominator, absolute_effects, concentrated_facts
from causalcone.analysis.joined import edits_with_effects
from causalcone.analysis.names import in_order
from causalcone.analysis.published_values import (
    PUBLISHED_UNSCALED,
    published_concentrated,
    published_errors,
    published_regressions,
)
from causalcone.analysis.regressions import GROUP, PREDICTORS, regressions
from causalcone.analysis.study import ZEROED, At, State, Study
from causalcone.analysis.tables import TableError
from causalcone.analysis.uncertainty import bootstrap, left_out_layers, permutation_test

SCORE_TABLES = {3: "rewrite", 4: "paraphrase", 5: "neighborhood", 6: "overall"}

_R2 = [*(f"r2_{name}" for name in PREDICTORS), "diff", "p"]


@dataclass(frozen=True)
class Table:
    """A table to be written: ``frame`` with a column for each of its own, notes below it. name: of its files."""

    name: str
    title: str
    frame: pl.DataFrame
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """How the tables are computed; published protocol: interaction, the largest effect over tokens, p_high.

    state: whose effects, the study's main state by default; draws: of the bootstrap and the permutation test; mixed:
    whether mixed-effects models are fitted, which takes long.
    """

    state: State | None = None
    at: At = "max"
    denominator: Denominator = "p_high"
    interaction: bool = True
    draws: int = 1000
    mixed: bool = False
    correction: Correction = "holm"
    level: float = 0.95
    seed: int = 0

    def header(self, study: Study, state: State) -> str:
        """What the tables were computed with, in words."""
        where = "largest over prompt tokens" if self.at == "max" else "at the last subject token"
        form = "with interaction" if self.interaction else "additive"
        prompts = "the first paraphrase and neighbour" if study.aggregate == "first" else "means over prompts"
        return (
            f"effects of {state[0]}:{state[1]}, {where}, over {self.denominator}; layer and effect {form}; scores of "
            f"{prompts}, floored at 0"
        )


PUBLISHED = Choice()


def paper_tables(study: Study, choice: Choice = PUBLISHED) -> tuple[list[Table], list[str]]:
    """All tables that the study has data for, and in words what there are none of, and why."""
    missing = list(study.missing())
    state = choice.state or study.main_state()
    if state is None:
        return [], [*missing, "no table: there are no traces"]
    try:
        joined = study.joined(state, choice.at, choice.denominator)
        effects = study.effects(state, choice.at, choice.denominator)
    except TableError as error:
        return [], [*missing, f"no table: {error}"]
    of = (study, choice, state, joined)
    makers: list[tuple[str, Callable[[], Table]]] = [
        ("table2", partial(_concentrated, *of, effects)),
        *((f"table{number}", partial(_score_table, *of, number, score)) for number, score in SCORE_TABLES.items()),
        ("table7", partial(_error_table, *of)),
        ("uncertainty", partial(_uncertainty, *of)),
        ("correlations", partial(_correlations, *of)),
        ("unscaled", partial(_unscaled, study, choice, state)),
        ("left_out_layers", partial(_left_out, *of)),
        ("zeroing", partial(_zeroing, study, choice)),
    ]
    tables = []
    for name, make in makers:
        try:
            tables.append(make())
        except TableError as error:
            missing.append(f"no {name}: {error}")
    return tables, missing


def _score_table(study: Study, choice: Choice, state: State, joined: pl.DataFrame, number: int, score: str) -> Table:
    found = in_order(regressions(joined, [score], interaction=choice.interaction))
    own = found.select(*GROUP, *_R2, "edits", "facts", "note")
    printed = None if study.published is None else published_regressions(study.published, score)
    title = f"R^2 of the {score} score by edit layer and tracing effect (Hase et al. 2023, Table {number})"
    return Table(f"table{number}_{score}", title, beside(own, printed), [choice.header(study, state)])


def beside(own: pl.DataFrame, printed: pl.DataFrame | None) -> pl.DataFrame:
    """A frame with the printed values in columns of their own."""
    if printed is None:
        return own
    named = printed.rename({name: f"published_{name}" for name in printed.columns if name not in GROUP})
    return own.join(named, on=GROUP, how="left", maintain_order="left")


def _concentrated(study: Study, choice: Choice, state: State, joined: pl.DataFrame, effects: pl.DataFrame) -> Table:
    facts = concentrated_facts(effects)
    chosen = facts.filter("concentrated")["fact_id"]
    own = joined.filter(pl.col("fact_id").is_in(chosen.implode()))
    told = f"{len(chosen)} of {facts['fact_id'].n_unique()} facts have concentrated effects"
    if own.is_empty():
        raise TableError(f"{told}, and none of them is edited")
    found = in_order(regressions(own, ["rewrite"], interaction=choice.interaction)).select(
        *GROUP, *_R2, "edits", "note"
    )
    printed = None if study.published is None else published_concentrated(study.published)
    title = "R^2 of the rewrite score, facts with concentrated tracing effects (Hase et al. 2023, Table 2)"
    return Table("table2_concentrated", title, beside(found, printed), [told, choice.header(study, state)])


def _error_table(study: Study, choice: Choice, state: State, joined: pl.DataFrame) -> Table:
    found = in_order(regressions(joined, ["rewrite", "overall"], interaction=choice.interaction))
    rows = []
    for row in found.iter_rows(named=True):
        printed = None
        if study.published is not None and (row["problem"], row["method"]) == ("error_injection", "rome"):
            printed = published_errors(study.published, row["score"])
        for metric in ("r2", "rmse", "mae"):
            own = {name: row[name] for name in (*GROUP, "score")} | {"metric": metric}
            own |= {name: row[f"{metric}_{name}"] for name in PREDICTORS}
            if printed is not None:
                layer, trace = printed.filter(metric=metric).select("layer", "trace").row(0)
                own |= {"published_layer": layer, "published_trace": trace}
            rows.append(own)
    number = 8 if study.published == "hase2023-zsre" else 7
    title = f"Errors of the regressions, in sample (Hase et al. 2023, Table {number})"
    return Table(
        f"table{number}_errors", title, pl.DataFrame(rows, infer_schema_length=None), [choice.header(study, state)]
    )


def _uncertainty(study: Study, choice: Choice, state: State, joined: pl.DataFrame) -> Table:
    """What tracing adds, with intervals and tests that do not take a fact's edits for independent."""
    scores = list(SCORE_TABLES.values())
    key = [*GROUP, "score"]
    drawn: dict[str, Any] = {"interaction": choice.interaction, "draws": choice.draws, "seed": choice.seed}
    own = regressions(joined, scores, interaction=choice.interaction).select(*key, "diff", "p")
    intervals = bootstrap(joined, scores, level=choice.level, **drawn).select(*key, "diff_low", "diff_high")
    chance = permutation_test(joined, scores, **drawn)
    robust = cluster_robust_tests(joined, scores, interaction=choice.interaction)
    table = own.join(intervals, on=key, how="left", maintain_order="left")
    table = table.join(
        chance.select(*key, chance="chance", p_permutation="p"), on=key, how="left", maintain_order="left"
    ).join(robust.select(*key, p_clustered="p"), on=key, how="left", maintain_order="left")
    if choice.mixed:
        mixed = mixed_effects(joined, scores, interaction=choice.interaction)
        table = table.join(mixed.select(*key, "fact_share", p_mixed="p"), on=key, how="left", maintain_order="left")
    notes = [
        f"diff_low, diff_high: {choice.level:.0%} interval, bootstrap over facts, {choice.draws} draws; chance: what "
        "effects exchanged between facts add on average; p: F-test as published; p_permutation: share of exchanges "
        "that add as much; p_clustered: Wald test robust to what a fact's edits have in common (rejects too often with "
        "fewer than about 40 facts)",
        choice.header(study, state),
    ]
    return Table("uncertainty", "What tracing adds to the edit layer, and how sure that is", in_order(table), notes)


def _correlations(study: Study, choice: Choice, state: State, joined: pl.DataFrame) -> Table:
    found = in_order(layer_correlations(joined, ["rewrite", "overall"], correction=choice.correction))
    notes = [
        f"p_corrected: over the layers of a problem, method and score, {choice.correction}",
        choice.header(study, state),
    ]
    return Table("correlations", "Correlation of score and tracing effect at each edit layer", found, notes)


def _unscaled(study: Study, choice: Choice, state: State) -> Table:
    """Rewrite magnitude and the absolute effect at the last subject token, as Meng et al. 2022 measure."""
    kind, window = state
    absolute = absolute_effects(study.traces.filter(kind=kind, window=window))
    joined = edits_with_effects(study.scores, absolute)
    found = in_order(layer_correlations(joined, ["rewrite_magnitude"], correction=choice.correction))
    if study.published == "hase2023-gptj":
        printed = pl.when(problem="error_injection", method="rome", layer=PUBLISHED_UNSCALED[0])
        found = found.with_columns(published_correlation=printed.then(pl.lit(PUBLISHED_UNSCALED[1])))
    notes = [
        "rewrite magnitude: p(target) - p(other target) after the edit; effects are absolute, of "
        f"{kind}:{window} at the last subject token; p_corrected: {choice.correction}"
    ]
    title = "Correlation of rewrite magnitude and absolute tracing effect (Hase et al. 2023, Fig. 14)"
    return Table("unscaled", title, found, notes)


def _left_out(study: Study, choice: Choice, state: State, joined: pl.DataFrame) -> Table:
    found = in_order(left_out_layers(joined, ["rewrite", "overall"]))
    return Table(
        "left_out_layers",
        "Error of predicting the edits at a layer from those at all others",
        found,
        ["a row without a layer is of all layers together", choice.header(study, state)],
    )


def _zeroing(study: Study, choice: Choice) -> Table:
    state = study.main_state(ZEROED)
    if state is None:
        raise TableError("there are no zeroed states")
    joined = edits_with_effects(study.scores, study.zeroing(state))
    found = in_order(regressions(joined, ["rewrite", "overall"], interaction=choice.interaction))
    own = found.select(*GROUP, "score", *_R2, "edits", "note")
    form = "with interaction" if choice.interaction else "additive"
    notes = [f"effects of zeroing {state[0]}:{state[1]} at the subject; layer and effect {form}"]
    return Table("zeroing", "R^2 by edit layer and zeroing effect (Hase et al. 2023, Figs. 21-22)", own, notes)
