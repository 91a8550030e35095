"""Mean effects by layer, and the summary of gradients, against numbers worked out by hand."""

import polars as pl
import pytest
from helpers.compare import assert_table_close
from helpers.trace_tables import fact_traces

from causalcone.analysis import (
    TableError,
    average_indirect_effect,
    flagged_facts,
    gradient_norms,
    gradient_summary,
    joint_effects,
    plot,
    read_gradients,
    restore_effects,
    severed_effects,
    tracing_effects,
    with_roles,
    zeroing_curve,
    zeroing_effects,
)

TOKENS = ["Big", " Rome", " lies", " in"]


def together(values, **names):
    """One fact's rows about several tokens together; ``values`` by layer."""
    cells = {(layer, 0): value for layer, value in enumerate(values)}
    rows = fact_traces(cells, tokens=TOKENS, subject=(0, 2), **{"p_clean": 0.8, "p_corrupted": 0.2, **names})
    return rows.with_columns(token=pl.lit(None, pl.Int64), token_text=pl.lit(None, pl.String))


def zeroed(values, **names):
    rows = together(values, method="zero", kind="mlp", window=5, **names)
    return rows.with_columns(p_corrupted=pl.lit(None, pl.Float64))


def last_subject(values, method="restore", **names):
    cells = {(layer, 1): value for layer, value in enumerate(values)}
    return fact_traces(
        cells, tokens=TOKENS, subject=(0, 2), **{"p_clean": 0.9, "p_corrupted": 0.1, "method": method, **names}
    )


def test_zeroing_curve():
    table = pl.concat([zeroed([0.2, 0.9], fact_id="a"), zeroed([0.4, 0.2], fact_id="b", p_clean=0.5)])
    curve = zeroing_curve(table)
    assert curve.select("method", "kind", "window", "layer").rows() == [("zero", "mlp", 5, 0), ("zero", "mlp", 5, 1)]
    assert curve["effect"].to_list() == pytest.approx([(0.75 + 0.2) / 2, (0 + 0.6) / 2])
    assert curve["standard_error"].to_list() == pytest.approx([0.55 / 2, 0.6 / 2])  # |x - y| / 2 is sd / sqrt(2)
    assert curve["facts"].to_list() == [2, 2]
    assert zeroing_curve(zeroed([0.2]))["standard_error"].to_list() == [None]


def test_facts_without_a_clean_probability_have_no_zeroing_effect():
    table = pl.concat([zeroed([0.0], fact_id="a", p_clean=0.0), zeroed([0.2], fact_id="b")])
    assert zeroing_effects(table)["effect"].to_list() == [None, pytest.approx(0.75)]
    assert zeroing_curve(table).select("effect", "facts").rows() == [(pytest.approx(0.75), 1)]


def test_joint_effects():
    table = pl.concat([together([0.7, 0.2], fact_id="a"), together([0.5, 0.0], fact_id="b", p_corrupted=0.1)])
    means = joint_effects(pl.concat([table, last_subject([0.9]), zeroed([0.5])]))
    assert means["effect"].to_list() == pytest.approx([(0.5 + 0.4) / 2, (0 - 0.1) / 2])
    assert means["layer"].to_list() == [0, 1]


def test_severed_effects_are_paired_over_facts():
    plain = [last_subject([0.9, 0.5], fact_id="a"), last_subject([0.7, 0.3], fact_id="b")]
    severed = [last_subject([0.3, 0.5], "sever_mlp", fact_id="a"), last_subject([0.5, 0.2], "sever_mlp", fact_id="b")]
    alone = last_subject([1.0, 1.0], fact_id="only plain")
    elsewhere = plain[0].with_columns(token=pl.lit(3, pl.Int64), p_patched=pl.lit(0.0))
    means = severed_effects(pl.concat([*plain, alone, elsewhere]), pl.concat(severed))
    assert means["method"].unique().to_list() == ["sever_mlp"]
    assert means["plain"].to_list() == pytest.approx([(0.8 + 0.6) / 2, (0.4 + 0.2) / 2])
    assert means["severed"].to_list() == pytest.approx([(0.2 + 0.4) / 2, (0.4 + 0.1) / 2])
    assert means["difference"].to_list() == pytest.approx([(0.6 + 0.2) / 2, (0 + 0.1) / 2])
    assert means["difference_error"].to_list() == pytest.approx([0.4 / 2, 0.1 / 2])
    assert means["facts"].to_list() == [2, 2]


