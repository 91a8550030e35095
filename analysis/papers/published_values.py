"""What papers report, to be set beside a user's own numbers."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import polars as pl

from causalcone.analysis.tables.traces import TableError

_KEY = {"problem": pl.String, "method": pl.String, "window": pl.Int64}
_R2 = {
    **_KEY,
    "r2_layer": pl.Float64,
    "r2_trace": pl.Float64,
    "r2_both": pl.Float64,
    "diff": pl.Float64,
    "p": pl.String,
}

PUBLISHED_UNSCALED = (5, -0.006)
"""The layer, counted from 0, and the correlation of Hase et al. 2023, Fig. 14: ROME on GPT-J in Error Injection."""

STUDIES = ("hase2023-gptj", "hase2023-zsre")
"""The studies that there are published tables of."""


def published_regressions(study: str, score: str) -> pl.DataFrame | None:
    """R^2 of ``score`` by problem, method and window as printed (Hase et al. 2023, Tables 3-6); None where a study has
    none. ``p`` is a text, such as "<1e-4"."""
    rows = _study(study).get("r2", {}).get(score)
    return None if rows is None else pl.DataFrame(rows, schema=_R2, orient="row")


def published_concentrated(study: str) -> pl.DataFrame | None:
    """R^2 of the rewrite score on facts with concentrated effects (Hase et al. 2023, Table 2)."""
    rows = _study(study).get("concentrated")
    return None if rows is None else pl.DataFrame(rows, schema=_R2, orient="row")


def published_errors(study: str, score: str) -> pl.DataFrame | None:
    """R^2, RMSE and MAE of ROME in Error Injection by predictor (Hase et al. 2023, Tables 7 and 8): columns metric,
    layer, trace."""
    found = _study(study).get("errors", {}).get(score)
    if found is None:
        return None
    schema = {"metric": pl.String, "layer": pl.Float64, "trace": pl.Float64}
    return pl.DataFrame([[metric, *values] for metric, values in found.items()], schema=schema, orient="row")


def _study(name: str) -> dict[str, Any]:
    if name not in STUDIES:
        raise TableError(f"there are no published tables of {name!r}; there are of {', '.join(STUDIES)}")
    return dict(_values()[name])


@cache
def _values() -> dict[str, Any]:
    text = files("causalcone.analysis").joinpath("papers/published/hase2023.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
