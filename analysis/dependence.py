"""The test of Hase et al. 2023 where a fact's edits at several layers are not taken for independent ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import statsmodels.api as sm
from scipy.stats import chi2
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from causalcone.analysis.least_squares import CONSTANT, centred
from causalcone.analysis.regressions import Sample, samples

LEAST_FACTS = 2
"""So many for each coefficient that is tested; a covariance of fewer clusters is far too small."""

_KEY = {"problem": pl.String, "method": pl.String, "window": pl.Int64, "score": pl.String}


def cluster_robust_tests(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, interaction: bool = True
) -> pl.DataFrame:
    """Wald's F-test that the effect has no coefficient besides the layer, with a covariance that is robust to what a
    fact's edits have in common (clusters are facts; statsmodels' small-sample correction).

    One row per problem, method, window and score: f, f_added, f_left (clusters less one), p, note. With fewer than
    about 40 facts such tests reject too often.
    """
    rows = []
    for sample in samples(table, scores):
        row: dict[str, Any] = {**sample.key, "score": sample.name}
        layer, effect = _design(sample, interaction)
        lack = sample.lack or ("the effect does not vary within layers" if effect.shape[1] == 0 else None)
        if lack is None and len(sample.facts) < LEAST_FACTS * effect.shape[1]:
            lack = f"{len(sample.facts)} facts are too few to test {effect.shape[1]} coefficients"
        if lack is None and len(sample) <= layer.shape[1] + effect.shape[1]:
            lack = "no degrees of freedom are left"
        if lack is not None:
            rows.append({**row, "note": lack})
            continue
        both = np.hstack([layer, effect])
        fitted = sm.OLS(sample.score, both).fit(cov_type="cluster", cov_kwds={"groups": sample.fact}, use_t=True)
        added = effect.shape[1]
        chosen = np.eye(both.shape[1])[layer.shape[1] :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a covariance of low rank, as of layers without edits of some facts
            test = fitted.f_test(chosen)
        rows.append(
            {**row, "f": float(test.fvalue), "f_added": added, "f_left": int(test.df_denom), "p": float(test.pvalue)}
        )
    schema = {**_KEY, "f": pl.Float64, "f_added": pl.Int64, "f_left": pl.Int64, "p": pl.Float64, "note": pl.String}
    return pl.DataFrame(rows, schema=schema)


def mixed_effects(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, interaction: bool = True
) -> pl.DataFrame:
    """The likelihood-ratio test of both against the layer alone where every fact has a random intercept (statsmodels'
    MixedLM, maximum likelihood).

    One row per problem, method, window and score: ``chi2``, ``added``, ``p``, and ``fact_share``, the share of the
    layer model's residual variance that lies between facts; note.
    """
    rows = []
    for sample in samples(table, scores):
        row: dict[str, Any] = {**sample.key, "score": sample.name}
        layer, effect = _design(sample, interaction)
        lack = sample.lack or ("the effect does not vary within layers" if effect.shape[1] == 0 else None)
        if lack is None and (len(sample.facts) < 2 or len(sample.layers) < 2):
            lack = "a random intercept per fact needs several facts with several edits"
        if lack is not None:
            rows.append({**row, "note": lack})
            continue
        try:
            small, large = (_likelihood(sample, each) for each in (layer, np.hstack([layer, effect])))
        except np.linalg.LinAlgError as error:
            rows.append({**row, "note": f"the model cannot be fitted: {error}"})
            continue
        statistic, added = max(0.0, 2 * (large[0] - small[0])), effect.shape[1]
        rows.append(
            {**row, "chi2": statistic, "added": added, "p": float(chi2.sf(statistic, added)), "fact_share": small[1]}
        )
    schema = {
        **_KEY,
        "chi2": pl.Float64,
        "added": pl.Int64,
        "p": pl.Float64,
        "fact_share": pl.Float64,
        "note": pl.String,
    }
    return pl.DataFrame(rows, schema=schema)


def _design(sample: Sample, interaction: bool) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the layers, and of the effect around its layer's mean, in one column or in one for each layer; those
    that do not vary are left out."""
    layers = len(sample.layers)
    layer = (sample.layer[:, None] == np.arange(layers)).astype(np.float64)
    around = centred(sample.effect, sample.layer, layers) if len(sample) else sample.effect
    effect = layer * around[:, None] if interaction else around[:, None]
    sizes = np.sum((layer if interaction else np.ones((len(sample), 1))) * sample.effect[:, None] ** 2, axis=0)
    return layer, effect[:, np.sum(effect**2, axis=0) > CONSTANT * sizes]


def _likelihood(sample: Sample, design: np.ndarray) -> tuple[float, float]:
    """The log-likelihood of a model with a random intercept per fact, and the share of the variance between facts."""
    with warnings.catch_warnings():
        for about_equal_facts in (ConvergenceWarning, SingularMatrixWarning):
            warnings.simplefilter("ignore", about_equal_facts)
        fitted = sm.MixedLM(sample.score, design, groups=sample.fact).fit(reml=False)
    between = float(np.asarray(fitted.cov_re)[0, 0])
    return float(fitted.llf), between / (between + float(fitted.scale))
