"""The tables of Hase et al. 2023 (2-8) from a sweep's folder, with what the paper prints beside the user's numbers, and
tables of what reviewers ask for besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl

from causalcone.analysis.effects import OTHER_LAYERS, concentrated_facts
from causalcone.analysis.papers.inputs import PUBLISHED, AnalysisInputs, AnalysisOptions
from causalcone.analysis.papers.published_values import (
    PUBLISHED_UNSCALED,
    published_concentrated,
    published_errors,
    published_regressions,
)
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.regressions import GROUP, PREDICTORS, regressions
from causalcone.analysis.stats.uncertainty import bootstrap, left_out_layers, permutation_test
from causalcone.analysis.sweep_results import Study
from causalcone.analysis.tables.names import in_order
from causalcone.analysis.tables.traces import TableError

SCORE_TABLES = {3: "rewrite", 4: "paraphrase", 5: "neighborhood", 6: "overall"}

_KEY = [*GROUP, "score"]
_R2 = [*(f"r2_{name}" for name in PREDICTORS), "diff", "p"]


@dataclass(frozen=True)
class Table:
    """A table to be written: ``frame`` with a column for each of its own, notes below it. name: of its files."""

    name: str
    title: str
    frame: pl.DataFrame
    notes: Sequence[str] = ()


def paper_tables(study: Study, choice: AnalysisOptions = PUBLISHED) -> tuple[list[Table], list[str]]:
    """All tables that the study has data for, and in words what there are none of, and why."""
    material = AnalysisInputs(study, choice)
    makers: list[tuple[str, Callable[[AnalysisInputs], Table]]] = [
        ("table2", _concentrated),
        *(
            (f"table{number}", partial(_score_table, number=number, score=score))
            for number, score in SCORE_TABLES.items()
        ),
        ("table7", _error_table),
        ("uncertainty", _uncertainty),
        ("correlations", _correlations),
        ("unscaled", _unscaled),
        ("left_out_layers", _left_out),
        ("zeroing", _zeroing),
    ]
    tables: list[Table] = []
    lacking: dict[str, list[str]] = {}
    for name, make in makers:
        try:
            tables.append(make(material))
        except TableError as error:
            lacking.setdefault(str(error), []).append(name)
    missing = [f"no {', '.join(names)}: {reason}" for reason, names in lacking.items()]
    return tables, [*study.missing(), *missing]


def _score_table(material: AnalysisInputs, number: int, score: str) -> Table:
    found = in_order(regressions(material.joined, [score], interaction=material.choice.interaction))
    own = found.select(*GROUP, *_R2, "edits", "facts", "layers", "note")
    printed = None if material.published is None else published_regressions(material.published, score)
    title = f"R^2 of the {score} score by edit layer and tracing effect (Hase et al. 2023, Table {number})"
    return Table(f"table{number}_{score}", title, beside(own, printed), material.notes)


def beside(own: pl.DataFrame, printed: pl.DataFrame | None) -> pl.DataFrame:
    """A frame with the printed values in columns of their own."""
    if printed is None:
        return own
    named = printed.rename({name: f"published_{name}" for name in printed.columns if name not in GROUP})
    return own.join(named, on=GROUP, how="left", maintain_order="left")


def _concentrated(material: AnalysisInputs) -> Table:
    """Facts are chosen by their largest effects over tokens, whatever effects their scores are compared with."""
    facts = concentrated_facts(material.largest)
    chosen = facts.filter("concentrated")["fact_id"]
    own = material.joined.filter(pl.col("fact_id").is_in(chosen.implode()))
    told = f"{len(chosen)} of {facts['fact_id'].n_unique()} facts have concentrated effects"
    layers = material.largest["layer"].n_unique()
    if layers <= OTHER_LAYERS + 1:
        told += f", as all positive effects are that over {layers} layers"
    if own.is_empty():
        raise TableError(f"{told}, and none of them is edited")
    found = in_order(regressions(own, ["rewrite"], interaction=material.choice.interaction))
    found = found.select(*GROUP, *_R2, "edits", "facts", "layers", "note")
    printed = None if material.published is None else published_concentrated(material.published)
    title = "R^2 of the rewrite score, facts with concentrated tracing effects (Hase et al. 2023, Table 2)"
    return Table("table2_concentrated", title, beside(found, printed), [told, *material.notes])


def _error_table(material: AnalysisInputs) -> Table:
    found = in_order(regressions(material.joined, ["rewrite", "overall"], interaction=material.choice.interaction))
    rows = []
    for row in found.iter_rows(named=True):
        printed = None
        if material.published is not None and (row["problem"], row["method"]) == ("error_injection", "rome"):
            printed = published_errors(material.published, row["score"])
        for metric in ("r2", "rmse", "mae"):
            own = {name: row[name] for name in (*GROUP, "score")} | {"metric": metric}
            own |= {name: row[f"{metric}_{name}"] for name in PREDICTORS}
            if printed is not None:
                layer, trace = printed.filter(metric=metric).select("layer", "trace").row(0)
                own |= {"published_layer": layer, "published_trace": trace}
            rows.append(own)
    number = 8 if material.study.published == "hase2023-zsre" else 7
    title = f"Errors of the regressions, in sample (Hase et al. 2023, Table {number})"
    return Table(f"table{number}_errors", title, pl.DataFrame(rows, infer_schema_length=None), material.notes)


def _uncertainty(material: AnalysisInputs) -> Table:
    """What tracing adds, with intervals and tests that do not take a fact's edits for independent."""
    joined, choice, scores = material.joined, material.choice, list(SCORE_TABLES.values())
    drawn: dict[str, Any] = {"interaction": choice.interaction, "draws": choice.draws, "seed": choice.seed}
    own = regressions(joined, scores, interaction=choice.interaction).select(*_KEY, "facts", "diff", "p")
    tests = [
        bootstrap(joined, scores, level=choice.level, **drawn).select(*_KEY, "diff_low", "diff_high"),
        permutation_test(joined, scores, **drawn).select(
            *_KEY, "chance", p_permutation="p", permutation_facts="facts", permutation_diff="diff", _permutation="note"
        ),
        cluster_robust_tests(joined, scores, interaction=choice.interaction).select(
            *_KEY, p_clustered="p", _clustered="note"
        ),
    ]
    if choice.mixed:
        mixed = mixed_effects(joined, scores, interaction=choice.interaction)
        tests.append(mixed.select(*_KEY, "fact_share", p_mixed="p", _mixed="note"))
    for test in tests:
        own = own.join(test, on=_KEY, how="left", maintain_order="left")
    told = [name for name in own.columns if name.startswith("_")]
    note = pl.concat_str([pl.format(f"p{name}: {{}}", name) for name in told], separator="; ", ignore_nulls=True)
    own = own.with_columns(note=pl.when(note != "").then(note)).drop(told)
    notes = [
        f"diff_low, diff_high: {choice.level:.0%} interval, bootstrap over facts, {choice.draws} draws; chance: what "
        "effects exchanged between facts add on average; p: F-test as published; p_permutation: share of exchanges "
        "that add as much as the effects themselves (permutation_diff), of the facts with edits and effects at all "
        "layers (permutation_facts); p_clustered: Wald test robust to what a fact's edits have in common (rejects too "
        "often with fewer than about 40 facts)",
        *material.notes,
    ]
    return Table("uncertainty", "What tracing adds to the edit layer, and how sure that is", in_order(own), notes)


