"""The tables of Hase et al. 2023 (2-8) from a sweep's folder, with printed values beside the user's numbers, tables of
intervals and further tests, and the answer in a few sentences."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import polars as pl

from causalcone.analysis.effects import OTHER_LAYERS, concentrated_facts
from causalcone.analysis.papers.inputs import PUBLISHED, AnalysisInputs, AnalysisOptions
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.regressions import GROUP, KEY_SCHEMA, PREDICTORS
from causalcone.analysis.stats.uncertainty import bootstrap, left_out_layers, permutation_test
from causalcone.analysis.sweep_results import Study
from causalcone.analysis.tables.names import in_order, method_name, words
from causalcone.analysis.tables.traces import TableError
from causalcone.engine.schemas import ERROR_INJECTION

SCORE_TABLES = {3: "rewrite", 4: "paraphrase", 5: "neighborhood", 6: "overall"}

MAIN = "table3_rewrite"
_NONE = "There is no answer yet"

PUBLISHED_UNSCALED = (5, -0.006)
"""The layer, counted from 0, and the correlation of Hase et al. 2023, Fig. 14: ROME on GPT-J in Error Injection."""

STUDIES = ("hase2023-gptj", "hase2023-zsre")
"""The studies that there are published tables of."""

_KEY = [*GROUP, "score"]
_R2 = [*(f"r2_{name}" for name in PREDICTORS), "diff", "p"]
_SHOWN = [*_R2, "edits", "facts", "layers", "note"]


@dataclass(frozen=True)
class Table:
    """A table to be written: its columns are those of ``frame``, notes stand below it. name: of its files."""

    name: str
    title: str
    frame: pl.DataFrame
    notes: Sequence[str] = ()


def paper_tables(study: Study, options: AnalysisOptions = PUBLISHED) -> tuple[list[Table], list[str]]:
    """All tables that the study has data for; and in words which are missing, and why."""
    inputs = AnalysisInputs(study, options)
    makers: list[tuple[str, Callable[[AnalysisInputs], Table]]] = [
        ("table2", _concentrated),
        *((f"table{number}", partial(_score_table, number=number)) for number in SCORE_TABLES),
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
            tables.append(make(inputs))
        except TableError as error:
            lacking.setdefault(str(error), []).append(name)
    missing = [f"no {', '.join(names)}: {reason}" for reason, names in lacking.items()]
    return tables, [*study.missing(), *missing]


def _score_table(inputs: AnalysisInputs, number: int) -> Table:
    score = SCORE_TABLES[number]
    fitted = inputs.regressions(inputs.joined, score)
    printed = published_regressions(inputs.published, score)
    title = f"R^2 of the {score} score by edit layer and tracing effect (Hase et al. 2023, Table {number})"
    return Table(f"table{number}_{score}", title, beside(fitted.select(*GROUP, *_SHOWN), printed), inputs.notes)


def beside(frame: pl.DataFrame, printed: pl.DataFrame | None) -> pl.DataFrame:
    """A frame with printed values in further columns."""
    if printed is None:
        return frame
    named = printed.rename({name: f"published_{name}" for name in printed.columns if name not in GROUP})
    return frame.join(named, on=GROUP, how="left", maintain_order="left")


def _concentrated(inputs: AnalysisInputs) -> Table:
    """Facts are chosen by their largest effects over tokens, whatever effects their scores are compared with."""
    facts = concentrated_facts(inputs.largest)
    concentrated = facts.filter("concentrated")["fact_id"]
    joined = inputs.joined.filter(pl.col("fact_id").is_in(concentrated.implode()))
    note = f"{len(concentrated)} of {facts['fact_id'].n_unique()} facts have concentrated effects"
    layers = inputs.largest["layer"].n_unique()
    if layers <= OTHER_LAYERS + 1:
        note += f", as all positive effects are that over {layers} layers"
    if joined.is_empty():
        raise TableError(f"{note}, and none of them is edited")
    fitted = inputs.regressions(joined, "rewrite")
    printed = published_concentrated(inputs.published)
    title = "R^2 of the rewrite score, facts with concentrated tracing effects (Hase et al. 2023, Table 2)"
    return Table("table2_concentrated", title, beside(fitted.select(*GROUP, *_SHOWN), printed), [note, *inputs.notes])


def _error_table(inputs: AnalysisInputs) -> Table:
    fitted = inputs.regressions(inputs.joined, "rewrite", "overall")
    rows = []
    for row in fitted.iter_rows(named=True):
        of_rome = (row["problem"], row["method"]) == (ERROR_INJECTION, "rome")
        printed = published_errors(inputs.published, row["score"]) if of_rome else None
        for metric in ("r2", "rmse", "mae"):
            errors = {name: row[name] for name in _KEY} | {"metric": metric}
            errors |= {name: row[f"{metric}_{name}"] for name in PREDICTORS}
            if printed is not None:
                layer, trace = printed.filter(metric=metric).select("layer", "trace").row(0)
                errors |= {"published_layer": layer, "published_trace": trace}
            rows.append(errors)
    number = 8 if inputs.study.published == "hase2023-zsre" else 7
    title = f"Errors of the regressions, in sample (Hase et al. 2023, Table {number})"
    return Table(f"table{number}_errors", title, pl.DataFrame(rows, infer_schema_length=None), inputs.notes)


def _uncertainty(inputs: AnalysisInputs) -> Table:
    """R^2 that tracing adds, with intervals and tests that do not take a fact's edits for independent."""
    joined, options, scores = inputs.joined, inputs.options, list(SCORE_TABLES.values())
    form: dict[str, Any] = {"interaction": options.interaction}
    draws = {**form, "draws": options.draws, "seed": options.seed}
    frame = inputs.regressions(joined, *scores).select(*_KEY, "facts", "diff", "p")
    tests = [
        bootstrap(joined, scores, level=options.level, **draws).select(*_KEY, "diff_low", "diff_high"),
        permutation_test(joined, scores, **draws).select(
            *_KEY, "chance", p_permutation="p", permutation_facts="facts", permutation_diff="diff", _permutation="note"
        ),
        cluster_robust_tests(joined, scores, **form).select(*_KEY, p_clustered="p", _clustered="note"),
    ]
    if options.mixed:
        mixed = mixed_effects(joined, scores, **form)
        tests.append(mixed.select(*_KEY, "fact_share", p_mixed="p", _mixed="note"))
    for test in tests:
        frame = frame.join(test, on=_KEY, how="left", maintain_order="left")
    reasons = [name for name in frame.columns if name.startswith("_")]
    note = pl.concat_str([pl.format(f"p{name}: {{}}", name) for name in reasons], separator="; ", ignore_nulls=True)
    frame = frame.with_columns(note=pl.when(note != "").then(note)).drop(reasons)
    notes = [
        f"diff_low, diff_high: {options.level:.0%} interval, bootstrap over facts, {options.draws} draws; chance: what "
        "effects exchanged between facts add on average; p: F-test as published; p_permutation: share of exchanges "
        "that add as much as the effects themselves (permutation_diff), of the facts with edits and effects at all "
        "layers (permutation_facts); p_clustered: Wald test robust to what a fact's edits have in common (rejects too "
        "often with fewer than about 40 facts)",
        *inputs.notes,
    ]
    return Table("uncertainty", "What tracing adds to the edit layer, and how sure that is", in_order(frame), notes)


