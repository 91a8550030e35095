"""The papers' tables, the answer and the page's numbers of a small study, worked out by hand.

The study is that of ``test_regressions_by_hand``, whose docstring has the sums: ROME in Error Injection, three facts at
layers 0 and 1. At layers 2 to 5, where there are no edits, effects are such that two facts are concentrated.
"""

from math import sqrt

import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, SCORES, edited, traced, write_study, zeroed

from causalcone.analysis.page.report import report_data
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.papers.tables import answer, paper_tables
from causalcone.analysis.sweep_results import Study

LATER = {"a": (0.4, 0.1, 0.1, 0.1), "b": (0.5, 0.5, 0.5, 0.1), "c": (0.1, 0.1, 0.1, 0.1)}
ALL_EFFECTS = {fact: EFFECTS[fact] + LATER[fact] for fact in EFFECTS}
FORCED = {"a": (0.0, 0.5), "b": (0.1, 0.1), "c": (0.5, 0.0)}
"""Scores whose mean is 0.2 at both layers, so that the layer explains nothing."""


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("made up")
    return write_study(place, traced(ALL_EFFECTS), [edited(SCORES)], tables={"traces/zero": zeroed(EFFECTS)})


@pytest.fixture(scope="module")
def tables(folder):
    found, _ = paper_tables(Study(folder), AnalysisOptions(draws=100, mixed=True))
    return {table.name: table for table in found}


def row_of(table, **where):
    (row,) = table.frame.filter(**where).rows(named=True)
    return row


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("table3_rewrite", {}),
        ("table6_overall", {}),  # a third of the rewrite scores, and what is the same for all
        ("zeroing", {"score": "rewrite"}),
    ],
)
def test_coefficients_of_determination(tables, name, where):
    row = row_of(tables[name], **where)
    assert [row[f"r2_{each}"] for each in ("layer", "trace", "both")] == near(
        [0.375 / 0.575, 0.01 / 0.575, 0.545 / 0.575]
    )
    assert (row["diff"], row["p"]) == (near(0.17 / 0.575), near(0.15))
    assert (row["edits"], row["facts"], row["layers"], row["note"]) == (6, 3, 2, None)


def test_table_of_concentrated_facts(tables):
    """The largest effect of fact a is 0.4, and no other is half of that; c's is 1, twice; b's 0.5 is at five layers.
    Scores of a and c: 0, 0.5 and 0.9, 0.6, mean 0.5, squares 0.42; layers' means 0.25, 0.75; effects' 0.45, 0.55."""
    table = tables["table2_concentrated"]
    assert table.notes[0] == "facts with concentrated effects: 2 of 3"
    row = row_of(table)
    assert [row[f"r2_{each}"] for each in ("layer", "trace", "both")] == near([0.25 / 0.42, 0.01 / 0.42, 1.0])
    assert (row["diff"], row["edits"]) == (near(0.17 / 0.42), 4)
    assert row["note"] == "there is no F-test: no degrees of freedom are left"


def test_concentration_is_of_the_largest_effects_wherever_scores_look(tmp_path):
    """At the last token all layers have the same effect, which is larger than any at the subject."""
    subject, last = traced(ALL_EFFECTS), traced(dict.fromkeys("abc", (1.0,) * 6), token=2)
    study = Study(write_study(tmp_path, pl.concat([subject, last]), [edited(SCORES)]))
    found, missing = paper_tables(study, AnalysisOptions(at="subject_last", draws=100))
    assert "no table2: facts with concentrated effects: 0 of 3, and none of them is edited" in missing
    (table,) = (table for table in found if table.name == "table3_rewrite")
    assert row_of(table)["r2_both"] == near(0.545 / 0.575)


def test_few_layers_are_told(tmp_path):
    study = Study(write_study(tmp_path, traced(EFFECTS), [edited(SCORES)]))
    (table, *_), _ = paper_tables(study, AnalysisOptions(draws=100))
    assert table.notes[0] == "facts with concentrated effects: 2 of 3, as all positive effects are that over 2 layers"


@pytest.mark.parametrize(("score", "share"), [("rewrite", 1.0), ("overall", 3.0)])
def test_errors(tables, score, share):
    expected = {
        "r2": (0.375 / 0.575, 0.01 / 0.575, 0.545 / 0.575),
        "rmse": (sqrt(0.2 / 6) / share, sqrt(0.565 / 6) / share, sqrt(0.03 / 6) / share),
        "mae": (1 / 6 / share, 0.25 / share, 0.4 / 6 / share),
    }
    for metric, values in expected.items():
        row = row_of(tables["table7_errors"], score=score, metric=metric)
        assert [row["layer"], row["trace"], row["both"]] == near(list(values)), metric