def _correlations(material: AnalysisInputs) -> Table:
    correction = material.choice.correction
    found = in_order(layer_correlations(material.joined, ["rewrite", "overall"], correction=correction))
    notes = [f"p_corrected: over the layers of a problem, method and score, {correction}", *material.notes]
    return Table("correlations", "Correlation of score and tracing effect at each edit layer", found, notes)


def _unscaled(material: AnalysisInputs) -> Table:
    """Rewrite magnitude and the absolute effect at the last subject token, as Meng et al. 2022 measure."""
    kind, window = material.state
    correction = material.choice.correction
    found = in_order(layer_correlations(material.absolute, ["rewrite_magnitude"], correction=correction))
    if material.study.published == "hase2023-gptj" and material.state == material.study.main_state():
        printed = pl.when(problem="error_injection", method="rome", layer=PUBLISHED_UNSCALED[0])
        found = found.with_columns(published_correlation=printed.then(pl.lit(PUBLISHED_UNSCALED[1])))
    notes = [
        "rewrite magnitude: p(new target) - p(true target) after the edit, in Tracing Reversal p(target) - p(other "
        f"target); effects are absolute, of {kind}:{window} at the last subject token; p_corrected: {correction}"
    ]
    title = "Correlation of rewrite magnitude and absolute tracing effect (Hase et al. 2023, Fig. 14)"
    return Table("unscaled", title, found, notes)


def _left_out(material: AnalysisInputs) -> Table:
    found = in_order(left_out_layers(material.joined, ["rewrite", "overall"]))
    notes = ["a row without a layer is of all layers together", *material.notes]
    return Table("left_out_layers", "Error of predicting the edits at a layer from those at all others", found, notes)


def _zeroing(material: AnalysisInputs) -> Table:
    kind, window = material.zeroed_state
    found = in_order(regressions(material.zeroed, ["rewrite", "overall"], interaction=material.choice.interaction))
    own = found.select(*GROUP, "score", *_R2, "edits", "facts", "layers", "note")
    notes = [f"effects of zeroing {kind}:{window} at the subject; {material.form}"]
    return Table("zeroing", "R^2 by edit layer and zeroing effect (Hase et al. 2023, Figs. 21-22)", own, notes)
