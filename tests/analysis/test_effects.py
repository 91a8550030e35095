"""Traces tables, token roles and effects against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from helpers.compare import assert_table_close
from helpers.trace_tables import fact_traces

from causalcone.analysis import (
    ROLES,
    TRACE_SCHEMA,
    TableError,
    average_indirect_effect,
    concentrated_facts,
    flagged_facts,
    peak_layers,
    read_traces,
    restore_effects,
    tracing_effects,
    with_roles,
    zeroing_effects,
)
from causalcone.analysis.effects import absolute_effects

# "The city of Big Old Rome lies in": subject tokens 3, 4, 5; further 6 is first subsequent, 7 is last.
LONG = ["The", " city", " of", " Big", " Old", " Rome", " lies", " in"]
SHORT = ["Oslo", " lies", " far", " up", " in"]


@pytest.fixture
def two_facts() -> pl.DataFrame:
    """Fact a restores beyond its clean run; fact b has one subject token and p_clean below p_corrupted."""
    a = {(0, 2): 0.1, (0, 3): 0.2, (0, 4): 0.3, (0, 5): 0.5, (0, 6): 0.05, (0, 7): 0.1}
    a |= {(1, 2): 0.1, (1, 3): 0.1, (1, 4): 0.5, (1, 5): 0.9, (1, 6): 0.1, (1, 7): 0.6}
    b = {(0, 0): 0.2, (0, 1): 0.4, (0, 2): 0.3, (0, 3): 0.5, (0, 4): 0.4}
    b |= {(1, 0): 0.3, (1, 1): 0.4, (1, 2): 0.5, (1, 3): 0.5, (1, 4): 0.6}
    return pl.concat(
        [
            fact_traces(a, tokens=LONG, subject=(3, 6), p_clean=0.7, p_corrupted=0.1, fact_id="a"),
            fact_traces(b, tokens=SHORT, subject=(0, 1), p_clean=0.3, p_corrupted=0.4, fact_id="b"),
        ]
    )


def cell(frame: pl.DataFrame, column: str, **where: Any) -> Any:
    (value,) = frame.filter(**where)[column].to_list()
    return value


def test_restore_effects_with_the_published_denominator(two_facts: pl.DataFrame) -> None:
    effects = restore_effects(two_facts)
    assert effects.height == two_facts.height
    a = effects.filter(fact_id="a")
    assert a["p_high"].unique().to_list() == [0.9]
    assert cell(a, "restore_effect", layer=0, token=5) == pytest.approx(0.4)
    assert cell(a, "fraction_restored", layer=0, token=5) == pytest.approx(0.4 / 0.8)
    assert cell(a, "fraction_restored", layer=1, token=5) == pytest.approx(1.0)
    assert cell(a, "relative_effect", layer=0, token=6) == pytest.approx(-0.05 / 0.8)
    assert cell(a, "fraction_restored", layer=0, token=6) == 0
    b = effects.filter(fact_id="b")
    assert b["p_high"].unique().to_list() == [0.6]
    assert cell(b, "fraction_restored", layer=0, token=3) == pytest.approx(0.1 / 0.2)
    assert a["flagged"].to_list() == [False] * 12
    assert b["flagged"].to_list() == [True] * 10


def test_restore_effects_with_the_clean_denominator(two_facts: pl.DataFrame) -> None:
    effects = restore_effects(two_facts, denominator="p_clean")
    assert cell(effects, "fraction_restored", fact_id="a", layer=1, token=5) == pytest.approx(0.8 / 0.6)
    assert cell(effects, "relative_effect", fact_id="b", layer=0, token=0) == pytest.approx(-0.2 / 0.1)


def test_p_high_is_of_one_kind_window_and_method(two_facts: pl.DataFrame) -> None:
    def state(value: float, **names: Any) -> pl.DataFrame:
        return fact_traces({(0, 0): value}, tokens=["A"], subject=(0, 1), p_clean=0.2, p_corrupted=0.1, **names)

    effects = restore_effects(
        pl.concat([state(0.3), state(0.4, kind="mlp"), state(0.5, window=3), state(0.6, method="sever_mlp")])
    )
    assert effects["p_high"].to_list() == [0.3, 0.4, 0.5, 0.6]


def test_nothing_to_restore_is_no_effect_and_not_a_number_only_where_undefined() -> None:
    frame = fact_traces({(0, 0): 0.2, (0, 1): 0.1}, tokens=["A", "b"], subject=(0, 1), p_clean=0.2, p_corrupted=0.2)
    effects = restore_effects(frame)
    assert effects["fraction_restored"].to_list() == [0, 0]
    assert effects["relative_effect"].to_list() == [None, None]
    better = fact_traces({(0, 0): 0.3}, tokens=["A", "b"], subject=(0, 1), p_clean=0.2, p_corrupted=0.2)
    assert restore_effects(better, denominator="p_clean")["fraction_restored"].to_list() == [None]


def test_tracing_effect_is_the_largest_over_tokens(two_facts: pl.DataFrame) -> None:
    effects = tracing_effects(two_facts)
    assert effects.select("fact_id", "layer", "token").rows() == [("a", 0, 5), ("a", 1, 5), ("b", 0, 3), ("b", 1, 4)]
    assert effects["effect"].to_list() == pytest.approx([0.5, 1.0, 0.5, 1.0])
    assert effects["flagged"].to_list() == [False, False, True, True]
    assert tracing_effects(two_facts, denominator="p_clean")["effect"].to_list() == pytest.approx([4 / 6, 8 / 6, 1, 2])


def test_tracing_effect_at_the_last_subject_token_is_not_clipped(two_facts: pl.DataFrame) -> None:
    effects = tracing_effects(two_facts, at="subject_last")
    assert effects.select("fact_id", "layer", "token").rows() == [("a", 0, 5), ("a", 1, 5), ("b", 0, 0), ("b", 1, 0)]
    assert effects["effect"].to_list() == pytest.approx([0.5, 1.0, -0.2 / 0.2, -0.1 / 0.2])


def test_absolute_effect_at_the_last_subject_token(two_facts: pl.DataFrame) -> None:
    effects = absolute_effects(two_facts)
    assert effects.select("fact_id", "layer", "token").rows() == [("a", 0, 5), ("a", 1, 5), ("b", 0, 0), ("b", 1, 0)]
    assert effects["effect"].to_list() == pytest.approx([0.4, 0.8, -0.2, -0.1])


def test_first_of_equal_tokens_carries_the_tracing_effect() -> None:
    frame = fact_traces({(0, 1): 0.5, (0, 0): 0.5}, tokens=["A", "b"], subject=(0, 1), p_clean=0.6, p_corrupted=0.1)
    assert tracing_effects(frame)["token"].to_list() == [0]


def test_flagged_facts(two_facts: pl.DataFrame) -> None:
    assert flagged_facts(two_facts).rows() == [("b", 0.3, 0.4)]


def roles_of(tokens: int, subject: tuple[int, int]) -> list[list[str]]:
    frame = fact_traces(
        {(0, token): 0.5 for token in range(tokens)},
        tokens=["t"] * tokens,
        subject=subject,
        p_clean=0.6,
        p_corrupted=0.1,
    )
    rows = with_roles(frame)
    return [[str(role) for role in rows.filter(token=token)["role"]] for token in range(tokens)]


def test_roles_of_a_long_prompt() -> None:
    assert roles_of(10, (2, 6)) == [
        [],
        [],
        ["first_subject"],
        ["middle_subject"],
        ["middle_subject"],
        ["last_subject"],
        ["first_subsequent"],
        ["further"],
        ["further"],
        ["last"],
    ]


@pytest.mark.parametrize(
    ("tokens", "subject", "expected"),
    [
        (3, (0, 1), [["first_subject", "last_subject"], ["first_subsequent"], ["last"]]),
        (3, (0, 2), [["first_subject"], ["last_subject"], ["first_subsequent", "last"]]),
        (3, (1, 3), [[], ["first_subject"], ["last_subject", "last"]]),
        (2, (1, 2), [[], ["first_subject", "last_subject", "last"]]),
    ],
    ids=["one subject token", "one following token", "ends in the subject", "ends in a subject of one token"],
)
def test_roles_that_coincide(tokens: int, subject: tuple[int, int], expected: list[list[str]]) -> None:
    assert roles_of(tokens, subject) == expected


def test_average_indirect_effect(two_facts: pl.DataFrame) -> None:
    averages = average_indirect_effect(two_facts)
    assert averages["mean_corrupted"].unique().to_list() == [0.25]
    by_role = {
        (role, layer): (effect, count, facts)
        for role, layer, effect, count, facts in averages.select("role", "layer", "effect", "count", "facts").rows()
    }
    assert len(by_role) == 12
    # p_patched of a and of b; b's only subject token is first and last.
    assert by_role["first_subject", 0] == (pytest.approx((0.2 + 0.2) / 2 - 0.25), 2, 2)
    assert by_role["middle_subject", 0] == (pytest.approx(0.3 - 0.25), 1, 1)
    assert by_role["last_subject", 1] == (pytest.approx((0.9 + 0.3) / 2 - 0.25), 2, 2)
    assert by_role["first_subsequent", 0] == (pytest.approx((0.05 + 0.4) / 2 - 0.25), 2, 2)
    assert by_role["further", 1] == (pytest.approx((0.5 + 0.5) / 2 - 0.25), 2, 1)
    assert by_role["last", 0] == (pytest.approx((0.1 + 0.4) / 2 - 0.25), 2, 2)


def test_average_indirect_effect_counts_each_fact_once_in_the_corrupted_mean() -> None:
    few = fact_traces({(0, 0): 0.5}, tokens=["A", "b"], subject=(0, 1), p_clean=0.9, p_corrupted=0.1, fact_id="few")
    many = fact_traces(
        {(layer, token): 0.5 for layer in range(5) for token in range(2)},
        tokens=["A", "b"],
        subject=(0, 1),
        p_clean=0.9,
        p_corrupted=0.4,
        fact_id="many",
    )
    assert average_indirect_effect(pl.concat([few, many]))["mean_corrupted"].unique().to_list() == [0.25]


def test_standard_error_of_one_token_per_fact_is_the_usual_one() -> None:
    values = [0.1, 0.4, 0.7]
    facts = [
        fact_traces({(0, 0): value}, tokens=["A", "b"], subject=(0, 1), p_clean=0.9, p_corrupted=0, fact_id=str(value))
        for value in values
    ]
    averages = average_indirect_effect(pl.concat(facts))
    assert cell(averages, "standard_error", role="last_subject") == pytest.approx(0.3 / 3**0.5)
    assert average_indirect_effect(facts[0])["standard_error"].to_list() == [None, None]


def test_standard_error_takes_facts_as_independent_not_tokens() -> None:
    def fact(name: str, value: float) -> pl.DataFrame:
        tokens = ["A", "b", "c", "d", "e", "f"]
        values = {(0, token): value for token in (2, 3, 4)}
        return fact_traces(values, tokens=tokens, subject=(0, 1), p_clean=0.9, p_corrupted=0, fact_id=name)

    averages = average_indirect_effect(pl.concat([fact("a", 0.2), fact("b", 0.4), fact("c", 0.9)]))
    further = averages.row(by_predicate=pl.col("role") == "further", named=True)
    assert (further["count"], further["facts"]) == (9, 3)
    sd = ((0.3**2 + 0.1**2 + 0.4**2) / 2) ** 0.5
    assert further["standard_error"] == pytest.approx(sd / 3**0.5)


def test_clipping_is_the_published_option(two_facts: pl.DataFrame) -> None:
    assert cell(average_indirect_effect(two_facts), "effect", role="first_subject", layer=0) < 0
    assert average_indirect_effect(two_facts, clip=True)["effect"].min() == 0


def test_peak_layers(two_facts: pl.DataFrame) -> None:
    averages = average_indirect_effect(two_facts)
    peaks = peak_layers(averages)
    assert peaks.select("role", "layer").rows() == [
        ("first_subject", 0),  # 0.2 and 0.2 at both layers: the lower one
        ("middle_subject", 1),
        ("last_subject", 1),
        ("first_subsequent", 1),
        ("further", 1),
        ("last", 1),
    ]
    assert cell(peaks, "effect", role="last_subject") == pytest.approx(0.35)


def layer_effects(effects: list[float]) -> pl.DataFrame:
    rows = [
        {"fact_id": "a", "method": "restore", "kind": "mlp", "window": 5, "layer": layer, "effect": effect}
        for layer, effect in enumerate(effects)
    ]
    return pl.DataFrame(rows)


@pytest.mark.parametrize(
    ("effects", "peak", "others", "concentrated"),
    [
        ([0.1, 0.5, 0.8, 1.0, 0.6, 0.4], 3, 3, True),
        ([0.5, 0.5, 0.8, 1.0, 0.6, 0.4], 3, 4, False),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 0, 1, True),
        ([0.0] * 6, 0, 5, False),
        ([-0.4, -0.2, -0.3, -0.3, -0.3, -0.3], 1, 5, False),
    ],
)
def test_concentrated_facts(effects: list[float], peak: int, others: int, concentrated: bool) -> None:
    (row,) = concentrated_facts(layer_effects(effects)).rows(named=True)
    assert (row["peak_layer"], row["other_layers"], row["concentrated"]) == (peak, others, concentrated)
    assert row["peak_effect"] == max(effects)


def test_zeroing_effects_and_their_absence_elsewhere(two_facts: pl.DataFrame) -> None:
    values = {(0, 0): 0.2, (1, 0): 0.9, (2, 0): 0.0}
    zeroed = fact_traces(
        values, tokens=["A"], subject=(0, 1), p_clean=0.8, p_corrupted=0.8, method="zero", kind="mlp", window=5
    )
    assert zeroing_effects(zeroed)["effect"].to_list() == pytest.approx([0.75, 0, 1])
    both = pl.concat([two_facts, zeroed])
    assert_table_close(zeroing_effects(both), zeroing_effects(zeroed))
    assert_table_close(restore_effects(both), restore_effects(two_facts))
    assert_table_close(average_indirect_effect(both), average_indirect_effect(two_facts))


def test_every_source_gives_the_same_frame(two_facts: pl.DataFrame, tmp_path: Path) -> None:
    two_facts.write_parquet(tmp_path / "all.parquet")
    parts = tmp_path / "parts" / "deeper"
    parts.mkdir(parents=True)
    two_facts[:7].write_parquet(parts / "part-0.parquet")
    two_facts[7:].write_parquet(parts / "part-1.parquet")
    (parts / "notes.txt").write_text("not a table")
    arrow = two_facts.to_arrow()
    encoded = arrow.set_column(2, "kind", arrow["kind"].dictionary_encode())
    narrow = two_facts.with_columns(pl.col("layer").cast(pl.Int16)).lazy()
    (batch,) = arrow.combine_chunks().to_batches()
    logs = pl.col("p_clean", "p_corrupted", "p_patched").log().name.prefix("log")
    expected = two_facts.with_columns(logs)
    for source in (two_facts, arrow, encoded, batch, narrow, tmp_path / "all.parquet", str(tmp_path / "parts")):
        frame = read_traces(source)
        assert frame.equals(expected)
        assert dict(frame.schema) == TRACE_SCHEMA


def test_further_columns_are_kept(two_facts: pl.DataFrame) -> None:
    assert read_traces(two_facts.with_columns(worker=pl.lit(3)))["worker"].sum() == 3 * two_facts.height


def test_unusable_tables(two_facts: pl.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="lacks layer, p_clean"):
        read_traces(two_facts.drop("layer", "p_clean"))
    with pytest.raises(TableError, match="not a traces table"):
        read_traces(two_facts.with_columns(layer=pl.lit("first")))
    with pytest.raises(TableError, match=r"2 rows .* the first: fact_id a, .*layer 0, token 2"):
        read_traces(pl.concat([two_facts, two_facts[:1]]))
    with pytest.raises(TableError, match=r"absent\.parquet does not exist"):
        read_traces(tmp_path / "absent.parquet")
    with pytest.raises(TableError, match=r"holds no \.parquet file"):
        read_traces(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(TableError, match=r"broken\.parquet is not a Parquet file"):
        read_traces(tmp_path)
    with pytest.raises(TableError, match="cannot be a list"):
        read_traces([])  # type: ignore[arg-type]


def test_an_empty_table_gives_empty_results(two_facts: pl.DataFrame) -> None:
    empty = pa.Table.from_batches([], schema=two_facts.to_arrow().schema)
    assert restore_effects(empty).height == 0
    assert tracing_effects(empty).height == 0
    assert average_indirect_effect(empty).height == 0


def test_roles_are_ordered(two_facts: pl.DataFrame) -> None:
    assert with_roles(two_facts)["role"].unique().sort().to_list() == list(ROLES)
