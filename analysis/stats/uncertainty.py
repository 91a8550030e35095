"""Uncertainty of R^2 and of what tracing adds to it: facts are drawn again, or their effects exchanged."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from causalcone.analysis.stats.least_squares import CONSTANT, EXACT, EXPLAINED, Floats, around_mean, same
from causalcone.analysis.stats.regressions import KEY_SCHEMA, PREDICTORS, RegressionData, by_sample, samples

LEAST_EXCHANGED = 4
"""Facts: fewer can be exchanged in less than twenty ways, so that no share of them is below 5 %."""

_STATISTICS = (*(f"r2_{name}" for name in PREDICTORS), "diff")
_AT_ONCE = 200
_MOST_NUMBERS = 2**22


def bootstrap(
    table: pl.DataFrame,
    scores: Sequence[str] = ("rewrite",),
    *,
    interaction: bool = True,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pl.DataFrame:
    """Intervals of ``regressions``' coefficients of determination by the bootstrap over facts: facts are drawn with
    replacement, each with all of its edits, and the percentiles of ``draws`` such samples are given, as columns _low,
    _high; null where there is nothing to explain, or one fact alone. Both ends of diff's interval are positive by
    construction: adding a predictor never explains less (see ``permutation_test`` for what chance alone adds)."""
    ends = {"low": (1 - level) / 2, "high": (1 + level) / 2}

    def intervals(sample: RegressionData) -> dict[str, float]:
        if sample.lack is not None or len(sample.facts) < 2:
            return {}
        drawn = _resampled(sample, interaction, draws, np.random.default_rng(seed))
        quantiles = {name: np.nanquantile(values, [*ends.values()]).tolist() for name, values in drawn.items()}
        return {f"{name}_{end}": quantiles[name][number] for name in drawn for number, end in enumerate(ends)}

    columns = [f"{name}_{end}" for name in _STATISTICS for end in ends]
    return by_sample(table, scores, dict.fromkeys(columns, pl.Float64), intervals)


def permutation_test(
    table: pl.DataFrame,
    scores: Sequence[str] = ("rewrite",),
    *,
    interaction: bool = True,
    draws: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Tests whether tracing adds nothing to the layer: the facts' effects, each fact's over all layers together, are
    exchanged between facts, which keeps what the layer explains and breaks what a fact's own effects do.

    A row has ``diff``, its mean over ``draws`` exchanges (``chance``), and ``p``, the share of exchanges, the sample
    counted as one, that add at least as much. Only facts with edits and effects at all layers take part (``facts``);
    ``diff`` is that of their edits. Null, with the reason in ``note``, where these are fewer than two or less than half
    of all facts, or there is nothing to explain."""

    def tested(sample: RegressionData) -> dict[str, Any]:
        score, effect = _squares(sample)
        if lack := _no_exchange(sample, score):
            return {"facts": len(score), "note": lack}
        diff, others = _exchanged(score, effect, interaction, draws, np.random.default_rng(seed))
        p = (1 + np.count_nonzero(others >= diff * (1 - 1e-12))) / (1 + draws)
        return {"facts": len(score), "diff": diff, "chance": float(others.mean()), "p": p}

    columns = {**dict.fromkeys(("diff", "chance", "p"), pl.Float64), "facts": pl.Int64, "note": pl.String}
    return by_sample(table, scores, columns, tested)


def _no_exchange(sample: RegressionData, score: Floats) -> str | None:
    """Why effects cannot be exchanged between the facts of these scores (facts, layers), where that is so."""
    if sample.lack is not None:
        return sample.lack
    if len(score) < max(2, len(sample.facts) / 2):
        return f"facts with edits and effects at all layers: {len(score)} of {len(sample.facts)}"
    if same(score.ravel()):
        return "the score is the same for all edits"
    around = score - score.mean(axis=0)
    return EXPLAINED if float(np.sum(around**2)) <= EXACT * around_mean(score) else None


def left_out_layers(table: pl.DataFrame, scores: Sequence[str] = ("rewrite",)) -> pl.DataFrame:
    """Prediction of the scores at a layer from the edits at all others: by their mean, and by the regression on the
    effect. A row per layer left out, and a last one of all layers together, whose layer is null; errors are null where
    all edits are at one layer."""
    rows = []
    for sample in samples(table, scores):
        key = sample.key
        if sample.lack is not None or len(sample.layers) < 2:
            rows.append({**key, "edits": len(sample)})
            continue
        errors = []
        for number, layer in enumerate(sample.layers):
            left_out = sample.layer == number
            errors.append(sample.score[left_out] - _predicted(sample, left_out))
            rows.append({**key, "layer": layer, **_errors(errors[-1])})
        rows.append({**key, **_errors(np.concatenate(errors, axis=1))})
    columns = {"layer": pl.Int64, "edits": pl.Int64, "rmse_mean": pl.Float64, "rmse_trace": pl.Float64}
    return pl.DataFrame(rows, schema=KEY_SCHEMA | columns)