def _correlations(inputs: AnalysisInputs) -> Table:
    correction = inputs.options.correction
    frame = in_order(layer_correlations(inputs.joined, ["rewrite", "overall"], correction=correction))
    notes = [f"p_corrected: over the layers of a problem, method and score, {correction}", *inputs.notes]
    return Table("correlations", "Correlation of score and tracing effect at each edit layer", frame, notes)


def _unscaled(inputs: AnalysisInputs) -> Table:
    """Rewrite magnitude and the absolute effect at the last subject token, as Meng et al. 2022 measure."""
    kind, window = inputs.state
    correction = inputs.options.correction
    frame = in_order(layer_correlations(inputs.absolute, ["rewrite_magnitude"], correction=correction))
    if inputs.study.published == "hase2023-gptj" and inputs.state == inputs.study.main_state():
        printed = pl.when(problem=ERROR_INJECTION, method="rome", layer=PUBLISHED_UNSCALED[0])
        frame = frame.with_columns(published_correlation=printed.then(pl.lit(PUBLISHED_UNSCALED[1])))
    notes = [
        "rewrite magnitude: p(new target) - p(true target) after the edit, in Tracing Reversal p(target) - p(other "
        f"target); effects are absolute, of {kind}:{window} at the last subject token; p_corrected: {correction}"
    ]
    title = "Correlation of rewrite magnitude and absolute tracing effect (Hase et al. 2023, Fig. 14)"
    return Table("unscaled", title, frame, notes)


def _left_out(inputs: AnalysisInputs) -> Table:
    frame = in_order(left_out_layers(inputs.joined, ["rewrite", "overall"]))
    notes = ["a row without a layer is of all layers together", *inputs.notes]
    return Table("left_out_layers", "Error of predicting the edits at a layer from those at all others", frame, notes)


