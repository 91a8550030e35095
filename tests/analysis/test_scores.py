"""Scores of edits, their means and their picture, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product
from math import inf, nan
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers.figures import texts_outside, visible_texts
from hypothesis import given, strategies as st
from matplotlib.transforms import Bbox

from causalcone.analysis import (
    EDIT_SCHEMA,
    METRIC_SCHEMA,
    PROBE_SCHEMA,
    SCORES,
    TableError,
    counterfact_metrics,
    mean_scores,
    plot,
    read_edits,
    scores,
    zsre_metrics,
)
from causalcone.engine.edit.requests.requests import PROBLEMS

KINDS = ("rewrite", "paraphrase", "neighborhood")


def edit(edit_id: str = "e", **columns: Any) -> pl.DataFrame:
    row = {"edit_id": edit_id, "fact_id": edit_id, "problem": "error_injection", "method": "rome", "layer": 3}
    row |= {"window": 1, "steps": 20, "loss": 0.1, "delta_norm": 1.0, "status": "done", "reason": None}
    return pl.DataFrame([{**row, **columns}], schema=EDIT_SCHEMA)


def probes(*rows: tuple[Any, ...], edit_id: str = "e") -> pl.DataFrame:
    """Rows of kind, index, p_pre, p_post and, where given, p_pre_other and p_post_other."""
    full = [(edit_id, *row, *[None] * (6 - len(row))) for row in rows]
    return pl.DataFrame(full, schema=dict([*PROBE_SCHEMA.items()][:7]), orient="row")


def metrics(*rows: tuple[Any, ...], edit_id: str = "e") -> pl.DataFrame:
    return pl.DataFrame([(edit_id, *row) for row in rows], schema=METRIC_SCHEMA, orient="row")


ALL_KINDS = probes(
    ("rewrite", 0, 0.2, 0.6, 0.7, 0.1),
    ("paraphrase", 1, 0.0, 0.3),
    ("paraphrase", 0, 0.5, 0.75),
    ("neighborhood", 0, 0.1, 0.28),
    ("neighborhood", 1, 0.6, 0.3),
    ("attribute", 0, 0.5, 0.9),
)


def only(frame: pl.DataFrame) -> dict[str, Any]:
    (row,) = frame.rows(named=True)
    return row


def test_scores_by_hand() -> None:
    row = only(scores(edit(), ALL_KINDS, metrics(("perplexity", 8.0, 9.5))))
    assert list(row) == ["edit_id", "fact_id", "problem", "method", "layer", "window", *SCORES]
    rewrite, paraphrase, neighborhood, essence = 0.4 / 0.8, 0.25 / 0.5, 1 - 0.18 / 0.9, 1 - 1.5 / 5
    assert row["rewrite"] == pytest.approx(rewrite)
    assert row["paraphrase"] == pytest.approx(paraphrase)
    assert row["neighborhood"] == pytest.approx(neighborhood)
    assert row["essence"] == pytest.approx(essence)
    assert row["overall"] == pytest.approx((rewrite + paraphrase + neighborhood) / 3)
    assert row["overall_essence"] == pytest.approx((rewrite + paraphrase + neighborhood + essence) / 4)
    assert row["rewrite_magnitude"] == pytest.approx(0.5)


def test_the_mean_of_all_prompts() -> None:
    row = only(scores(edit(), ALL_KINDS, aggregate="mean"))
    assert row["paraphrase"] == pytest.approx((0.5 + 0.3) / 2)
    assert row["neighborhood"] == pytest.approx((0.8 + 0.5) / 2)
    with pytest.raises(TableError, match="aggregate is 'median'"):
        scores(edit(), ALL_KINDS, aggregate="median")  # type: ignore[arg-type]


def test_erasing_is_scored_by_what_is_gone() -> None:
    row = only(scores(edit(problem="fact_erasure"), ALL_KINDS))
    assert row["rewrite"] == 0
    assert row["rewrite_magnitude"] == pytest.approx(0.1 - 0.6)  # the other target is the new one
    row = only(scores(edit(problem="fact_erasure"), probes(("rewrite", 0, 0.6, 0.15), ("paraphrase", 0, 0.5, 0.0))))
    assert (row["rewrite"], row["paraphrase"]) == (pytest.approx(0.75), 1)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_has_scores(problem: str) -> None:
    row = only(scores(edit(problem=problem), probes(("rewrite", 0, 0.5, 0.7, 0.4, 0.2))))
    towards_new = problem in ("error_injection", "tracing_reversal")
    assert row["rewrite"] == pytest.approx(0 if problem == "fact_erasure" else 0.4)
    assert row["rewrite_magnitude"] == pytest.approx(0.5 if towards_new else -0.5)


@pytest.mark.parametrize("problem", ["fact_amplification", "fact_erasure"])
def test_nothing_to_recover_or_to_erase_is_no_score(problem: str) -> None:
    end = float(problem == "fact_amplification")
    for after in (end, 0.5, 1 - end):
        row = only(scores(edit(problem=problem), probes(*[(kind, 0, end, after) for kind in KINDS])))
        assert (row["rewrite"], row["paraphrase"], row["overall"]) == (None, None, None)
        assert row["neighborhood"] == 1 - abs(after - end)


def test_scores_are_exact_at_the_ends_of_probability() -> None:
    near_one = 1 - 2.0**-53
    row = only(scores(edit(), probes(("rewrite", 0, near_one, 1.0), ("paraphrase", 0, near_one, near_one))))
    assert (row["rewrite"], row["paraphrase"]) == (1, 0)
    row = only(scores(edit(), probes(("rewrite", 0, 1e-20, 3e-20), ("paraphrase", 0, 1 - 2.0**-52, near_one))))
    assert row["rewrite"] == pytest.approx(2e-20, rel=1e-12)
    assert row["paraphrase"] == 0.5
    row = only(
        scores(edit(problem="fact_erasure"), probes(("rewrite", 0, 5e-324, 0.0), ("paraphrase", 0, 4e-300, 1e-300)))
    )
    assert (row["rewrite"], row["paraphrase"]) == (1, pytest.approx(0.75, rel=1e-14))  # of logarithms


def test_what_is_missing_is_null() -> None:
    row = only(scores(edit(), probes(("rewrite", 0, 0.2, 0.6), ("paraphrase", 0, None, None)), metrics()))
    assert row["rewrite"] == pytest.approx(0.5)
    assert {name for name in SCORES if row[name] is None} == set(SCORES) - {"rewrite"}
    row = only(scores(edit(), ALL_KINDS.filter(pl.col("prompt_kind") != "paraphrase"), metrics(("perplexity", 8, 8))))
    assert (row["essence"], row["paraphrase"], row["overall"], row["overall_essence"]) == (1, None, None, None)


def test_the_first_prompt_counts_even_without_a_score() -> None:
    table = probes(("paraphrase", 0, 1.0, 1.0), ("paraphrase", 1, 0.5, 0.75))
    assert only(scores(edit(), table))["paraphrase"] is None
    assert only(scores(edit(), table, aggregate="mean"))["paraphrase"] == 0.5


def test_essence_is_clipped() -> None:
    for post, essence in ((6.0, 1), (8.0, 1), (10.5, 0.5), (13.0, 0), (99.0, 0), (inf, 0)):
        assert only(scores(edit(), probes(), metrics(("perplexity", 8.0, post))))["essence"] == essence


def test_failed_edits_have_no_scores_and_edits_keep_their_order() -> None:
    edits = pl.concat([edit("z"), edit("failed", status="failed", reason="diverged"), edit("a"), edit("unscored")])
    nowhere = probes(("rewrite", 0, nan, nan), edit_id="failed")
    table = pl.concat(
        [nowhere, ALL_KINDS.with_columns(edit_id=pl.lit("a")), ALL_KINDS.with_columns(edit_id=pl.lit("z"))]
    )
    table = pl.concat([table, probes(("rewrite", 0, 7.0, 7.0), edit_id="of no edit here")])
    result = scores(edits, table, metrics(("perplexity", 8.0, nan), edit_id="failed"))
    assert result["edit_id"].to_list() == ["z", "failed", "a", "unscored"]
    assert result["rewrite"].is_null().to_list() == [False, True, False, True]
    assert result.filter(edit_id="failed").select(SCORES).null_count().row(0) == (1,) * len(SCORES)


@pytest.mark.parametrize("value", [nan, -0.1, 1.001])
@pytest.mark.parametrize("column", ["p_pre", "p_post", "p_pre_other", "p_post_other"])
def test_what_is_no_probability_is_refused(column: str, value: float) -> None:
    table = ALL_KINDS.with_columns(pl.when(prompt_kind="rewrite").then(value).otherwise(pl.col(column)).alias(column))
    where = "edit_id e, prompt_kind rewrite, prompt_index 0"
    with pytest.raises(TableError, match=f"{where}: {column} is .*, which is not a probability"):
        scores(edit(), table)


def test_a_probability_rounded_above_one_is_one() -> None:
    assert only(scores(edit(), probes(("rewrite", 0, 0.5, 1 + 1e-12))))["rewrite"] == 1


def test_tables_that_cannot_be_scored() -> None:
    with pytest.raises(TableError, match="edit 'e' is of the problem 'forcing'; known are error_injection"):
        scores(edit(problem="forcing"), ALL_KINDS)
    with pytest.raises(TableError, match="edit 'e' has the status 'ok'; it must be 'done' or 'failed'"):
        scores(edit(status="ok"), ALL_KINDS)
    with pytest.raises(TableError, match="table of edits holds rows more than once, the first: edit_id e"):
        scores(pl.concat([edit(), edit()]), ALL_KINDS)
    with pytest.raises(TableError, match=r"table of probes holds .* edit_id e, prompt_kind rewrite, prompt_index 0"):
        scores(edit(), pl.concat([ALL_KINDS, ALL_KINDS]))
    with pytest.raises(TableError, match="not a table of probes: it lacks prompt_kind"):
        scores(edit(), edit())
    with pytest.raises(TableError, match=r"edit 'e': perplexity is 8.0 before and nan after"):
        scores(edit(), ALL_KINDS, metrics(("perplexity", 8.0, nan)))


def test_tables_from_files(tmp_path: Path) -> None:
    edit().write_parquet(tmp_path / "edits.parquet")
    assert read_edits(tmp_path / "edits.parquet").equals(edit())
    assert scores(tmp_path / "edits.parquet", ALL_KINDS.to_arrow()).equals(scores(edit(), ALL_KINDS))


probability = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 5e-324, 1e-17, 0.5, 1 - 2.0**-53, 1.0]))


@given(st.sampled_from(PROBLEMS), st.lists(probability, min_size=8, max_size=8), st.floats(1, 1e9), st.floats(1, inf))
def test_scores_are_shares(problem: str, values: list[float], before: float, after: float) -> None:
    rows = [(kind, 0, values[2 * i], values[2 * i + 1], *values[6:]) for i, kind in enumerate(KINDS)]
    row = only(scores(edit(problem=problem), probes(*rows), metrics(("perplexity", before, after))))
    assert all(0 <= row[name] <= 1 for name in SCORES[:-1] if row[name] is not None)
    assert -1 <= row["rewrite_magnitude"] <= 1
    pre, post = map(Fraction, values[:2])
    if problem == "fact_erasure":
        exact = max(Fraction(0), (pre - post) / pre) if pre > 0 else None
    else:
        exact = max(Fraction(0), 1 - (1 - post) / (1 - pre)) if pre < 1 else None
    # below 1e-280 logarithms are taken, whose digits are those of p less those of its exponent
    within = 1e-12 if problem == "fact_erasure" and max(pre, post) < 1e-280 else 5e-324
    assert row["rewrite"] == (None if exact is None else pytest.approx(float(exact), rel=1e-14, abs=within))
    pre, post = map(Fraction, values[4:6])
    kept = 1 - abs(post - pre) / (Fraction(1, 2) + abs(pre - Fraction(1, 2)))
    assert row["neighborhood"] == pytest.approx(float(kept), abs=1e-15)


@given(probability, probability)
def test_an_edit_that_changes_nothing_recovers_nothing(p: float, other: float) -> None:
    for problem in ("error_injection", "fact_erasure"):
        row = only(scores(edit(problem=problem), probes(*[(kind, 0, p, p, other, other) for kind in KINDS])))
        assert row["rewrite"] in (0, None)
        assert row["neighborhood"] == 1


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
