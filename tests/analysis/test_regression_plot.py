"""Bars of R^2 and scatter plots show the numbers that were worked out by hand."""

import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, SCORES
from helpers.simulated_edits import joined

from causalcone.analysis.plot.regressions import r2_bars, scatter_by_layer
from causalcone.analysis.stats.regressions import regressions


def table(**changes):
    rows = [(f, k, x, SCORES[f][k]) for f, values in EFFECTS.items() for k, x in enumerate(values)]
    fact, layer, effect, score = zip(*rows, strict=True)
    return joined(["abc".index(f) for f in fact], layer, effect, rewrite=score).with_columns(**changes)


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_are_as_high_as_r2():
    """0.375 and 0.545 of 0.575 (``test_regressions_by_hand``)."""
    (axes,) = r2_bars(regressions(table())).axes
    assert [bar.get_height() for bar in axes.patches] == near([0.375 / 0.575, 0.545 / 0.575])
    assert labels(axes) == ["+0.296"]
    assert axes.get_title() == "Error injection"


@pytest.mark.parametrize(("diff", "label"), [(-1e-17, "+0.000"), (0.0004, "+0.000"), (0.0126, "+0.013")])
def test_nothing_added_has_one_sign(diff, label):
    (axes,) = r2_bars(regressions(table()).with_columns(diff=pl.lit(diff))).axes
    assert labels(axes) == [label]


def test_points_are_the_edits():
    figure = scatter_by_layer(table(), "error_injection", "rome", 1)
    low, high = figure.axes[:2]
    assert low.collections[0].get_offsets().tolist() == [[0.0, 0.0], [0.5, 0.1], [1.0, 0.5]]
    assert high.collections[0].get_offsets().tolist() == [[0.0, 0.9], [0.5, 0.6], [1.0, 0.6]]
    assert (low.get_title(), high.get_title()) == (
        "layer 0, n = 3: $\\rho$ = 0.94",
        "layer 1, n = 3: $\\rho$ = -0.87",
    )
    assert low.get_xlim() == (-0.04, 1.04)


def test_effects_above_one_are_in_the_picture():
    figure = scatter_by_layer(table(effect=pl.col("effect") * 2.5 - 0.5), "error_injection", "rome", 1)
    assert figure.axes[0].get_xlim() == (-0.5, 2.0)
