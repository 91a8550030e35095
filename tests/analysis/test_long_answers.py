"""Answers whose probability is too small for a number: effects and scores are those of the logarithms, and on the
per-token mean of ordinary size."""

from __future__ import annotations

import warnings

import numpy as np
import polars as pl
import pytest
from helpers.trace_tables import fact_traces, made_up_traces
from matplotlib.axes import Axes

from causalcone.analysis import (
    TRACE_SCHEMA,
    TableError,
    average_indirect_effect,
    flagged_facts,
    plot,
    read_probes,
    read_traces,
    restore_effects,
    scores,
    tracing_effects,
    zeroing_curve,
    zeroing_effects,
)

TOKENS = ["The", " city", " of", " Rome"]
LOGS = {"clean": -900.0, "corrupted": -905.0}
PATCHED = {(layer, token): -905.0 + 3 * np.sin(7 * layer + token) for layer in range(3) for token in range(4)}
ANSWER = 150


def long_traces(clean=LOGS["clean"], corrupted=LOGS["corrupted"], patched=PATCHED, method="restore"):
    """A fact's rows with these log-probabilities of an answer of 150 tokens."""
    rows = fact_traces(
        dict.fromkeys(patched, 0.0), tokens=TOKENS, subject=(1, 3), p_clean=0.0, p_corrupted=0.0, method=method
    )
    logs = {"logp_clean": clean, "logp_corrupted": corrupted, "answer_tokens": ANSWER}
    typed = {name: pl.lit(value, TRACE_SCHEMA[name]) for name, value in logs.items()}
    return rows.with_columns(**typed, logp_patched=pl.Series(list(patched.values()), dtype=pl.Float64))


def long_probes(**logs):
    """The rewrite prompt of a fact's erasure; other logs of the target are none."""
    edits = pl.DataFrame(
        {"edit_id": "e", "fact_id": "0", "problem": "fact_erasure", "method": "rome", "layer": 0, "window": 1,
         "steps": 1, "loss": 0.0, "delta_norm": 1.0, "status": "done", "reason": None}
    )  # fmt: skip
    probe = {"edit_id": "e", "prompt_kind": "rewrite", "prompt_index": 0, "p_pre_other": None, "p_post_other": None}
    p = {name.removeprefix("log"): float(np.exp(value)) for name, value in logs.items()}
    return edits, pl.DataFrame(probe | p | logs | {"answer_tokens": ANSWER})


def in_logs(frame, high):
    """Fractions restored, from the logarithms alone."""
    patched, corrupted = frame["logp_patched"].to_numpy(), frame["logp_corrupted"].to_numpy()
    top = np.maximum(high, corrupted)
    d, low, value = (np.exp(each - top) for each in (high, corrupted, patched))
    return (value - low) / abs(d - low)


@pytest.mark.parametrize("denominator", ["p_high", "p_clean"])
@pytest.mark.parametrize("clean", [-900.0, -907.0, -1400.0])
def test_relative_effects_are_those_of_the_logarithms(clean, denominator):
    table = long_traces(clean)
    with pytest.warns(UserWarning, match="--answer-score mean"):
        found = restore_effects(table, denominator)
    high = max(clean, max(PATCHED.values())) if denominator == "p_high" else clean
    expected = in_logs(table, np.full(table.height, high))
    np.testing.assert_allclose(found["relative_effect"].to_numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found["fraction_restored"].to_numpy(), expected.clip(0), rtol=1e-12)
    assert found["restore_effect"].to_list() == [0.0] * table.height
    assert found["flagged"].to_list() == [clean <= LOGS["corrupted"]] * table.height
    assert flagged_facts(table)["fact_id"].to_list() == ["0"] * (clean <= LOGS["corrupted"])


def test_a_corrupted_run_that_is_far_likelier_restores_nothing():
    effects = restore_effects(long_traces(corrupted=-10.0))
    assert effects["relative_effect"].is_finite().all()
    assert effects["fraction_restored"].to_list() == [0.0] * effects.height


def test_nothing_of_nothing_is_known_of_tables_without_logarithms():
    older = long_traces().drop("logp_clean", "logp_corrupted", "logp_patched", "answer_tokens")
    effects = restore_effects(older)
    assert effects["relative_effect"].null_count() == effects.height
    assert effects["fraction_restored"].to_list() == [0.0] * effects.height


