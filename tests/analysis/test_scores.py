"""Scores of edits against numbers worked out by hand, and the tables that cannot be scored."""

from __future__ import annotations

from fractions import Fraction
from math import inf, nan
from pathlib import Path

import polars as pl
import pytest
from helpers.score_tables import edit, metrics, only, probes
from hypothesis import given, strategies as st

from causalcone.analysis import SCORES, TableError, read_edits, scores
from causalcone.engine.edit.requests.requests import PROBLEMS

KINDS = ("rewrite", "paraphrase", "neighborhood")
ALL_KINDS = probes(
    ("rewrite", 0, 0.2, 0.6, 0.7, 0.1),
    ("paraphrase", 1, 0.0, 0.3),
    ("paraphrase", 0, 0.5, 0.75),
    ("neighborhood", 0, 0.1, 0.28),
    ("neighborhood", 1, 0.6, 0.3),
    ("attribute", 0, 0.5, 0.9),
)


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
