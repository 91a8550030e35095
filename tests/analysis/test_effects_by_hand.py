"""Averages of effects and their figures, with numbers worked out by hand, and what effects are not taken of."""

import numpy as np
import polars as pl
import pytest
from helpers.made_up_study import traced, zeroed
from helpers.trace_tables import fact_traces

from causalcone.analysis import (
    TableError,
    average_indirect_effect,
    concentrated_facts,
    joint_effects,
    plot,
    read_traces,
    restore_effects,
    severed_effects,
    tracing_effects,
    with_roles,
)
from causalcone.analysis.effects import mean_effects
from causalcone.analysis.plot.effects import effects_by_window, peak_layers_by_window


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


# --- average indirect effects ---


def further(fact, values):
    """One subject token, one that follows, and further tokens of these values before the last."""
    cells = {(0, 2 + place): value for place, value in enumerate(values)}
    tokens = ["t"] * (len(values) + 3)
    return fact_traces(cells, tokens=tokens, subject=(0, 1), p_clean=0.9, p_corrupted=0.1, fact_id=fact)


@pytest.mark.parametrize(
    ("values", "effect", "error", "count"),
    [
        # mean 1.2 / 3 = 0.4; the facts' sums differ from theirs by -0.2 and 0.2: sqrt(0.08 x 2 / 9)
        (([0.2], [0.4, 0.6]), 0.3, 0.4 / 3, 3),
        # means 0.2 and 0.6; the square of 80,000 needs more than 32 bits
        (([0.2] * 40_000, [0.6] * 40_000), 0.3, 0.2, 80_000),
    ],
    ids=["unequal numbers of tokens", "many tokens"],
)
def test_standard_error_of_pooled_tokens(values, effect, error, count):
    table = pl.concat(further(name, own) for name, own in zip("ab", values, strict=True))
    row = average_indirect_effect(table).row(by_predicate=pl.col("role") == "further", named=True)
    assert (row["effect"], row["standard_error"]) == (near(effect), near(error))
    assert (row["count"], row["facts"]) == (count, 2)


def test_facts_in_two_files_are_refused(tmp_path):
    for name in ("one", "two"):
        further("a", [0.2]).write_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(TableError, match="fact 'a' has restore of hidden:1 in several files"):
        average_indirect_effect(tmp_path)


# --- effects by layer ---


EFFECTS = {"a": (0.2, 0.4), "b": (0.6, -0.5), "c": (0.4, 0.8)}


def effects(values=EFFECTS):
    rows = [(f, "restore", "mlp", 5, k, x) for f, own in values.items() for k, x in enumerate(own)]
    columns = {"fact_id": str, "method": str, "kind": str, "window": int, "layer": int, "effect": float}
    return pl.DataFrame(rows, schema=columns, orient="row")


@pytest.mark.parametrize(
    ("compat", "second", "error", "facts"),
    [(None, 0.4, 0.4 / np.sqrt(3), 3), ("published", 0.6, np.sqrt(0.08) / np.sqrt(2), 2)],
)
def test_mean_effects(compat, second, error, facts):
    """0.2, 0.6, 0.4 with a standard deviation of 0.2; then 0.4, 0.8 and what is negative, as 0 or left out."""
    found = mean_effects(effects(), compat)
    assert found.columns == ["layer", "mean", "standard_error", "facts"]
    assert found.row(0) == (0, near(0.4), near(0.2 / np.sqrt(3)), 3)
    assert found.row(1) == (1, near(second), near(error), facts)


def test_unknown_effects_are_no_zeros():
    found = mean_effects(effects({"a": (0.2,), "b": (None,), "c": (0.4,)}))
    assert found.row(0) == (0, near(0.3), near(0.1), 2)
    with pytest.raises(TableError, match="compat is 'papers'; choose from published"):
        mean_effects(effects(), "papers")


@pytest.mark.parametrize(("compat", "second"), [(None, 0.4), ("published", 0.6)])
def test_effects_by_window(compat, second):
    figure = effects_by_window({5: effects(), 1: effects({"a": (0.1, 0.3)}), 3: effects({})}, compat=compat)
    (axes,) = figure.axes
    one, five = axes.lines
    assert (one.get_label(), five.get_label()) == ("one layer", "5 layers")
    assert one.get_ydata().tolist() == near([0.1, 0.3])
    assert five.get_ydata().tolist() == near([0.4, second])
    assert figure.get_suptitle().endswith("positive effects only") == (compat == "published")
    band = axes.collections[1].get_paths()[0].vertices
    assert band[band[:, 0] == 0, 1].max() == near(0.4 + 1.96 * 0.2 / np.sqrt(3))
    with pytest.raises(TableError, match="no effects to draw"):
        effects_by_window({5: effects({"a": (None, None)})})