def test_ordinary_effects_are_those_of_before():
    """To the bit: they are of p itself."""
    table = made_up_traces(TOKENS, (1, 3), 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = restore_effects(table)
    high = found["p_clean"].clip(found.select(pl.max("p_patched").over("kind")).to_series())
    effect = found["p_patched"] - found["p_corrupted"]
    assert found["relative_effect"].equals(effect / (high - found["p_corrupted"]).abs(), check_names=False)


def test_zeroing():
    lost = {-901.0: 1 - np.exp(-1.0), -890.0: 0.0, -2000.0: 1.0, -10.0: 0.0}
    rows = long_traces(patched={(layer, 0): log for layer, log in enumerate(lost)}, method="zero")
    nothing = {"logp_corrupted": pl.lit(None, pl.Float64), "p_corrupted": pl.lit(None, pl.Float64)}
    table = rows.with_columns(**nothing, p_patched=pl.col("logp_patched").exp(), token=pl.lit(None, pl.Int64))
    assert zeroing_effects(table)["effect"].to_list() == pytest.approx(list(lost.values()), rel=1e-12)
    assert zeroing_curve(table).height == len(lost)


@pytest.mark.parametrize(("post", "erased"), [(-902.0, 1 - np.exp(-2.0)), (-5000.0, 1.0), (-800.0, 0.0), (-1.0, 0.0)])
def test_erasure_of_a_long_answer(post, erased):
    edits, probes = long_probes(logp_pre=-900.0, logp_post=post)
    assert scores(edits, probes)["rewrite"].to_list() == pytest.approx([erased], rel=1e-12)


def test_the_mean_per_token():
    table = long_traces().with_columns(p_patched_sd=pl.lit(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_traces(table, "mean")
    for name in ("clean", "corrupted", "patched"):
        np.testing.assert_allclose(found[f"p_{name}"], np.exp(table[f"logp_{name}"].to_numpy() / ANSWER), rtol=1e-12)
    assert found["p_patched_sd"].null_count() == found.height
    assert found["answer_tokens"].unique().to_list() == [1]
    assert read_traces(found, "mean").equals(found), "taken twice"
    effects = tracing_effects(table, answer_score="mean")
    assert effects.equals(tracing_effects(found))
    assert effects["effect"].max() > 0
    assert average_indirect_effect(table, answer_score="mean")["effect"].abs().min() > 0
    edits, probes = long_probes(logp_pre=-900.0, logp_post=-950.0)
    assert scores(edits, probes, answer_score="mean")["rewrite"].item() == pytest.approx(1 - np.exp(-50 / ANSWER))
    assert read_probes(probes, "mean")["p_pre"].item() == pytest.approx(np.exp(-6))


def test_the_mean_of_answers_of_one_token_is_the_product():
    table = made_up_traces(TOKENS, (1, 3), 6).with_columns(answer_tokens=pl.lit(1, pl.Int64))
    mean, product = (tracing_effects(table, answer_score=score) for score in ("mean", "product"))
    np.testing.assert_allclose(mean["effect"], product["effect"], rtol=1e-12, atol=1e-12)


def test_the_mean_of_a_table_of_before_is_refused():
    with pytest.raises(TableError, match=r"fact_id 0, .*answer_tokens.*answer_score='product'"):
        restore_effects(made_up_traces(TOKENS, (1, 3), 2), answer_score="mean")
    edits, probes = long_probes(logp_pre=-1.0, logp_post=-2.0)
    with pytest.raises(TableError, match=r"edit_id e, prompt_kind rewrite, .*answer_tokens"):
        scores(edits, probes.drop("answer_tokens"), answer_score="mean")
    with pytest.raises(TableError, match="answer_score is 'sum'; choose from product, mean"):
        read_traces(long_traces(), "sum")


def test_a_heat_map_shows_what_is_too_small_for_a_number():
    def bar(figure) -> Axes:
        return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("p(target)"))

    figure = plot.heatmap(long_traces(), "0")
    (mesh,) = next(axes for axes in figure.axes if axes.get_title().startswith("Restoring")).collections
    shown = np.asarray(mesh.get_array()).T.ravel()
    np.testing.assert_allclose(shown, np.exp(np.array(list(PATCHED.values())) + 900), rtol=1e-12)
    assert mesh.get_clim() == (pytest.approx(np.exp(-5)), 1)
    assert bar(figure).get_title(loc="left") == "p(target) / e^-900"
    assert bar(plot.heatmaps(long_traces(), "0", answer_score="mean")).get_title(loc="left") == "p(target)"
    small = made_up_traces(TOKENS, (1, 3), 3, p_clean=1e-30, p_corrupted=1e-33, states=[("hidden", 1)])
    small = small.with_columns(p_patched=pl.lit(1e-31))
    (mesh,) = next(axes for axes in plot.heatmap(small, "0").axes if axes.get_title()).collections
    assert mesh.get_clim() == (1e-33, 1e-30), "an ordinary scale for probabilities of a few tokens"
