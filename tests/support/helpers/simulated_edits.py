"""Made-up scores and effects of edits, also as R makes them (tests/r/regressions.R)."""

from __future__ import annotations

import numpy as np
import polars as pl

from causalcone.analysis.scores import SCORES


def joined(fact, layer, effect, **scores):
    """What ``edits_with_effects`` gives, of one problem, method and window."""
    frame = pl.DataFrame({"fact_id": [f"f{f:03}" for f in fact], "layer": layer, "effect": effect, **scores})
    constant = {"problem": "error_injection", "method": "rome", "window": 1}
    columns = [pl.lit(value).alias(name) for name, value in constant.items()]
    lacking = [pl.lit(None, pl.Float64).alias(name) for name in SCORES if name not in scores]
    edit = pl.concat_str(["fact_id", "layer"], separator="-").alias("edit_id")
    return frame.with_columns(pl.col("layer").cast(pl.Int64), *columns, *lacking, edit)


def noise(fact, layer, kind):
    """Numbers in [0, 1) that any language can make."""
    value = np.sin(12.9898 * fact + 78.233 * layer + 37.719 * kind) * 43758.5453
    return value - np.floor(value)


def as_in_r(facts=40, layers=5, flat=False):
    fact, layer = (each.ravel() for each in np.meshgrid(np.arange(facts), np.arange(layers), indexing="ij"))
    effect = noise(fact, layer, 1)
    if flat:
        effect[layer == 2] = 0.25
    own = noise(fact, 0 * layer, 3)
    score = 0.12 * layer + 0.2 * own + np.where(layer == 3, 0.25 * effect, 0) + 0.3 * noise(fact, layer, 2)
    kept = ~((fact % 7 == 3) & (layer == 1))
    return joined(fact[kept], layer[kept], effect[kept], rewrite=score[kept])
