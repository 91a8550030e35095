"""Means of the scores and metrics of edits against numbers worked out by hand, and the picture of the means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from math import nan
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers.figures import texts_outside, visible_texts
from helpers.score_tables import edit, metrics, only
from matplotlib.transforms import Bbox

from causalcone.analysis import SCORES, TableError, counterfact_metrics, mean_scores, plot, zsre_metrics
from causalcone.engine.edit.requests.requests import PROBLEMS


def table_of(values: Sequence[tuple[str, float | None]], **columns: Any) -> pl.DataFrame:
    """Scores of edits of these facts; all scores of an edit are the same."""
    frames = [
        edit(f"{fact}-{number}-{columns}", fact_id=fact, **columns).with_columns(
            *(pl.lit(value, pl.Float64).alias(name) for name in SCORES)
        )
        for number, (fact, value) in enumerate(values)
    ]
    return pl.concat(frames)


def test_mean_scores() -> None:
    table = pl.concat(
        [
            table_of([("a", 0.2), ("b", 0.6), ("c", None)], layer=4),
            table_of([("a", 0.5)], layer=2),
            table_of([("a", None)], layer=6),
        ]
    )
    means = mean_scores(table)
    assert means.columns == ["problem", "method", "window", "layer", "score", "mean", "standard_error", "n", "facts"]
    assert means["score"].to_list() == list(SCORES) * 3
    rows = means.filter(score="essence").select("layer", "mean", "standard_error", "n").rows()
    assert rows == [(2, 0.5, None, 1), (4, pytest.approx(0.4), pytest.approx(0.4 / 2), 2), (6, None, None, 0)]


def test_edits_of_one_fact_are_not_independent() -> None:
    table = table_of([("a", 0.2), ("a", 0.4), ("b", 0.9), ("b", 0.9)])
    row = only(mean_scores(table, by=["method"]).filter(score="rewrite"))
    assert (row["mean"], row["n"]) == (pytest.approx(0.6), 4)
    assert row["standard_error"] == pytest.approx(0.6 / 2)  # of the two facts' means 0.3 and 0.9
    by_fact = mean_scores(table, by=["fact_id"]).filter(score="rewrite")
    assert by_fact.select("fact_id", "mean").rows() == [("a", pytest.approx(0.3)), ("b", pytest.approx(0.9))]


def test_groups_that_cannot_be_made() -> None:
    with pytest.raises(TableError, match="scores have no columns model"):
        mean_scores(table_of([("a", 0.2)]), by=["model"])
    with pytest.raises(TableError, match="by is empty"):
        mean_scores(table_of([("a", 0.2)]), by=[])


def counterfact(edit_id: str, es: float, ps: float, ns: float) -> pl.DataFrame:
    return metrics(
        ("efficacy_score", 0.0, es),
        ("paraphrase_score", 0.5, ps),
        ("neighborhood_score", 1.0, ns),
        ("efficacy_magnitude", -0.5, es - 0.5),
        ("generation_entropy", 6.0, 5.0 + es),
        edit_id=edit_id,
    )


def test_counterfact_metrics() -> None:
    edits = pl.concat([edit("a"), edit("b"), edit("c", status="failed"), edit("d", layer=5)])
    table = pl.concat([counterfact("a", 1, 0.5, 0.8), counterfact("b", 0.5, 0.5, 0.4), counterfact("c", 9, 9, 9)])
    result = counterfact_metrics(edits, pl.concat([table, metrics(("reference_score", 0.2, 0.4), edit_id="d")]))
    assert result.columns[:5] == ["problem", "method", "window", "layer", "metric"]
    assert result.select("layer", "metric").rows() == [*product([3], ["S", "ES", "EM", "PS", "NS", "GE"]), (5, "RS")]
    found = {row["metric"]: row for row in result.rows(named=True)}
    assert found["ES"]["post"] == 0.75
    assert found["ES"]["post_interval"] == pytest.approx(1.96 * 0.5 / 2)
    assert (found["PS"]["post"], found["PS"]["post_interval"], found["PS"]["n"]) == (0.5, 0, 2)
    assert found["GE"]["post"] == 5.75
    assert found["S"]["post"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.5 + 1 / 0.6))
    assert (found["S"]["pre"], found["S"]["post_interval"], found["S"]["n"]) == (0, None, 2)
    assert (found["RS"]["pre"], found["RS"]["post"], found["RS"]["post_interval"], found["RS"]["n"]) == (
        0.2,
        0.4,
        None,
        1,
    )


def test_zsre_metrics() -> None:
    names = ("rewrite_accuracy", "paraphrase_accuracy", "neighborhood_accuracy")
    table = metrics(*[(name, 0.25, 0.5) for name in names], ("perplexity", 8.0, nan))
    result = zsre_metrics(edit(), table)
    assert result["metric"].to_list() == ["efficacy", "paraphrase", "specificity"]
    assert result.select("pre", "post", "n").unique().rows() == [(0.25, 0.5, 1)]
    with pytest.raises(TableError, match="no edit that was done has any of the metrics efficacy_score"):
        counterfact_metrics(edit(), table)


def test_metrics_of_two_facts_by_hand() -> None:
    """Means of both facts, and 1.96 times half of their difference; S before is 3 / (1 / 0.25 + 1 / 0.5 + 1 / 1)."""
    rows = {
        "efficacy_score": (0.5, 1.0, 0.0, 0.5),
        "paraphrase_score": (0.25, 0.5, 0.75, 1.0),
        "neighborhood_score": (1.0, 0.5, 1.0, 0.5),
        "efficacy_magnitude": (-0.2, 0.6, -0.4, 0.8),
        "paraphrase_magnitude": (-0.1, 0.2, -0.3, 0.4),
        "neighborhood_magnitude": (0.3, 0.1, 0.5, -0.1),
        "rewrite_accuracy": (0.0, 1.0, 0.5, 0.5),
    }
    table = pl.concat(
        metrics(*((name, *values[start : start + 2]) for name, values in rows.items()), edit_id=fact)
        for fact, start in (("a", 0), ("b", 2))
    )
    edits = pl.concat([edit("a"), edit("b")])
    found = {row["metric"]: row for row in counterfact_metrics(edits, table).rows(named=True)}
    expected = {
        "ES": (0.25, 0.49, 0.75, 0.49), "PS": (0.5, 0.49, 0.75, 0.49), "NS": (1.0, 0.0, 0.5, 0.0),
        "EM": (-0.3, 0.196, 0.7, 0.196), "PM": (-0.2, 0.196, 0.3, 0.196), "NM": (0.4, 0.196, 0.0, 0.196),
        "S": (3 / 7, None, 3 / (1 / 0.75 + 1 / 0.75 + 2), None),
    }  # fmt: skip
    for name, values in expected.items():
        row = found[name]
        assert [row[each] for each in ("pre", "pre_interval", "post", "post_interval")] == [
            None if value is None else pytest.approx(value, abs=1e-12) for value in values
        ], name
    row = only(zsre_metrics(edits, table))
    assert (row["metric"], row["pre"], row["post"], row["n"]) == ("efficacy", 0.25, 0.75, 2)
    assert (row["pre_interval"], row["post_interval"]) == (pytest.approx(0.49), pytest.approx(0.49))


SETTINGS = (("rome", 1), ("memit", 5), ("finetune", 1), ("finetune", 5))


def drawn(
    problems: Sequence[str] = ("error_injection",), layers: Sequence[int] = (0, 4, 9), facts: int = 3
) -> pl.DataFrame:
    return pl.concat(
        table_of(
            [(str(fact), (fact + place + layer / 10) / (facts + 4)) for fact in range(facts)],
            problem=problem, method=method, window=window, layer=layer,
        )
        for problem, (place, (method, window)), layer in product(problems, enumerate(SETTINGS), layers)
    )  # fmt: skip


def test_scores_are_drawn(tmp_path: Path) -> None:
    table = drawn()
    figure = plot.scores(table, path=tmp_path / "scores.png")
    assert [axes.get_title() for axes in figure.axes] == ["Rewrite", "Paraphrase", "Neighborhood"]
    labels = ["ROME (one layer)", "MEMIT (5 layers)", "FT (one layer)", "FT (5 layers)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    means = mean_scores(table).filter(score="paraphrase")
    bars = figure.axes[1].containers
    assert [bar.get_label() for bar in bars] == labels
    for bar, (method, window) in zip(bars, SETTINGS, strict=True):
        line, _, (segments,) = bar.lines
        expected = means.filter(method=method, window=window)
        assert line.get_xdata().tolist() == [0, 4, 9]
        assert line.get_ydata() == pytest.approx(expected["mean"].to_list())
        (_, low), (_, high) = segments.get_segments()[2]
        half = 1.96 * expected["standard_error"][2]
        assert (low, high) == (pytest.approx(expected["mean"][2] - half), pytest.approx(expected["mean"][2] + half))
    assert figure.get_suptitle() == "Error injection, mean of 3 facts with 95 % intervals"
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_problems_have_a_row_each() -> None:
    figure = plot.scores(drawn(["fact_forcing", "error_injection"]), ["essence", "overall_essence"])
    assert [axes.get_title() for axes in figure.axes] == ["Essence", "Overall with essence", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Error injection", "", "Fact forcing", ""]
    assert figure.get_suptitle() == "Scores of edits, mean of 3 facts with 95 % intervals"


def test_scores_that_cannot_be_drawn() -> None:
    with pytest.raises(TableError, match="there are no scores rewrites; choose from rewrite, paraphrase"):
        plot.scores(drawn(), ["rewrites"])
    with pytest.raises(TableError, match="there are no scores to draw"):
        plot.scores(drawn(), [])
    with pytest.raises(TableError, match="no edit of the table has the scores essence; choose others"):
        plot.scores(drawn().with_columns(essence=pl.lit(None, pl.Float64)), ["rewrite", "essence"])


FIGURES = {
    "published": lambda: plot.scores(drawn(layers=[0, 4, 8, 12, 16, 20, 23, 27])),
    "one panel": lambda: plot.scores(drawn(facts=1).filter(method="rome"), ["essence"]),
    "all": lambda: plot.scores(drawn(PROBLEMS[:2], layers=[0, 47]), SCORES),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_figure(name: str) -> None:
    figure = FIGURES[name]()
    texts = visible_texts(figure)
    assert texts_outside(figure, texts) == []
    assert [(a, b) for (a, one), (b, other) in combinations(texts, 2) if Bbox.intersection(one, other)] == []