def _zeroing(inputs: AnalysisInputs) -> Table:
    kind, window = inputs.zeroed_state
    frame = inputs.regressions(inputs.zeroed, "rewrite", "overall").select(*_KEY, *_SHOWN)
    notes = [f"effects of zeroing {kind}:{window} at the subject; {inputs.form}"]
    return Table("zeroing", "R^2 by edit layer and zeroing effect (Hase et al. 2023, Figs. 21-22)", frame, notes)


def published_regressions(study: str | None, score: str) -> pl.DataFrame | None:
    """R^2 of a score as printed (Hase et al. 2023, Tables 3-6), where a study has it; ``p`` is a text like "<1e-4"."""
    return _printed_r2(_study(study).get("r2", {}).get(score))


def published_concentrated(study: str | None) -> pl.DataFrame | None:
    """R^2 of the rewrite score on facts with concentrated effects (Hase et al. 2023, Table 2)."""
    return _printed_r2(_study(study).get("concentrated"))


def _printed_r2(rows: list[list[Any]] | None) -> pl.DataFrame | None:
    schema = {name: KEY_SCHEMA[name] for name in GROUP} | dict.fromkeys(_R2, pl.Float64) | {"p": pl.String}
    return None if rows is None else pl.DataFrame(rows, schema=schema, orient="row")


def published_errors(study: str | None, score: str) -> pl.DataFrame | None:
    """R^2, RMSE and MAE of ROME in Error Injection by predictor (Hase et al. 2023, Tables 7 and 8): columns metric,
    layer, trace."""
    errors = _study(study).get("errors", {}).get(score)
    if errors is None:
        return None
    schema = {"metric": pl.String, "layer": pl.Float64, "trace": pl.Float64}
    return pl.DataFrame([[metric, *values] for metric, values in errors.items()], schema=schema, orient="row")


@cache
def _study(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in STUDIES:
        raise TableError(f"there are no published tables of {name!r}; there are of {', '.join(STUDIES)}")
    text = files("causalcone.analysis").joinpath("papers/published/hase2023.json").read_text(encoding="utf-8")
    return dict(json.loads(text)[name])


def answer(tables: Sequence[Table]) -> str:
    """Does localization inform editing? The share of the rewrite scores' variance that edit layers explain, what
    effects add to it, where they add the most, and whether that is more than exchanged effects do."""
    frames = {table.name: table.frame for table in tables}
    main = frames.get(MAIN)
    if main is None or main.is_empty():
        return f"{_NONE}: no regression of rewrite scores could be made."
    # R^2 of one layer, or of as many coefficients as edits, says nothing
    known = main.filter(pl.col("p").is_not_null() & (pl.col("layers") > 1))
    if known.is_empty():
        reasons = main["note"].drop_nulls().unique(maintain_order=True)
        return f"{_NONE}: no regression of rewrite scores could be tested ({'; '.join(reasons)})."
    layer, diff = known["r2_layer"].to_numpy(), known["diff"].to_numpy()
    most = known.sort("diff", descending=True).row(0, named=True)
    where = f"{method_name(most['method'], most['window'])} in {words(most['problem'])}"
    return (
        f"The choice of the edit layer explains {layer.min():z.0%} to {layer.max():z.0%} of the variance of rewrite "
        f"scores (mean {layer.mean():z.0%} over {len(known)} problems and methods). Knowing the tracing effect at that "
        f"layer adds {diff.min():z.1%} to {diff.max():z.1%} (mean {diff.mean():z.1%}), the most for {where} "
        f"({most['diff']:z.1%}).{_chance(frames.get('uncertainty', pl.DataFrame()), most)}"
    )


def _chance(tests: pl.DataFrame, most: dict[str, object]) -> str:
    """R^2 that effects of other facts add where tracing adds the most, and in how many cases tracing adds more."""
    rewrite = tests.filter(score="rewrite").drop_nulls("p_permutation") if len(tests) else tests
    if rewrite.is_empty():
        return ""
    chance = " "
    for row in rewrite.filter(**{name: most[name] for name in GROUP}).iter_rows(named=True):
        chance += f"Effects taken from other facts add {row['chance']:z.1%} there by chance"
        if row["permutation_facts"] < row["facts"]:
            share = f"{row['permutation_facts']} of {row['facts']} facts"
            chance += f", over the {share} that have all layers, whose own effects add {row['permutation_diff']:z.1%}"
        chance += "; "
    clear = int((rewrite["p_permutation"].to_numpy() < 0.05).sum())
    return f"{chance}in {clear} of {len(rewrite)} cases tracing adds more than that (permutation test, p < 0.05)."