def test_one_table_or_folders_may_hold_plain_and_severed(tmp_path):
    plain, severed = last_subject([0.9, 0.5]), last_subject([0.3, 0.4], "sever_attn")
    for name, table in (("plain", plain), ("severed", severed)):
        (tmp_path / name).mkdir()
        table.write_parquet(tmp_path / name / "part.parquet")
    expected = severed_effects(pl.concat([plain, severed]))
    assert_table_close(severed_effects(tmp_path), expected)
    assert_table_close(severed_effects(tmp_path / "severed", tmp_path / "plain"), expected)


def test_what_is_missing_is_named():
    plain, severed = last_subject([0.9]), last_subject([0.3], "sever_mlp")
    with pytest.raises(TableError, match="no severed states at the last subject token"):
        severed_effects(plain)
    with pytest.raises(TableError, match="no plain states"):
        severed_effects(severed)
    with pytest.raises(TableError, match="no common states"):
        severed_effects(plain, severed.with_columns(fact_id=pl.lit("another")))
    with pytest.raises(TableError, match="role is 'subject'; choose from first_subject"):
        severed_effects(plain, severed, role="subject")
    with pytest.raises(TableError, match="no zeroed state"):
        zeroing_curve(plain)
    with pytest.raises(TableError, match="no tokens restored together"):
        joint_effects(plain)


def test_functions_about_single_tokens_leave_out_those_restored_together():
    single, joint = last_subject([0.9, 0.5]), together([0.6, 0.7], p_clean=0.9, p_corrupted=0.1)
    both = pl.concat([single, joint])
    assert_table_close(tracing_effects(both), tracing_effects(single))
    assert_table_close(average_indirect_effect(both), average_indirect_effect(single))
    assert with_roles(both).equals(with_roles(single))
    effects = restore_effects(both)  # each against the best of its own sort
    assert effects["p_high"].to_list() == [0.9] * 4
    assert restore_effects(pl.concat([single.with_columns(p_clean=0.0), joint]))["p_high"].to_list() == [0.9] * 4
    assert restore_effects(joint.with_columns(p_clean=pl.lit(0.0)))["p_high"].to_list() == [0.7, 0.7]
    assert len(plot.heatmap(both, "0").axes) == len(plot.heatmap(single, "0").axes)


@pytest.mark.parametrize("about_tokens", [tracing_effects, average_indirect_effect, plot.indirect_effect])
def test_tables_of_tokens_restored_together_only_are_refused(about_tokens):
    with pytest.raises(TableError, match="restored together"):
        about_tokens(together([0.6, 0.7]))


def test_heat_maps_of_tokens_restored_together_are_refused():
    with pytest.raises(TableError, match="restored together"):
        plot.heatmaps(together([0.6, 0.7]), "0")
    with pytest.raises(TableError, match="no traces of fact '0'"):
        plot.heatmaps(zeroed([0.6, 0.7]), "0")


def test_zeroed_tables_have_no_flagged_facts():
    assert flagged_facts(zeroed([0.5])).is_empty()


@pytest.fixture
def gradients():
    rows = [
        ("a", "mlp", 0, 0, 0.1, 0.1, 0.01),
        ("a", "mlp", 0, 1, 0.3, -0.2, -0.04),
        ("a", "mlp", 1, 0, 0.5, 0.1, 0.0),
        ("a", "mlp", 1, 1, 0.3, 0.1, 0.0),
        ("b", "mlp", 0, 0, 1.0, 0.1, 0.03),
        ("b", "mlp", 1, 0, 0.6, 0.1, 0.0),
        ("a", "attn", 0, 0, 0.2, 0.1, 0.0),
    ]
    columns = ["fact_id", "kind", "layer", "token", "norm", "total", "gap"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def test_gradient_summary(gradients):
    norms = gradient_norms(gradients)
    assert norms.filter(kind="mlp")["norm"].to_list() == pytest.approx([(0.2 + 1.0) / 2, (0.4 + 0.6) / 2])
    summary = gradient_summary(gradients)
    assert summary["kind"].to_list() == ["attn", "mlp"]
    assert summary.row(1)[1:] == (0, pytest.approx(0.6), pytest.approx(0.08 / 6), pytest.approx(0.04), 2)


def test_tables_that_are_not_gradients(gradients, tmp_path):
    with pytest.raises(TableError, match=r"not a table of gradients: it lacks norm"):
        read_gradients(gradients.drop("norm"))
    gradients.write_parquet(tmp_path / "part.parquet")
    assert read_gradients(tmp_path).equals(read_gradients(gradients))
    with pytest.raises(TableError, match="not a traces table"):
        restore_effects(tmp_path)