def test_uncertainty(tables):
    """In the facts' own order, or the other way round, effects explain 0.125 + 0.045 = 0.17; with a or c in the middle
    0.005 + 0.045 = 0.05 or 0.08 + 0, twice each."""
    row = row_of(tables["uncertainty"], score="rewrite")
    assert (row["diff"], row["p"], row["facts"]) == (near(0.17 / 0.575), near(0.15), 3)
    assert (row["permutation_facts"], row["permutation_diff"]) == (3, near(0.17 / 0.575))
    assert row["chance"] == pytest.approx((0.17 + 0.05 + 0.08) / 3 / 0.575, abs=0.04)
    assert row["p_permutation"] is None  # of six exchanges none can be rarer than one in six
    assert 0 <= row["diff_low"] <= row["diff_high"] <= 1
    assert row["p_clustered"] is None
    assert "p_permutation: fewer than 4 facts; p_clustered: only 3 facts to test 2 coefficients" in row["note"]
    row = row_of(tables["uncertainty"], score="paraphrase")
    assert row["note"].startswith("p_permutation: the score is the same for all edits")


@pytest.mark.parametrize(
    ("name", "score"),
    [("correlations", "rewrite"), ("correlations", "overall"), ("unscaled", "rewrite_magnitude")],
)
def test_correlations(tables, name, score):
    frame = tables[name].frame.filter(score=score)
    assert frame["layer"].to_list() == [0, 1]
    assert frame["correlation"].to_list() == near([0.944911182523, -0.866025403784])
    assert frame["p"][1] == near(1 / 3)


def test_what_the_rewrite_magnitude_is_of(tables):
    (note,) = tables["unscaled"].notes
    assert "p(new target) - p(true target) after the edit, in Tracing Reversal p(target) - p(other target)" in note


def test_left_out_layers(tables):
    """From layer 1, mean 0.7 and slope -0.3; from layer 0, mean 0.2 and slope 0.5."""
    frame = tables["left_out_layers"].frame.filter(score="rewrite")
    assert frame["layer"].to_list() == [0, 1, None]
    assert frame["edits"].to_list() == [3, 3, 6]
    assert frame["rmse_mean"].to_list() == near([sqrt(0.89 / 3), sqrt(0.81 / 3), sqrt(1.7 / 6)])
    assert frame["rmse_trace"].to_list() == near([sqrt(1.085 / 3), sqrt(1.085 / 3), sqrt(2.17 / 6)])


# --- the answer ---


def said(folder, draws=100):
    return answer(paper_tables(Study(folder), AnalysisOptions(draws=draws))[0])


def test_the_answer(tmp_path):
    """Of Fact Forcing the layer explains nothing of 0.28, and slopes 0.5 and -0.5 explain 0.125 each."""
    forced = edited(FORCED, "fact_forcing", "finetune", 5)
    text = said(write_study(tmp_path, traced(ALL_EFFECTS), [edited(SCORES), forced]))
    assert text.startswith(
        "The choice of the edit layer explains 0% to 65% of the variance of rewrite scores (mean 33% over 2 problems "
        "and methods, of 6 edits of 3 facts each). Knowing the tracing effect at that layer adds 29.6% to 89.3% (mean "
        "59.4%), the most for FT-5 in fact forcing (89.3%). Effects taken from other facts add "
    )
    assert text.endswith("there by chance; 3 facts are too few to test whether tracing adds more than that.")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({fact: values[:1] for fact, values in SCORES.items()}, "all edits are at layer 0"),
        ({"a": SCORES["a"]}, "the effect is the same for all edits; there is no F-test: nothing is added"),
    ],
    ids=["one layer", "one fact"],
)
def test_there_is_no_answer_from_what_cannot_be_tested(tmp_path, scores, reason):
    text = said(write_study(tmp_path, traced(ALL_EFFECTS), [edited(scores)]))
    assert (
        text == f"There is no answer yet: no regression of rewrite scores on the edit layer could be tested ({reason})."
    )


def test_exchanges_of_some_facts_are_told(tmp_path):
    """Two of four facts have both layers; each slope of two facts explains all that is within their layers, 0.125 of
    0 and 0.5, and 0.045 of 0.9 and 0.6, whose squares around 0.5 are 0.42."""
    scores = {"a": SCORES["a"], "c": SCORES["c"], "b": SCORES["b"][:1], "d": (0.3,)}
    effects = ALL_EFFECTS | {"d": (0.9, 0.1, 0.1, 0.1, 0.1, 0.1)}
    folder = write_study(tmp_path, traced(effects), [edited(scores)])
    tables, _ = paper_tables(Study(folder), AnalysisOptions(draws=100))
    (table,) = (table for table in tables if table.name == "uncertainty")
    row = row_of(table, score="rewrite")
    assert (row["facts"], row["permutation_facts"], row["permutation_diff"]) == (4, 2, near(0.17 / 0.42))
    told = "40.5% by chance, over the 2 of 4 facts that have all layers, whose own effects add 40.5%; "
    assert f"Effects taken from other facts add {told}2 facts are too few to test" in answer(tables)


