"""The tables of Hase et al. 2023 (2-8) from a sweep's folder, values on record beside them, tables of intervals
and further tests, and the answer in a few sentences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl

from causalcone.analysis.effects import OTHER_LAYERS, average_indirect_effect, concentrated_facts
from causalcone.analysis.papers.inputs import PUBLISHED, AnalysisInputs, AnalysisOptions
from causalcone.analysis.papers.records import beside
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.regressions import GROUP, PREDICTORS
from causalcone.analysis.stats.uncertainty import LEAST_EXCHANGED, bootstrap, left_out_layers, permutation_test
from causalcone.analysis.sweep_results import RESTORED, Study
from causalcone.analysis.tables.names import counted, in_order, method_name, words
from causalcone.analysis.tables.traces import TableError

SCORE_TABLES = {3: "rewrite", 4: "paraphrase", 5: "neighborhood", 6: "overall"}

ENDS = [f"{name}_{end}" for name in ("r2_layer", "r2_both", "diff") for end in ("low", "high")]
MAIN, AVERAGES = "table3_rewrite", "average_effects"
_NONE = "There is no answer yet"

_KEY = [*GROUP, "score"]
_SHOWN = [*(f"r2_{name}" for name in PREDICTORS), "diff", "p", "edits", "facts", "layers", "note"]


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
        (AVERAGES, _average_effects),
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
    name, title = f"table{number}_{score}", f"R^2 of the {score} score by edit layer and tracing effect"
    frame = beside(fitted.select(*GROUP, *_SHOWN), name, inputs.record)
    return Table(name, f"{title} (Hase et al. 2023, Table {number})", frame, inputs.notes)


def _concentrated(inputs: AnalysisInputs) -> Table:
    """Facts are chosen by their largest effects over tokens, whatever effects their scores are compared with."""
    facts = concentrated_facts(inputs.largest)
    concentrated = facts.filter("concentrated")["fact_id"]
    joined = inputs.joined.filter(pl.col("fact_id").is_in(concentrated.implode()))
    note = f"facts with concentrated effects: {len(concentrated)} of {facts['fact_id'].n_unique()}"
    layers = inputs.largest["layer"].n_unique()
    if layers <= OTHER_LAYERS + 1:
        note += f", as all positive effects are that over {counted(layers, 'layer')}"
    if joined.is_empty():
        raise TableError(f"{note}, and none of them is edited")
    fitted = inputs.regressions(joined, "rewrite")
    name = "table2_concentrated"
    title = "R^2 of the rewrite score, facts with concentrated tracing effects (Hase et al. 2023, Table 2)"
    frame = beside(fitted.select(*GROUP, *_SHOWN), name, inputs.record)
    return Table(name, title, frame, [note, *inputs.notes])


def _error_table(inputs: AnalysisInputs) -> Table:
    fitted = inputs.regressions(inputs.joined, "rewrite", "overall")
    rows = [
        {**{name: row[name] for name in _KEY}, "metric": metric, **{of: row[f"{metric}_{of}"] for of in PREDICTORS}}
        for row in fitted.iter_rows(named=True)
        for metric in ("r2", "rmse", "mae")
    ]
    number = 7 if inputs.record is None or inputs.record.table("table8_errors") is None else 8
    name, title = f"table{number}_errors", f"Errors of the regressions, in sample (Hase et al. 2023, Table {number})"
    frame = beside(pl.DataFrame(rows, infer_schema_length=None), name, inputs.record, [*_KEY, "metric"])
    return Table(name, title, frame, inputs.notes)


def _uncertainty(inputs: AnalysisInputs) -> Table:
    """R^2 that tracing adds, with intervals and tests that do not take a fact's edits for independent."""
    joined, options, scores = inputs.joined, inputs.options, list(SCORE_TABLES.values())
    form: dict[str, Any] = {"interaction": options.interaction}
    draws = {**form, "draws": options.draws, "seed": options.seed}
    frame = inputs.regressions(joined, *scores).select(*_KEY, "facts", "diff", "p")
    tests = [
        bootstrap(joined, scores, level=options.level, **draws).select(*_KEY, *ENDS),
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
    few, lack = pl.col("permutation_facts") < LEAST_EXCHANGED, f"fewer than {LEAST_EXCHANGED} facts"
    p, why = pl.when(~few).then("p_permutation"), pl.when(few).then(pl.coalesce("_permutation", pl.lit(lack)))
    frame = frame.with_columns(p_permutation=p, _permutation=why.otherwise("_permutation"))
    reasons = [name for name in frame.columns if name.startswith("_")]
    note = pl.concat_str([pl.format(f"p{name}: {{}}", name) for name in reasons], separator="; ", ignore_nulls=True)
    frame = frame.with_columns(note=pl.when(note != "").then(note)).drop(reasons)
    notes = [
        f"_low, _high: {options.level:.0%} interval, bootstrap over facts, {options.draws} draws; chance: what "
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
    frame = beside(frame, "unscaled", inputs.record, [*_KEY, "layer"])
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


def _average_effects(inputs: AnalysisInputs) -> Table:
    """Average indirect effects by token role and layer of all states but heads."""
    _ = inputs.state  # there is one
    averages = average_indirect_effect(inputs.study.folder / RESTORED, answer_score=inputs.study.answer_score)
    named = averages.filter(~pl.col("kind").str.starts_with("head.")).with_columns(
        state=pl.format("{}:{}", "kind", "window"), role=pl.col("role").cast(pl.String)
    )
    on = ["state", "role", "layer"]
    frame = beside(named.select(*on, "effect", "standard_error", "facts"), AVERAGES, inputs.record, on)
    notes = ["effect: mean p(target) with a state of that token restored, less that of the corrupted run"]
    title = "Average indirect effect by token role (Meng et al. 2022, Fig. 15)"
    return Table(AVERAGES, title, frame, [*notes, *inputs.notes])


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
        return f"{_NONE}: no regression of rewrite scores on the edit layer could be tested ({'; '.join(reasons)})."
    most = known.sort("diff", descending=True).row(0, named=True)
    where = f"{method_name(most['method'], most['window'])} in {words(most['problem'])}"
    n = f"{_range(known['edits'], ',')} edits of {_range(known['facts'], ',')} facts"
    if len(known) == 1:
        n = f"{counted(most['edits'], 'edit')} of {counted(most['facts'], 'fact')} at {most['layers']} layers"
        n, more = f" by {where} ({n})", ""
    else:
        problems, methods = known["problem"].n_unique(), known.select("method", "window").n_unique()
        names = "methods" if problems == 1 else "problems" if methods == 1 else "problems and methods"
        n = f" (mean {known['r2_layer'].to_numpy().mean():z.0%} over {len(known)} {names}, of {n} each)"
        more = f" (mean {known['diff'].to_numpy().mean():z.1%}), the most for {where} ({most['diff']:z.1%})"
    return (
        f"The choice of the edit layer explains {_range(known['r2_layer'], 'z.0%')} of the variance of rewrite scores"
        f"{n}. Knowing the tracing effect at that layer adds {_range(known['diff'], 'z.1%')}{more}."
        f"{_chance(frames.get('uncertainty', pl.DataFrame()), most, len(known) > 1)}"
    )


def _range(values: pl.Series, form: str) -> str:
    """The smallest and the largest value; one where they look the same."""
    numbers = values.to_numpy()
    low, high = (f"{value:{form}}" for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} to {high}"


def _chance(tests: pl.DataFrame, most: dict[str, object], several: bool) -> str:
    """R^2 that effects of other facts add where tracing adds the most, and in how many cases tracing adds more."""
    rewrite = tests.filter(score="rewrite").drop_nulls("chance") if len(tests) else tests
    if rewrite.is_empty():
        return ""
    chance = " "
    for row in rewrite.filter(**{name: most[name] for name in GROUP}).iter_rows(named=True):
        chance += f"Effects taken from other facts add {row['chance']:z.1%}{' there' * several} by chance"
        if row["permutation_facts"] < row["facts"]:
            share = f"{row['permutation_facts']} of {row['facts']} facts"
            chance += f", over the {share} that have all layers, whose own effects add {row['permutation_diff']:z.1%}"
        chance += "; "
    p = rewrite["p_permutation"].drop_nulls()
    if p.is_empty():
        facts = _range(rewrite["permutation_facts"], ",")
        return f"{chance}{facts} facts are too few to test whether tracing adds more than that."
    if len(p) == 1:
        tells = "tells" if p[0] < 0.05 else "does not tell"
        return f"{chance}a permutation test {tells} tracing from that (p = {p[0]:.3f})."
    clear = int((p < 0.05).sum())
    return f"{chance}in {clear} of {len(p)} cases tracing adds more than that (permutation test, p < 0.05)."