def test_peak_layers_by_window():
    """Of five facts one peaks at layer 0 and two at layer 1; one has no positive effect, and of one none is known."""
    values = {**EFFECTS, "d": (0.0, -0.1), "e": (None, None)}
    figure = peak_layers_by_window({5: effects(values), 1: effects({"a": (0.1, 0.0)})})
    one, five = figure.axes
    assert [bar.get_height() for bar in one.patches] == [1, 0]
    assert [bar.get_height() for bar in five.patches] == near([1 / 3, 2 / 3])
    assert (one.get_title(), five.get_title()) == ("one layer", "5 layers\n(1 without effect)")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None,) * 6, (None, None, None, False)),
        ((None, 0.5, 0.1, 0.1, 0.1, 0.3), (1, 0.5, 1, True)),
        ((0.0, 0.0, 0.0), (0, 0.0, 2, False)),
        ((0.1, 0.2, 0.2, 0.2), (1, 0.2, 3, True)),
    ],
    ids=["unknown", "partly known", "no effect", "few layers"],
)
def test_concentrated_facts(values, expected):
    (row,) = concentrated_facts(effects({"a": values})).rows(named=True)
    assert tuple(row[name] for name in ("peak_layer", "peak_effect", "other_layers", "concentrated")) == expected


# --- severed, and tokens together ---


def severed_traces():
    """Effects at layers 0 and 1 of plain restoring, and with MLPs and attention severed; attention of fact a only."""
    return (
        traced({"a": (0.8, 0.4), "b": (0.6, 0.2), "c": (0.1, 0.1)}),
        traced({"a": (0.2, 0.4), "b": (0.4, 0.1)}, method="sever_mlp"),
        traced({"a": (0.7, 0.3)}, method="sever_attn"),
    )


def test_severed_effects_have_errors_of_their_own():
    found = severed_effects(*severed_traces()).filter(method="sever_mlp")
    assert found["plain"].to_list() == near([0.7, 0.3])
    assert found["plain_error"].to_list() == near([0.1, 0.1])  # half of the facts' difference
    assert found["severed_error"].to_list() == near([0.1, 0.15])
    assert found["difference_error"].to_list() == near([0.2, 0.05])
    assert found["facts"].to_list() == [2, 2]


def test_severed_lines_are_of_common_facts():
    assert severed_effects(*severed_traces(), common=True)["facts"].unique().to_list() == [1]
    figure = plot.severed(*severed_traces())
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["nothing severed"] == near([0.8, 0.4])
    assert lines["MLP severed"] == near([0.2, 0.4])
    assert lines["attention severed"] == near([0.7, 0.3])
    assert figure.get_suptitle() == "Last subject token, one fact"


def test_severed_effects_of_single_facts_and_tokens():
    last = [traced({"a": (0.5, 0.6), "b": (0.0, 0.0)}, 2), traced({"a": (0.4, 0.1)}, 2, method="sever_mlp")]
    tables = (*severed_traces(), *last)
    found = severed_effects(*tables, fact_id="b")
    assert found.select("method", "plain", "severed").rows() == [
        ("sever_mlp", near(0.6), near(0.4)),
        ("sever_mlp", near(0.2), near(0.1)),
    ]
    assert severed_effects(*tables, token=2)["severed"].to_list() == near([0.4, 0.1])
    figure = plot.severed(*tables, fact_id="a", token=2)
    assert figure.get_suptitle() == "Token 2, fact a"
    assert list(figure.axes[0].lines[0].get_ydata()) == near([0.5, 0.6])
    with pytest.raises(TableError, match="no severed states at the last subject token of fact 'c'"):
        severed_effects(*tables, fact_id="c")


def test_joint_effects_have_standard_errors():
    rows = traced({"a": (0.7, 0.2), "b": (0.5, 0.0)})
    together = rows.with_columns(token=pl.lit(None, pl.Int64), token_text=pl.lit(None, pl.String))
    found = joint_effects(together)
    assert found["effect"].to_list() == near([0.6, 0.1])
    assert found["standard_error"].to_list() == near([0.1, 0.1])
    assert found["facts"].to_list() == [2, 2]


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "mean"}, "at is 'mean'; choose from max, subject_last"),
        ({"denominator": "p_patched"}, "denominator is 'p_patched'; choose from p_high, p_clean"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(TableError, match=message):
        tracing_effects(traced(EFFECTS | {"b": (0.6, 0.5)}), **options)


GOOD = traced({"a": (0.5,)})


@pytest.mark.parametrize("function", [read_traces, tracing_effects, average_indirect_effect, with_roles])
@pytest.mark.parametrize("column", ["p_clean", "p_corrupted", "p_patched"])
@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.001])
def test_what_is_no_probability_is_refused(function, column, value):
    with pytest.raises(TableError, match=rf"fact_id a, .*layer 0, token 0: {column} is .*, which is not a probability"):
        function(GOOD.with_columns(pl.lit(value).alias(column)))


def test_a_probability_rounded_above_one_is_one():
    assert restore_effects(GOOD.with_columns(p_patched=pl.lit(1 + 1e-12)))["restore_effect"].to_list() == [1.0]
    assert read_traces(zeroed({"a": (0.5,)}).with_columns(p_corrupted=None)).height == 1


@pytest.mark.parametrize("function", [tracing_effects, average_indirect_effect, with_roles, severed_effects])
def test_states_that_occur_twice_are_refused(function):
    with pytest.raises(TableError, match="states that occur more than once, the first: fact_id a"):
        function(pl.concat([GOOD, GOOD, traced({"a": (0.5,)}, method="sever_mlp")]))