# --- published values ---


@pytest.mark.parametrize(
    ("choice", "aggregate", "beside"),
    [
        (AnalysisOptions(draws=100), None, True),
        (AnalysisOptions(draws=100, state=("mlp", 5)), "first", True),
        (AnalysisOptions(draws=100, at="subject_last"), None, False),
        (AnalysisOptions(draws=100, denominator="p_clean"), None, False),
        (AnalysisOptions(draws=100, interaction=False), None, False),
        (AnalysisOptions(draws=100), "mean", False),
    ],
)
def test_published_values_are_beside_those_of_the_published_protocol(tmp_path, choice, aggregate, beside):
    analysis = {"published": "hase2023-gptj"}
    label = "Hase et al. 2023, GPT-J, CounterFact"
    folder = write_study(tmp_path, traced(ALL_EFFECTS), [edited(SCORES)], analysis=analysis)
    tables, _ = paper_tables(Study(folder, aggregate), choice)
    own = [table for table in tables if table.name.startswith("table")]
    assert [any(name.startswith("record_") for name in table.frame.columns) for table in own] == [beside] * 6
    apart, note = f"the values of {label} are of other options, and not set beside", f"on record: {label}"
    assert [(apart in table.notes, note in table.notes) for table in own] == [(not beside, beside)] * 6


# --- the study and the page ---


def test_what_the_study_holds(folder):
    study = Study(folder)
    assert study.aggregate == "first"
    assert (study.states(), study.main_state()) == ([("mlp", 5)], ("mlp", 5))
    effects = study.effects(("mlp", 5)).filter(fact_id="b")
    assert effects["effect"].to_list() == near([0.5, 0.5, 0.5, 0.5, 0.5, 0.1])
    assert study.zeroing(("mlp", 5))["effect"].to_list() == near([0, 0, 0.5, 0.5, 1, 1])
    means = study.mean_scores.filter(pl.col("score").is_in(["rewrite", "overall"]))
    assert means.select("layer", "score").rows() == [(k, name) for k in (0, 1) for name in ("rewrite", "overall")]
    assert means["mean"].to_list() == near([0.2, 1.6 / 3, 0.7, 2.1 / 3])


def test_states_are_in_the_order_they_were_asked_for(tmp_path):
    rows = traced(EFFECTS)
    states = [("attn", 1), ("mlp", 10), ("hidden", 1), ("mlp", 5)]
    traces = pl.concat(rows.with_columns(kind=pl.lit(k), window=pl.lit(w, pl.Int64)) for k, w in states)
    study = Study(write_study(tmp_path, traces, trace={"states": ["hidden:1", "mlp:10", "mlp:5"]}))
    assert study.states() == [("hidden", 1), ("mlp", 10), ("mlp", 5), ("attn", 1)]
    assert study.main_state() == ("mlp", 10)


def test_numbers_of_the_page(folder):
    about = report_data(Study(folder), AnalysisOptions(draws=100)).about
    (row,) = [row for row in about["r2"] if row["score"] == "rewrite"]
    assert (row["name"], row["r2_layer"], row["permutation_facts"]) == ("ROME", near(0.375 / 0.575), 3)
    lines = {row["score"]: row for row in about["scores"]}
    assert (lines["rewrite"]["layer"], lines["rewrite"]["mean"]) == ([0, 1], near([0.2, 0.7]))
    # standard deviations sqrt(0.14 / 2) and sqrt(0.06 / 2)
    assert lines["rewrite"]["standard_error"] == near([sqrt(0.07 / 3), sqrt(0.03 / 3)])
    assert lines["overall"]["mean"] == near([1.6 / 3, 2.1 / 3])
    (line,) = about["windows"]
    assert (line["name"], line["layer"], line["facts"]) == ("mlp:5", [0, 1, 2, 3, 4, 5], [3] * 6)
    assert line["mean"] == near([0.5, 0.5, 1 / 3, 0.7 / 3, 0.7 / 3, 0.1])


@pytest.mark.parametrize("compat", ["published", None])
def test_means_by_layer_may_be_of_positive_effects_only(tmp_path, compat):
    folder = write_study(tmp_path, traced(ALL_EFFECTS), [edited(SCORES)], compat=compat)
    (line,) = report_data(Study(folder), AnalysisOptions(draws=100)).about["windows"]
    assert line["mean"][0] == near(0.75 if compat else 0.5)
    (line,) = report_data(Study(folder), AnalysisOptions(draws=100, compat="published")).about["windows"]
    assert line["mean"][0] == near(0.75)
