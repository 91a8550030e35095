"""Means over the edits of checkpoints, the model's health beside them, and their figure."""

import math

import numpy as np
import polars as pl
import pytest
from helpers.figures import texts_outside, visible_texts
from matplotlib.figure import Figure

from causalcone.analysis import CHECKPOINT_SCHEMA, TableError, health, plot, sequence_scores
from causalcone.analysis.sequences import overview, with_health

P = {("newest", "a"): 0.5, ("newest", "b"): 0.7, ("earlier", "c"): 0.2}


def checkpoint(edits, method="memit-seq", problem="error_injection", window=5, perplexity=12.0, scores=None):
    """Rows of one checkpoint: p and efficacy of some facts, and the model's."""
    rows = []
    for (group, fact), p in (P if scores is None else scores).items():
        rows += [(group, fact, "rewrite_p", 0.1, p), (group, fact, "efficacy_score", 0.0, float(p > 0.5))]
    rows += [("model", None, "perplexity", 8.0, perplexity)]
    rows += [("model", None, f"relative_norm.{layer}", 0.0, edits * layer / 100) for layer in (4, 5)]
    common = (problem, method, window, 6, edits)
    return pl.DataFrame([(*common, *row) for row in rows], schema=CHECKPOINT_SCHEMA, orient="row")


@pytest.fixture
def scores():
    methods = ("alphaedit", "memit-seq")
    return sequence_scores(pl.concat([checkpoint(edits, method) for method in methods for edits in (100, 50)]))


def test_means_over_the_edits_of_a_checkpoint(scores):
    (row,) = scores.filter(method="memit-seq", edits=50, group="newest", metric="rewrite_p").to_dicts()
    assert row["n"] == 2
    assert (row["pre"], row["post"]) == (pytest.approx(0.1), pytest.approx(0.6))
    assert row["se"] == pytest.approx(np.std([0.5, 0.7], ddof=1) / math.sqrt(2))


def test_methods_are_in_their_order_and_new_edits_first(scores):
    order = scores.select("method", "edits", "group").unique(maintain_order=True).rows()
    groups = ("newest", "earlier", "model")
    assert order == [(m, e, g) for m in ("memit-seq", "alphaedit") for e in (50, 100) for g in groups]
    assert scores.filter(group="earlier")["se"].null_count() == scores.filter(group="earlier").height  # of one edit


def test_a_row_must_not_be_there_twice():
    with pytest.raises(TableError, match="more than once"):
        sequence_scores(pl.concat([checkpoint(50), checkpoint(50)]))
    both = [checkpoint(50, problem=problem) for problem in ("error_injection", "fact_erasure")]
    assert sequence_scores(pl.concat(both))["problem"].n_unique() == 2


def test_the_models_health(scores):
    found = health(scores).filter(method="alphaedit")
    assert found["edits"].to_list() == [50, 100]
    assert found["perplexity"].to_list() == [12.0, 12.0]
    assert found["perplexity_ratio"].to_list() == [1.5, 1.5]
    assert found["relative_norm"].to_list() == [2.5, 5.0]  # the larger of two layers


def test_the_overview_has_a_row_for_each_group(scores):
    rows = overview(scores)
    assert rows.height == 2 * 2 * 2
    row = rows.filter(method="memit-seq", edits=100, group="newest").row(0, named=True)
    assert (row["rewrite_p"], row["efficacy_score"]) == (pytest.approx(0.6), 0.5)
    assert (row["perplexity_ratio"], row["relative_norm"]) == (1.5, 5.0)
    assert "paraphrase_score" not in rows.columns  # no edit has it


def test_a_ruined_models_perplexity_may_be_infinite():
    scores = sequence_scores(pl.concat([checkpoint(50), checkpoint(100, perplexity=math.inf)]))
    assert with_health(scores).filter(metric="perplexity_ratio")["edits"].to_list() == [50]
    assert overview(scores)["perplexity_ratio"].max() == math.inf
    assert plot.sequence(scores).axes


# --- the figure ---


def panel(figure: Figure, title: str):
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return axes


def test_panels_show_the_table(scores, tmp_path):
    figure = plot.sequence(scores, tmp_path / "sequence.png")
    assert (tmp_path / "sequence.png").stat().st_size > 10_000
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Efficacy score", "Perplexity / before", "|change| / |weights|"]
    lines = panel(figure, "Efficacy score").containers
    shown = {(line[0].get_color(), line[0].get_linestyle()): line[0].get_xydata().tolist() for line in lines}
    assert len({color for color, _ in shown}) == 2
    assert sorted(dash for _, dash in shown) == ["-", "-", "--", "--"]
    assert all(points == [[50, 0.5], [100, 0.5]] for (_, dash), points in shown.items() if dash == "-")
    assert all(points == [[50, 0.0], [100, 0.0]] for (_, dash), points in shown.items() if dash == "--")
    assert panel(figure, "Perplexity / before").get_yscale() == "log"
    assert figure.get_suptitle() == "Error injection, 100 edits in sequence"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "MEMIT-seq-5", "AlphaEdit-5", "newest batch", "sample of all before it",
    ]  # fmt: skip


def test_bars_are_95_percent_intervals(scores):
    axes = panel(plot.sequence(scores, names=["rewrite_p"]), "Rewrite p")
    newest, earlier = (
        next(line for line in axes.containers if line[0].get_linestyle() == dash) for dash in ("-", "--")
    )
    (low, high), _ = newest[2][0].get_segments()
    assert high[1] - low[1] == pytest.approx(2 * 1.96 * np.std([0.5, 0.7], ddof=1) / math.sqrt(2))
    assert not any(len(segment) for segment in earlier[2][0].get_segments())  # one edit has no bar


def test_where_no_edit_has_a_score_p_is_drawn():
    scores = sequence_scores(checkpoint(50).filter(pl.col("metric") != "efficacy_score"))
    assert plot.sequence(scores).axes[0].get_title() == "Rewrite p"


def test_a_row_of_panels_for_each_problem_and_nothing_outside(scores):
    problems = ("error_injection", "fact_erasure")
    frames = [
        checkpoint(edits, method, problem, perplexity=8.0 * edits**2)
        for problem in problems
        for method in ("memit-seq", "alphaedit", "emmet", "encore")
        for edits in (500, 10_000)
    ]
    figure = plot.sequence(sequence_scores(pl.concat(frames)))
    assert len(figure.axes) == 6
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["Error injection", "Fact erasure"]
    assert texts_outside(figure, visible_texts(figure)) == []


def test_layers_are_told_where_there_are_several():
    frame = checkpoint(50)
    figure = plot.sequence(sequence_scores(pl.concat([frame, frame.with_columns(layer=pl.lit(9, pl.Int64))])))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["MEMIT-seq-5, layer 6", "MEMIT-seq-5, layer 9"]


def test_what_cannot_be_drawn_is_named(scores):
    with pytest.raises(TableError, match="no checkpoint has the metrics rewrite_accuracy; choose others"):
        plot.sequence(scores, names=["rewrite_p", "rewrite_accuracy"])
    with pytest.raises(TableError, match="no checkpoint has the metrics"):
        plot.sequence(scores.clear())
