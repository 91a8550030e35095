"""Regressions and tests of a few edits, with numbers worked out by hand.

Three facts, two layers (``made_up_study``). Effects are 0, 0.5, 1 at both layers; scores are 0, 0.1, 0.5 at layer 0
(mean 0.2) and 0.9, 0.6, 0.6 at layer 1 (mean 0.7), so that of squares around means there are

    total 0.575 = between layers 6 x 0.25^2 = 0.375 + within them 0.14 + 0.06 = 0.2
    effects, within a layer: 0.5; products with the scores: 0.25 at layer 0, -0.15 at layer 1
    explained by slopes: 0.25^2 / 0.5 = 0.125 and 0.15^2 / 0.5 = 0.045, by one slope (0.25 - 0.15)^2 / 1 = 0.01
"""

from math import log, pi, sqrt
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, SCORES
from helpers.simulated_edits import joined

from causalcone.analysis.stats import dependence
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.least_squares import f_test, fit
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.stats.uncertainty import bootstrap, permutation_test
from causalcone.analysis.tables.names import in_order
from causalcone.analysis.tables.traces import TableError


def table(effects=EFFECTS, scores=SCORES):
    rows = [(f, layer, x, scores[f][layer]) for f, values in effects.items() for layer, x in enumerate(values)]
    fact, layer, effect, score = zip(*rows, strict=True)
    frame = joined(range(len(fact)), list(layer), list(effect), rewrite=list(score))
    return frame.with_columns(fact_id=pl.Series(fact))


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_regressions_with_interaction():
    (row,) = regressions(table()).rows(named=True)
    assert (row["edits"], row["facts"], row["layers"], row["note"]) == (6, 3, 2, None)
    assert row["r2_layer"] == near(0.375 / 0.575)
    assert row["r2_trace"] == near(0.01 / 0.575)
    assert row["r2_both"] == near((0.375 + 0.17) / 0.575)
    assert row["diff"] == near(0.17 / 0.575)
    assert (row["f"], row["f_added"], row["f_left"]) == (near((0.17 / 2) / (0.03 / 2)), 2, 2)
    assert row["p"] == near(0.15)  # of F with 2 and 2 degrees of freedom: 1 / (1 + F) = 1 / (1 + 17 / 3)


def test_errors_are_over_the_number_of_edits():
    (row,) = regressions(table()).rows(named=True)
    for name, squares, absolute in (
        ("layer", 0.2, 0.2 + 0.1 + 0.3 + 0.2 + 0.1 + 0.1),
        ("trace", 0.565, 0.4 + 0.35 + 0.0 + 0.5 + 0.15 + 0.1),  # the line is 0.4 + 0.1 x
        ("both", 0.03, 0.05 + 0.1 + 0.05 + 0.05 + 0.1 + 0.05),  # slopes 0.5 and -0.3
    ):
        assert row[f"rmse_{name}"] == near(sqrt(squares / 6))
        assert row[f"mae_{name}"] == near(absolute / 6)


def test_regressions_without_interaction():
    (row,) = regressions(table(), interaction=False).rows(named=True)
    assert row["r2_both"] == near((0.375 + 0.01) / 0.575)
    assert (row["f"], row["f_added"], row["f_left"]) == (near(0.01 / (0.19 / 3)), 1, 3)
    assert row["p"] == pytest.approx(0.7177, abs=5e-5)  # t = sqrt(3 / 19) with 3 degrees of freedom


def test_least_squares_by_hand():
    score, effect = np.array([0.0, 1.0, 5.0, 9.0]), np.array([0.0, 1.0, 0.0, 1.0])
    layer = np.array([0, 0, 1, 1])
    of_layer, additive = (fit(score, effect, layer, model) for model in ("layer", "additive"))
    # layer means 0.5 and 7; slopes 1 and 4 within layers, one common slope 2.5
    assert of_layer.residuals.tolist() == [-0.5, 0.5, -2.0, 2.0]
    assert additive.residuals.tolist() == [0.75, -0.75, -0.75, 0.75]
    assert (of_layer.squares, of_layer.rank, of_layer.freedom) == (8.5, 2, 2)
    assert (additive.squares, additive.rank, additive.freedom) == (2.25, 3, 1)
    assert (of_layer.rmse, of_layer.mae) == (near(sqrt(8.5 / 4)), 1.25)
    assert of_layer.r2 == near(42.25 / 50.75)
    test = f_test(of_layer, additive)
    assert (test["f"], test["f_added"], test["f_left"]) == (near(6.25 / 2.25), 1, 1)
    assert "lack" not in test
    assert test["p"] == near(1 - 2 / pi * np.arctan(5 / 3))  # Cauchy's distribution at t = 2.5 / 1.5


@pytest.mark.parametrize(
    "scores",
    [dict.fromkeys("abc", (0.1, 0.7)), {"a": (0.1, 0.2), "b": (0.2, 0.45), "c": (0.3, 0.7)}],
    ids=["by the layer", "by layer and effect"],
)
def test_an_exact_fit_is_no_lack_of_edits(scores):
    (row,) = regressions(table(scores=scores)).rows(named=True)
    assert (row["p"], row["note"]) == (None, "there is no F-test: every score is explained exactly")