def _predicted(sample: RegressionData, left_out: np.ndarray) -> Floats:
    """Scores of the edits that are left out as the others predict them, by their mean and by the regression: (2, n)."""
    score, effect = sample.score[~left_out], sample.effect[~left_out]
    mean, around = float(score.mean()), effect - effect.mean()
    spread = float(around @ around)
    slope = float(around @ (score - mean)) / spread if spread > CONSTANT * float(effect @ effect) else 0.0
    trace = mean + slope * (sample.effect[left_out] - effect.mean())
    return np.stack([np.full_like(trace, mean), trace])


def _errors(errors: np.ndarray) -> dict[str, Any]:
    mean, trace = np.sqrt(np.mean(errors**2, axis=1))
    return {"edits": errors.shape[1], "rmse_mean": float(mean), "rmse_trace": float(trace)}


def _squares(sample: RegressionData) -> tuple[Floats, Floats]:
    """Scores and effects, (facts, layers) each, of the facts that have all layers."""
    shape = (len(sample.facts), len(sample.layers))
    score, effect = np.full(shape, np.nan), np.full(shape, np.nan)
    score[sample.fact, sample.layer] = sample.score
    effect[sample.fact, sample.layer] = sample.effect
    whole = ~np.isnan(score).any(axis=1)
    return score[whole], effect[whole]


def _exchanged(
    score: Floats, effect: Floats, interaction: bool, draws: int, rng: np.random.Generator
) -> tuple[float, Floats]:
    """R^2 that effects add to that of the layer, of scores and effects (facts, layers): their own facts', and other
    facts' (draws,). An exchange leaves everything as it is but the products of scores and effects."""
    y, x = score - score.mean(axis=0), effect - effect.mean(axis=0)
    total = float(np.sum((score - score.mean()) ** 2))
    axis = 0 if interaction else None
    xx, size = np.atleast_1d((x * x).sum(axis=axis)), np.atleast_1d((effect * effect).sum(axis=axis))
    varies = xx > CONSTANT * size

    def added(products: Floats) -> Floats:
        """Of sums of products, (draws, layers)."""
        xy = products if interaction else products.sum(axis=1, keepdims=True)
        explained = np.divide(xy**2, xx, out=np.zeros_like(xy), where=varies)
        return np.asarray(explained.sum(axis=1) / total)

    orders = np.array([rng.permutation(len(x)) for _ in range(draws)])
    at_once = max(1, _MOST_NUMBERS // x.size)
    products = [np.einsum("fl,dfl->dl", y, x[orders[start : start + at_once]]) for start in range(0, draws, at_once)]
    return float(added((y * x).sum(axis=0, keepdims=True))[0]), added(np.concatenate(products))


def _resampled(sample: RegressionData, interaction: bool, draws: int, rng: np.random.Generator) -> dict[str, Floats]:
    """The statistics of samples of facts, from each fact's sums at each layer: (facts, layers, 6)."""
    facts, layers = len(sample.facts), len(sample.layers)
    x, y = sample.effect - sample.effect.mean(), sample.score - sample.score.mean()
    sums = np.zeros((facts, layers, 6))
    np.add.at(sums, (sample.fact, sample.layer), np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1))
    pieces: list[dict[str, Floats]] = []
    for start in range(0, draws, _AT_ONCE):
        count = min(_AT_ONCE, draws - start)
        weights = rng.multinomial(facts, np.full(facts, 1 / facts), size=count).astype(np.float64)
        pieces.append(_of_sums((weights @ sums.reshape(facts, -1)).reshape(count, layers, 6), interaction))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in _STATISTICS}


def _of_sums(sums: Floats, interaction: bool) -> dict[str, Floats]:
    """R^2 of samples, from sums over each layer (samples, layers, 6) of 1, x, y, xx, xy and yy."""
    xx, xy, yy = _around(sums)  # within layers
    all_xx, all_xy, total = _around(sums.sum(axis=1, keepdims=True))
    if interaction:
        explained = _explained(xx, xy, sums[..., 3]).sum(axis=1)
    else:
        explained = _explained(xx.sum(axis=1), xy.sum(axis=1), sums[..., 3].sum(axis=1))
    size = sums[..., 5].sum(axis=1)
    total = np.where(total[:, 0] > 1e-12 * size, total[:, 0], np.nan)  # a sample may have one score only
    layer = 1 - yy.sum(axis=1) / total
    return {
        "r2_layer": layer,
        "r2_trace": _explained(all_xx, all_xy, sums[..., 3].sum(axis=1, keepdims=True))[:, 0] / total,
        "r2_both": layer + explained / total,
        "diff": explained / total,
    }


def _around(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums of products around the means."""
    n, x, y, xx, xy, yy = np.moveaxis(sums, -1, 0)
    safe = np.maximum(n, 1)
    return xx - x * x / safe, xy - x * y / safe, yy - y * y / safe


def _explained(xx: Floats, xy: Floats, size: Floats) -> Floats:
    return np.divide(xy**2, xx, out=np.zeros_like(xy), where=xx > 1e-12 * np.maximum(size, 1e-300))
