"""Small tables of edits, probes and metrics for tests of their scores."""

from __future__ import annotations

from typing import Any

import polars as pl

from causalcone.analysis import EDIT_SCHEMA, METRIC_SCHEMA, PROBE_SCHEMA


def edit(edit_id: str = "e", **columns: Any) -> pl.DataFrame:
    row = {"edit_id": edit_id, "fact_id": edit_id, "problem": "error_injection", "method": "rome", "layer": 3}
    row |= {"window": 1, "steps": 20, "loss": 0.1, "delta_norm": 1.0, "status": "done", "reason": None}
    return pl.DataFrame([{**row, **columns}], schema=EDIT_SCHEMA)


def probes(*rows: tuple[Any, ...], edit_id: str = "e") -> pl.DataFrame:
    """Rows of kind, index, p_pre, p_post and, where given, p_pre_other and p_post_other."""
    full = [(edit_id, *row, *[None] * (6 - len(row))) for row in rows]
    return pl.DataFrame(full, schema=dict([*PROBE_SCHEMA.items()][:7]), orient="row")


def metrics(*rows: tuple[Any, ...], edit_id: str = "e") -> pl.DataFrame:
    return pl.DataFrame([(edit_id, *row) for row in rows], schema=METRIC_SCHEMA, orient="row")


def only(frame: pl.DataFrame) -> dict[str, Any]:
    """The one row of a table."""
    (row,) = frame.rows(named=True)
    return row