def test_why_there_is_no_f_test():
    (row,) = regressions(table(effects=dict.fromkeys("abc", (0.2, 0.2)))).rows(named=True)
    assert row["note"] == "the effect is the same for all edits; there is no F-test: nothing is added"
    (row,) = regressions(table(effects={"a": (0.0, 0.3), "b": (1.0, 0.7)})).rows(named=True)
    assert row["note"] == "there is no F-test: no degrees of freedom are left"


@pytest.mark.parametrize("correction", ["holm", "bh"])
def test_correlations(correction):
    """0.25 / sqrt(0.5 x 0.14), and -0.15 / sqrt(0.5 x 0.06) = -sqrt(3) / 2; of three edits p is 2 / pi x acos |rho|,
    0.2123 and 1/3. Holm: twice the smaller, and nothing below that; BH: the larger, and nothing above that."""
    found = layer_correlations(table(), correction=correction)
    smaller = 2 / pi * np.arccos(5 / (2 * sqrt(7)))
    assert found.select("layer", "edits").rows() == [(0, 3), (1, 3)]
    assert found["correlation"].to_list() == near([0.944911182523, -0.866025403784])
    assert found["p"].to_list() == near([smaller, 1 / 3])
    assert found["p_corrected"].to_list() == near([2 * smaller] * 2 if correction == "holm" else [1 / 3] * 2)


@pytest.mark.parametrize("what", ["rewrite", "effect"])
def test_rounding_is_no_variation(what):
    flat = table().with_columns(pl.lit(0.7).alias(what) + pl.Series([0.0, 1e-16, 2e-16, 0.0, 1e-16, 0.0]))
    name = "score" if what == "rewrite" else "effect"
    for row in layer_correlations(flat).rows(named=True):
        assert (row["correlation"], row["note"]) == (None, f"the {name} is the same for all edits")


def test_unknown_corrections_are_refused():
    with pytest.raises(TableError, match="correction is 'sidak'; choose from holm, bh"):
        layer_correlations(table(), correction="sidak")


# --- edits of a fact have something in common ---


def repeated(slopes):
    """Four facts, two layers: scores are the fact's -0.3, -0.1, 0.1, 0.3, less or more 0.1, -0.1, -0.1, 0.1 at the
    first and second layer; effects less or more the slopes."""
    own, apart = (-0.3, -0.1, 0.1, 0.3), (0.1, -0.1, -0.1, 0.1)
    fact = [0, 1, 2, 3] * 2
    side = [-1] * 4 + [1] * 4
    effect = [s * slopes[f] for f, s in zip(fact, side, strict=True)]
    score = [0.5 + own[f] + s * apart[f] for f, s in zip(fact, side, strict=True)]
    return joined(fact, [0] * 4 + [1] * 4, effect, rewrite=score)


def test_mixed_effects():
    """Within facts there are squares of 8 x 0.01 = 0.08, variance 0.08 / 4 = 0.02; between them 2 x 0.2 = 0.4, whose
    fourth is 0.02 + 2 x 0.04. Slopes 1, -1, 0, 0 explain 0.4^2 / 4 = 0.04, half of what is within: 4 ln 2."""
    (row,) = mixed_effects(repeated((1, -1, 0, 0)), interaction=False).rows(named=True)
    assert row["fact_share"] == pytest.approx(0.04 / 0.06, rel=1e-4)
    assert (row["chi2"], row["added"]) == (pytest.approx(4 * log(2), rel=1e-4), 1)
    assert row["p"] == pytest.approx(0.09589, abs=2e-5)


def test_cluster_robust_test():
    """Slopes 2, -1, -1, 0: products 0.8, squares 12, slope 1/15; each fact's residuals times its effects are -4/30,
    2/30, 2/30, 0, whose squares are 24/900; with 4/3 x 7/5 for few clusters F is 90/7, with 1 and 3 degrees."""
    (row,) = cluster_robust_tests(repeated((2, -1, -1, 0)), interaction=False).rows(named=True)
    assert (row["f"], row["f_added"], row["f_left"]) == (near(90 / 7), 1, 3)
    assert row["p"] == pytest.approx(0.03714, abs=2e-5)


SATURATED = [1.0, 1.0, 0.0, 0.0]
"""Scores by layer, the same for all facts."""


def saturated(facts=60, edits_of_a_fact=4):
    rng = np.random.default_rng(1)
    fact = np.repeat(np.arange(facts), edits_of_a_fact)
    layer = np.tile(np.arange(4), facts)[: len(fact)]
    noise = 1e-16 * rng.standard_normal(len(fact))
    return joined(fact, layer, rng.random(len(fact)), rewrite=np.array(SATURATED)[layer] + noise)


