"""What the terminal shows of a table of results."""

import io

import polars as pl
import pytest
from helpers.made_up_study import edited, zeroed
from helpers.trace_tables import made_up_traces
from rich.console import Console

from causalcone.analysis import average_indirect_effect, scores, zeroing_curve
from causalcone.runners.show.edit_tables import best_sentences, failed_lines, rewrite_tables
from causalcone.runners.show.tables import effect_tables, gradient_table, layer_tables, zeroing_sentence

TOKENS = ["The", " city", " of", " Big", " Old", " Rome", " is", " in"]
HEADS = [(f"head.{head}", 1) for head in range(12)]


def shown(tables):
    console = Console(file=io.StringIO(), width=160)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_states_and_severed_states_have_a_row_each():
    plain = made_up_traces(TOKENS, (3, 6), 6, states=[("hidden", 1), ("mlp", 5)])
    severed = plain.filter(kind="hidden").with_columns(method=pl.lit("sever_mlp"), p_patched=pl.lit(0.3))
    averages = average_indirect_effect(pl.concat([plain, severed]))
    (table,) = effect_tables(averages)
    text = shown([table])
    assert [line.split()[1] for line in text.splitlines() if ":" in line] == ["hidden:1", "mlp:5", "hidden:1,"]
    best = averages.filter(method="restore", kind="hidden").filter(pl.col("role") == "last_subject")
    row = best.sort("effect", descending=True).row(0, named=True)
    assert f"{row['effect']:+.3f} ({row['layer']})" in text
    assert "hidden:1, MLP severed" in text
    assert "+0.250 (0)" in text


def test_of_144_heads_the_ten_with_the_largest_effects_are_shown():
    table = made_up_traces(TOKENS, (3, 6), 12, states=[("hidden", 1), *HEADS])
    values = pl.when(kind="head.7", layer=5, token=5).then(0.99).otherwise(pl.min_horizontal("p_patched", 0.9))
    averages = average_indirect_effect(table.with_columns(p_patched=values))
    states, heads = effect_tables(averages)
    assert (states.row_count, heads.row_count) == (1, 10)
    text = shown([heads])
    assert "10 of 144 heads" in text
    first = next(line for line in text.splitlines() if "head" in line and "│" in line)
    assert first.split("│")[1].strip() == "5, head 7"
    assert "+0.940" in first


def test_heads_are_not_ranked_by_roles_of_few_facts():
    """A fact with a middle token differs from the mean of all facts, whatever the head."""
    long = made_up_traces(TOKENS, (3, 6), 4, states=HEADS[:2], fact_id="long", p_corrupted=0.7)
    short = made_up_traces(TOKENS, (3, 5), 4, states=HEADS[:2], fact_id="short")
    raised = pl.when(kind="head.1", layer=2, token=7).then(0.95).otherwise("p_patched")
    averages = average_indirect_effect(pl.concat([long, short]).with_columns(p_patched=raised))
    (heads,) = effect_tables(averages)
    first = next(line for line in shown([heads]).splitlines() if "head" in line and "│" in line)
    assert "2, head 1" in first


@pytest.mark.parametrize(("layers", "states"), [(6, [("mlp", 5), ("hidden", 1)]), (3, HEADS)])
def test_effects_by_layer(layers, states):
    table = made_up_traces(TOKENS, (3, 6), layers, states=states).filter(token=5)
    curve = zeroing_curve(table.with_columns(method=pl.lit("zero"), token=pl.lit(None, pl.Int64)))
    (found,) = layer_tables(curve, "Effect of zeroing", "z.3f")
    assert found.row_count == (layers if states != HEADS else 10)
    assert f"{curve['effect'].max():.3f}" in shown([found])
    assert "Effect of zeroing" in shown([found])


def test_sentences_of_one_layer_and_one_fact():
    edits, probes = edited({"a": (0.5,)})
    (sentence,) = best_sentences(scores(edits, probes, aggregate="mean"))
    assert sentence == "Error injection: the overall score is that of ROME at layer 0 (0.633)."
    (title,) = (table.title for table in rewrite_tables(scores(edits, probes, aggregate="mean")))
    assert title == "Error injection: mean rewrite score of 1 fact by layer"
    several = scores(*edited({"a": (0.5, 0.2)}), aggregate="mean")
    assert best_sentences(several)[0].startswith("Error injection: the best overall score is that of ROME at layer 0")
    assert failed_lines({"odd": 1}, "are suspect") == ["1 edit is suspect: odd"]
    curve = zeroing_curve(zeroed({"a": (0.2, 0.4)}).with_columns(window=pl.lit(1, pl.Int64)))
    assert zeroing_sentence(curve) == (
        "Zeroing: without the subject's mlp outputs at layer 1, 0.400 of p(answer) is lost, at the last layer 0.400."
    )


def test_gradients_by_kind():
    row = {"kind": "mlp", "layer": 3, "norm": 0.25, "mean_gap": 0.001, "largest_gap": 0.02, "facts": 4}
    text = shown([gradient_table(pl.DataFrame([row]))])
    for value in ("mlp", "0.25 (3)", "0.001", "0.02"):
        assert value in text
