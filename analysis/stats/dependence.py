"""The test of Hase et al. 2023 where a fact's edits at several layers are not taken for independent ones."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import statsmodels.api as sm
from scipy.stats import chi2
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from causalcone.analysis.stats.least_squares import CONSTANT, EXPLAINED, centred
from causalcone.analysis.stats.regressions import F_SCHEMA, RegressionData, by_sample, fits
from causalcone.analysis.tables.names import counted

LEAST_FACTS = 2
"""For each coefficient that is tested; a covariance of fewer clusters is far too small."""

LEAST_AT_A_LAYER = 20
"""Facts at every layer that has a slope of its own. Where there is no effect, slopes of ten facts seem
significant at 5 % in 18 to 31 % of simulated studies, slopes of twenty in 5 to 10 %."""


def cluster_robust_tests(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, interaction: bool = True
) -> pl.DataFrame:
    """Wald's F-test that the effect has no coefficient besides the layer, with a covariance that is robust to what a
    fact's edits have in common (clusters are facts; statsmodels' small-sample correction): f, f_added, f_left (clusters
    less one), p. Null, with the reason in ``note``, where facts are too few or nothing is left to explain. With fewer
    than about 40 facts such tests reject too often."""

    def tested(sample: RegressionData) -> dict[str, Any]:
        layer, effect = _design(sample, interaction)
        if lack := _lack(sample, effect, interaction) or _few(sample, layer, effect, interaction):
            return {"note": lack}
        both = np.hstack([layer, effect])
        fitted = sm.OLS(sample.score, both).fit(cov_type="cluster", cov_kwds={"groups": sample.fact}, use_t=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a covariance of low rank, as of layers without edits of some facts
            test = fitted.f_test(np.eye(both.shape[1])[layer.shape[1] :])
        freedom = {"f_added": effect.shape[1], "f_left": int(test.df_denom)}
        return {"f": float(test.fvalue), **freedom, "p": float(test.pvalue)}

    return by_sample(table, scores, F_SCHEMA | {"note": pl.String}, tested)


def mixed_effects(
    table: pl.DataFrame, scores: Sequence[str] = ("rewrite",), *, interaction: bool = True
) -> pl.DataFrame:
    """The likelihood-ratio test of both against the layer alone where every fact has a random intercept (statsmodels'
    MixedLM, maximum likelihood): chi2, added, p, and fact_share, the share of the layer model's residual variance that
    lies between facts; ``note`` says why there is no such test, or that a fit did not converge."""

    def tested(sample: RegressionData) -> dict[str, Any]:
        layer, effect = _design(sample, interaction)
        if lack := _lack(sample, effect, interaction):
            return {"note": lack}
        if len(sample.layers) < 2 or not 2 <= len(sample.facts) < len(sample):
            return {"note": "a random intercept per fact needs several facts with several edits"}
        try:
            small, share, converged = _mixed(sample, layer)
            large, _, larger_converged = _mixed(sample, np.hstack([layer, effect]))
        except np.linalg.LinAlgError as error:
            return {"note": f"the model cannot be fitted: {error}"}
        if not np.isfinite([small, large, share]).all():
            return {"note": "the model cannot be fitted: its likelihood is not a number"}
        statistic, added = max(0.0, 2 * (large - small)), effect.shape[1]
        doubt = None if converged and larger_converged else "the fit did not converge"
        p = float(chi2.sf(statistic, added))
        return {"chi2": statistic, "added": added, "p": p, "fact_share": share, "note": doubt}

    columns = {"chi2": pl.Float64, "added": pl.Int64, "p": pl.Float64, "fact_share": pl.Float64, "note": pl.String}
    return by_sample(table, scores, columns, tested)


def _lack(sample: RegressionData, effect: np.ndarray, interaction: bool) -> str | None:
    """Why nothing can be tested, where that is so."""
    if sample.lack is not None:
        return sample.lack
    if effect.shape[1] == 0:
        return "the effect does not vary within layers"
    return EXPLAINED if fits(sample, interaction)["both"].exact else None


def _few(sample: RegressionData, layer: np.ndarray, effect: np.ndarray, interaction: bool) -> str | None:
    """Why clusters are too few for a covariance, where they are. A fact has one edit at a layer."""
    added = effect.shape[1]
    if len(sample.facts) < LEAST_FACTS * added:
        return f"only {counted(len(sample.facts), 'fact')} to test {counted(added, 'coefficient')}"
    of_layer = layer.T @ np.abs(effect) > 0  # (layers, slopes)
    fewest = int((layer.sum(axis=0) @ of_layer).min())
    if interaction and fewest < LEAST_AT_A_LAYER:
        return f"only {counted(fewest, 'fact')} at a layer; {LEAST_AT_A_LAYER} are needed"
    return "no degrees of freedom are left" if len(sample) <= layer.shape[1] + added else None


def _design(sample: RegressionData, interaction: bool) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the layers, and of the effect around its layer's mean, in one column or in one for each layer; those
    that do not vary are left out."""
    layers = len(sample.layers)
    layer = (sample.layer[:, None] == np.arange(layers)).astype(np.float64)
    around = centred(sample.effect, sample.layer, layers) if len(sample) else sample.effect
    effect = layer * around[:, None] if interaction else around[:, None]
    sizes = np.sum((layer if interaction else np.ones((len(sample), 1))) * sample.effect[:, None] ** 2, axis=0)
    return layer, effect[:, np.sum(effect**2, axis=0) > CONSTANT * sizes]


def _mixed(sample: RegressionData, design: np.ndarray) -> tuple[float, float, bool]:
    """Log-likelihood of a model with a random intercept per fact, the share of the variance that lies between facts,
    and whether the fit converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", SingularMatrixWarning)  # facts are about equal
        fitted = sm.MixedLM(sample.score, design, groups=sample.fact).fit(reml=False)
    between = float(np.asarray(fitted.cov_re)[0, 0])
    return float(fitted.llf), between / (between + float(fitted.scale)), bool(fitted.converged)