@pytest.mark.parametrize("function", [regressions, cluster_robust_tests, mixed_effects, permutation_test])
def test_scores_that_the_layer_explains_are_not_tested(function):
    (row,) = function(saturated()).rows(named=True)
    assert row["p"] is None
    assert "every score is explained exactly" in row["note"]


def test_layers_of_few_facts_are_not_tested():
    rng = np.random.default_rng(0)
    fact, layer = (each.ravel() for each in np.meshgrid(np.arange(60), np.arange(5), indexing="ij"))
    kept = (layer < 4) | (fact < 10)
    frame = joined(fact[kept], layer[kept], rng.random(kept.sum()), rewrite=rng.random(kept.sum()))
    (row,) = cluster_robust_tests(frame).rows(named=True)
    assert (row["p"], row["note"]) == (None, "only 10 facts at a layer; 20 are needed")
    assert cluster_robust_tests(frame, interaction=False)["p"][0] is not None
    assert cluster_robust_tests(frame.filter(pl.col("layer") < 4))["p"][0] is not None


def test_one_edit_of_each_fact_tells_nothing_of_facts():
    rng = np.random.default_rng(0)
    frame = joined(range(40), [0, 1] * 20, rng.random(40), rewrite=rng.random(40))
    (row,) = mixed_effects(frame).rows(named=True)
    assert (row["p"], row["fact_share"]) == (None, None)
    assert row["note"] == "a random intercept per fact needs several facts with several edits"


@pytest.mark.parametrize(
    ("changes", "p", "note"),
    [
        ({"llf": float("nan")}, False, "the model cannot be fitted: its likelihood is not a number"),
        ({"converged": False}, True, "the fit did not converge"),
    ],
)
def test_fits_that_went_wrong_are_told(monkeypatch, changes, p, note):
    class Broken(dependence.sm.MixedLM):
        def fit(self, **options):
            found = super().fit(**options)
            names = ("llf", "cov_re", "scale", "converged")
            return SimpleNamespace(**{name: getattr(found, name) for name in names} | changes)

    monkeypatch.setattr(dependence.sm, "MixedLM", Broken)
    (row,) = mixed_effects(repeated((1, -1, 0, 0)), interaction=False).rows(named=True)
    assert (row["p"] is not None, row["note"]) == (p, note)


# --- facts drawn again, or exchanged ---


def test_permutations_of_three_facts():
    """At layer 0 alone, exchanged effects explain 0.125, 0.08 or 0.005 of 0.14, each for a third of all orders."""
    (row,) = permutation_test(table().filter(layer=0), draws=30_000).rows(named=True)
    assert (row["facts"], row["diff"], row["note"]) == (3, near(0.125 / 0.14), None)
    assert row["chance"] == pytest.approx(0.5, abs=0.01)  # 0.07 / 0.14
    assert row["p"] == pytest.approx(1 / 3, abs=0.01)


def test_a_bootstrap_of_two_facts():
    """Scores 0 and 1, and 0.5 twice. Two draws of the first fact are explained by the layer; of both facts a half is
    (0.25 of 0.5); of the second fact alone there is nothing to explain. So a half in two cases of three, else 1."""
    frame = joined([0, 0, 1, 1], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.5], rewrite=[0.0, 1.0, 0.5, 0.5])
    (row,) = bootstrap(frame, draws=2000, level=0.5).rows(named=True)
    assert (row["r2_layer_low"], row["r2_layer_high"]) == (near(0.5), near(1))


def test_a_remnant_of_the_facts_is_not_tested():
    rng = np.random.default_rng(0)
    fact, layer = (each.ravel() for each in np.meshgrid(np.arange(100), np.arange(8), indexing="ij"))
    few, half = (
        permutation_test(joined(fact[kept], layer[kept], rng.random(kept.sum()), rewrite=rng.random(kept.sum())))
        for kept in ((layer < 7) | (fact < 3), (layer < 7) | (fact < 50))
    )
    assert few.select("facts", "p", "note").row(0) == (3, None, "facts with edits and effects at all layers: 3 of 100")
    assert half["facts"][0] == 50
    assert half["p"][0] is not None


def test_problems_and_methods_are_in_the_papers_order():
    rows = [
        ("fact_forcing", "rome", 1), ("error_injection", "finetune", 5), ("a new problem", "rome", 1),
        ("error_injection", "own method", 1), ("error_injection", "finetune", 1), ("error_injection", "memit_joint", 5),
        ("tracing_reversal", "memit", 5), ("error_injection", "memit", 5), ("error_injection", "rome", 1),
    ]  # fmt: skip
    frame = pl.DataFrame(rows, schema=["problem", "method", "window"], orient="row")
    assert in_order(frame).rows() == [
        ("error_injection", "rome", 1), ("error_injection", "memit", 5), ("error_injection", "memit_joint", 5),
        ("error_injection", "finetune", 1), ("error_injection", "finetune", 5), ("error_injection", "own method", 1),
        ("tracing_reversal", "memit", 5), ("fact_forcing", "rome", 1), ("a new problem", "rome", 1),
    ]  # fmt: skip
