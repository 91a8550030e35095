"""Bootstrap, permutation and left-out layers, against doing it slowly."""

import numpy as np
import polars as pl
import pytest
from helpers.simulated_edits import as_in_r, joined

from causalcone.analysis.stats.dependence import cluster_robust_tests, mixed_effects
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.stats.uncertainty import bootstrap, left_out_layers, permutation_test

DRAWS = 25


def drawn_again(table, seed):
    """Samples of facts, each with all of its edits, as often as it is drawn."""
    rng = np.random.default_rng(seed)
    facts = table["fact_id"].unique().sort()
    for counts in rng.multinomial(len(facts), np.full(len(facts), 1 / len(facts)), size=DRAWS):
        parts = [
            table.filter(pl.col("fact_id") == fact).with_columns(fact_id=pl.lit(f"{fact}-{copy}"))
            for fact, count in zip(facts, counts, strict=True)
            for copy in range(count)
        ]
        yield pl.concat(parts)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("interaction", [True, False])
def test_the_bootstrap_is_that_of_facts(flat, interaction):
    table = as_in_r(facts=15, layers=4, flat=flat)
    found = [regressions(each, interaction=interaction).row(0, named=True) for each in drawn_again(table, 3)]
    (row,) = bootstrap(table, interaction=interaction, draws=DRAWS, seed=3, level=0.8).rows(named=True)
    for name in ("r2_layer", "r2_trace", "r2_both", "diff"):
        low, high = np.quantile([each[name] for each in found], [0.1, 0.9])
        assert (row[f"{name}_low"], row[f"{name}_high"]) == (
            pytest.approx(low, abs=1e-9),
            pytest.approx(high, abs=1e-9),
        )


@pytest.mark.parametrize("interaction", [True, False])
def test_the_permutation_test_exchanges_the_effects_of_facts(interaction):
    table = as_in_r(facts=15, layers=4)
    whole = table.filter(pl.len().over("fact_id") == 4)
    facts = whole["fact_id"].unique().sort()
    rng, added = np.random.default_rng(5), []
    for _ in range(DRAWS):
        order = rng.permutation(len(facts))
        theirs = pl.DataFrame({"fact_id": facts, "theirs": facts.gather(order)})
        effects = whole.select(theirs="fact_id", layer="layer", effect="effect")
        exchanged = whole.drop("effect").join(theirs, on="fact_id").join(effects, on=["theirs", "layer"])
        added.append(regressions(exchanged, interaction=interaction)["diff"][0])
    (row,) = permutation_test(table, interaction=interaction, draws=DRAWS, seed=5).rows(named=True)
    own = regressions(whole, interaction=interaction)["diff"][0]
    assert row["facts"] == len(facts)
    assert row["diff"] == pytest.approx(own, rel=1e-9)
    assert row["chance"] == pytest.approx(np.mean(added), rel=1e-9)
    assert row["p"] == pytest.approx((1 + np.sum(np.array(added) >= own)) / (1 + DRAWS))


def made(slope, facts=60, layers=4):
    fact, layer = (each.ravel() for each in np.meshgrid(np.arange(facts), np.arange(layers), indexing="ij"))
    effect, noise = np.random.default_rng(0).random((2, len(fact)))
    return joined(fact, layer, effect, rewrite=0.1 * layer + slope * effect + 0.3 * noise)


def test_effects_that_matter_are_told_from_those_that_do_not():
    (matters,), (does_not,) = (permutation_test(made(slope), draws=400).rows(named=True) for slope in (0.2, 0.0))
    assert matters["p"] < 0.005
    assert matters["diff"] > 3 * matters["chance"]
    assert does_not["p"] > 0.05
    assert does_not["diff"] == pytest.approx(does_not["chance"], abs=0.03)
    for test in (cluster_robust_tests, mixed_effects):
        assert test(made(0.2))["p"][0] < 0.001
        assert test(made(0.0))["p"][0] > 0.05


def test_the_same_seed_gives_the_same():
    table = made(0.1, facts=10)
    assert bootstrap(table, draws=100, seed=1).equals(bootstrap(table, draws=100, seed=1))
    assert not bootstrap(table, draws=100, seed=1).equals(bootstrap(table, draws=100, seed=2))


def test_left_out_layers_by_hand():
    """Layer 0: scores 0, 1; layer 1: 2, 4; effects such that the line through layer 1 is 2 + 2 x."""
    table = joined([0, 1, 0, 1], [0, 0, 1, 1], [0.5, 0.0, 0.0, 1.0], rewrite=[0.0, 1.0, 2.0, 4.0])
    first, second, both = left_out_layers(table).rows(named=True)
    assert (first["layer"], first["edits"]) == (0, 2)
    assert first["rmse_mean"] == pytest.approx(np.sqrt((3**2 + 2**2) / 2))
    assert first["rmse_trace"] == pytest.approx(np.sqrt((3**2 + 1**2) / 2))  # it says 3 and 2
    assert second["rmse_mean"] == pytest.approx(np.sqrt((1.5**2 + 3.5**2) / 2))
    assert second["rmse_trace"] == pytest.approx(np.sqrt((1**2 + 5**2) / 2))  # the line is 1 - 2 x
    assert (both["layer"], both["edits"]) == (None, 4)
    assert both["rmse_mean"] == pytest.approx(np.sqrt((9 + 4 + 2.25 + 12.25) / 4))


@pytest.mark.parametrize(
    "function", [bootstrap, permutation_test, left_out_layers, cluster_robust_tests, mixed_effects]
)
def test_a_constant_score_and_a_single_fact_have_no_uncertainty(function):
    numbers = ("diff_low", "diff", "rmse_mean", "p", "chi2")
    constant = joined([0, 0, 1, 1], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.5], rewrite=[0.5] * 4)
    for row in function(constant).rows(named=True):
        assert all(row.get(name) is None for name in numbers)
    lone = joined([0, 0, 0], [0, 1, 2], [0.1, 0.2, 0.3], rewrite=[0.5, 0.2, 0.1])
    if function in (permutation_test, cluster_robust_tests, mixed_effects):
        for row in function(lone).rows(named=True):
            assert row["p"] is None
