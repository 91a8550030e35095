"""Regressions of scores on layers and effects, against R's and against closed forms."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import statsmodels.formula.api as smf
from helpers.simulated_edits import as_in_r, joined
from hypothesis import given, settings, strategies as st

from causalcone.analysis import TableError
from causalcone.analysis.scores import SCORES, edits_with_effects
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.regressions import regressions

R = json.loads((Path(__file__).parent / "r" / "regressions.json").read_text())
CASES = {"varied": False, "flat layer": True}
NEAR = {"rel": 1e-10, "abs": 1e-12}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("interaction", "place"), [(True, 2), (False, 3)])
def test_regressions_are_those_of_r(case, interaction, place):
    expected = R[case]
    (row,) = regressions(as_in_r(flat=CASES[case]), interaction=interaction).rows(named=True)
    for number, name in ((0, "layer"), (1, "trace"), (place, "both")):
        for what in ("r2", "rmse", "mae"):
            assert row[f"{what}_{name}"] == pytest.approx(expected[what][number], **NEAR), (what, name)
    f, added, left, p = expected["f_interaction" if interaction else "f_additive"]
    assert (row["f"], row["p"]) == (pytest.approx(f, rel=1e-10), pytest.approx(p, rel=1e-10))
    assert (row["f_added"], row["f_left"]) == (added, left)
    assert row["diff"] == pytest.approx(expected["r2"][place] - expected["r2"][0], rel=1e-8)
    assert (row["edits"], row["facts"], row["layers"], row["note"]) == (194, 40, 5, None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("correction", "key"), [("holm", "holm"), ("bh", "bh")])
def test_correlations_are_those_of_r(case, correction, key):
    found = layer_correlations(as_in_r(flat=CASES[case]), correction=correction)
    known = found.drop_nulls("correlation")
    assert known["correlation"].to_list() == pytest.approx(R[case]["correlation"], **NEAR)
    assert known["p"].to_list() == pytest.approx(R[case]["p"], rel=1e-10)
    assert known["p_corrected"].to_list() == pytest.approx(R[case][key], rel=1e-10)
    flat = found.filter(pl.col("correlation").is_null())
    assert flat["note"].to_list() == ["the effect is the same for all edits"] * CASES[case]


def test_mixed_effects_are_those_of_r():
    (row,) = mixed_effects(as_in_r()).rows(named=True)
    statistic, share = R["varied"]["mixed"]
    assert (row["chi2"], row["added"]) == (pytest.approx(statistic, rel=1e-5), 5)
    assert row["fact_share"] == pytest.approx(share, rel=1e-3)


def test_cluster_robust_tests_are_those_of_statsmodels_formulas():
    table = as_in_r()
    frame = table.to_pandas()
    groups = frame["fact_id"].astype("category").cat.codes
    fitted = smf.ols("rewrite ~ C(layer) * effect", frame).fit(
        cov_type="cluster", cov_kwds={"groups": groups}, use_t=True
    )
    named = [name for name in fitted.params.index if "effect" in name]
    expected = fitted.f_test(", ".join(f"{name} = 0" for name in named))
    (row,) = cluster_robust_tests(table).rows(named=True)
    assert (row["f"], row["p"]) == (pytest.approx(expected.fvalue, rel=1e-8), pytest.approx(expected.pvalue, rel=1e-8))
    assert (row["f_added"], row["f_left"]) == (5, 39)


# --- simulated, with a known answer ---


def simulated(facts, layers, layer_sd, effect_slope, noise_sd, seed=0):
    rng = np.random.default_rng(seed)
    fact, layer = (each.ravel() for each in np.meshgrid(np.arange(facts), np.arange(layers), indexing="ij"))
    effect = rng.standard_normal(len(fact))
    spread = np.linspace(-1, 1, layers)
    means = layer_sd * spread / np.std(spread) if layers > 1 else np.zeros(1)
    score = means[layer] + effect_slope * effect + noise_sd * rng.standard_normal(len(fact))
    return joined(fact, layer, effect, rewrite=score)


@pytest.mark.parametrize(("layer_sd", "slope", "noise"), [(1.0, 0.5, 0.5), (2.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_r2_is_the_share_that_was_put_in(layer_sd, slope, noise):
    (row,) = regressions(simulated(4000, 8, layer_sd, slope, noise)).rows(named=True)
    total = layer_sd**2 + slope**2 + noise**2
    assert row["r2_layer"] == pytest.approx(layer_sd**2 / total, abs=0.02)
    assert row["r2_trace"] == pytest.approx(slope**2 / total, abs=0.02)
    assert row["diff"] == pytest.approx(slope**2 / total, abs=0.02)
    assert (row["p"] < 1e-6) == (slope > 0)


def test_without_noise_everything_is_explained():
    (row,) = regressions(simulated(50, 4, 1.0, 0.5, 0.0)).rows(named=True)
    assert row["r2_both"] == pytest.approx(1.0, abs=1e-12)
    assert row["rmse_both"] < 1e-12


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_predictors_never_explain_less(facts, layers, seed, interaction):
    table = simulated(facts, layers, 0.5, 0.3, 1.0, seed)
    (row,) = regressions(table, interaction=interaction).rows(named=True)
    assert row["diff"] >= -1e-12
    assert row["r2_both"] >= max(row["r2_layer"], row["r2_trace"]) - 1e-12
    assert -1e-12 <= row["r2_layer"] <= 1 + 1e-12
    (moved,) = regressions(
        table.with_columns(pl.col("rewrite") * 3 + 100, pl.col("effect") * -2 + 1e3), interaction=interaction
    ).rows(named=True)
    for name in ("r2_layer", "r2_trace", "r2_both"):
        assert moved[name] == pytest.approx(row[name], abs=1e-8)


# --- what is missing ---


def test_a_constant_score_has_no_r2_and_says_so():
    (row,) = regressions(joined([0, 0, 1, 1], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.5], rewrite=[0.5] * 4)).rows(named=True)
    assert (row["r2_layer"], row["p"], row["note"]) == (None, None, "the score is the same for all edits")


def test_a_score_that_no_edit_has():
    (row,) = regressions(joined([0, 1], [0, 0], [0.1, 0.2], rewrite=[0.5, 0.6]), ["essence"]).rows(named=True)
    assert (row["edits"], row["r2_layer"], row["note"]) == (0, None, "no edit has this score")


def test_one_layer_explains_nothing():
    table = joined(range(6), [3] * 6, np.linspace(0, 1, 6), rewrite=[0.1, 0.3, 0.2, 0.5, 0.4, 0.9])
    (row,) = regressions(table).rows(named=True)
    assert (row["r2_layer"], row["note"]) == (pytest.approx(0, abs=1e-12), "all edits are at layer 3")
    assert row["diff"] == pytest.approx(row["r2_trace"])


def test_effects_that_do_not_vary_add_nothing():
    (row,) = regressions(joined([0, 0, 1, 1], [0, 1, 0, 1], [0.3] * 4, rewrite=[0.1, 0.5, 0.2, 0.9])).rows(named=True)
    assert (row["diff"], row["r2_trace"], row["p"]) == (pytest.approx(0), pytest.approx(0), None)
    assert "the effect is the same for all edits" in row["note"]


def test_too_few_edits_for_a_test():
    (row,) = regressions(joined([0, 0, 1, 1], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.5], rewrite=[0.1, 0.5, 0.2, 0.9])).rows(
        named=True
    )
    assert row["p"] is None
    assert "no degrees of freedom" in row["note"]


def test_unknown_scores_are_refused():
    with pytest.raises(TableError, match=f"no scores wrong; choose from {SCORES[0]}"):
        regressions(as_in_r(), ["wrong"])


# --- the join ---


def edits():
    scores = as_in_r(facts=4, layers=3).drop("effect")
    return scores.with_columns(pl.lit(None, pl.Float64).alias(name) for name in SCORES if name not in scores.columns)


def effects(**changes):
    frame = pl.DataFrame({"fact_id": ["f000", "f000", "f001"], "layer": [0, 1, 2], "effect": [0.1, None, 0.3]})
    return frame.with_columns(**changes)


def test_edits_get_the_effect_of_their_fact_and_layer():
    found = edits_with_effects(edits(), effects())
    assert found.select("fact_id", "layer", "effect").rows() == [("f000", 0, 0.1), ("f001", 2, 0.3)]


def test_several_effects_at_a_layer_are_refused():
    with pytest.raises(TableError, match="fact 'f000' has several effects at layer 0"):
        edits_with_effects(edits(), pl.concat([effects(), effects()]))


def test_edits_and_effects_that_do_not_meet():
    with pytest.raises(TableError, match="edits are at 0, 1, 2, effects at 17"):
        edits_with_effects(edits(), effects(layer=pl.lit(17)))
