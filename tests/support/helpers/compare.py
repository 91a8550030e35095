"""What "the same numbers" means: the tolerances per dtype, and the comparison of a table with the oracle's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

Rows = Sequence[dict[str, Any]]

KEY = ("fact_id", "method", "kind", "window", "layer", "token")
COUNTS = ("subject_start", "subject_end", "prompt_tokens", "answer_tokens")
NUMBERS = ("p_clean", "p_corrupted", "p_patched", "p_patched_sd")
LOGS = ("logp_clean", "logp_corrupted", "logp_patched")
GRADIENT_KEY = ("fact_id", "kind", "layer", "token")
GRADIENT_NUMBERS = ("norm", "total", "gap")

# The largest difference in probability, and the largest relative one.
TOLERANCE = {torch.float64: (1e-9, 1e-7), torch.float32: (1e-5, 1e-3)}


def assert_same(table: pa.Table, expected: Rows, dtype: torch.dtype = torch.float64) -> None:
    """The table holds exactly the expected rows, in any order, and their numbers up to the dtype's tolerance.

    Where a row has no token or no number, neither must the other.
    """
    actual, wanted = matched(table, expected, KEY)
    for name in COUNTS:
        assert [row[name] for row in actual] == [row[name] for row in wanted], name
    found, right = columns(actual, (*NUMBERS, *LOGS)), columns(wanted, (*NUMBERS, *LOGS))
    for name in LOGS:  # relative differences of p
        bound = {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]
        np.testing.assert_allclose(found[name], right[name], rtol=0, atol=bound, err_msg=name)
    for name in NUMBERS:
        # Targets of several tokens are so improbable that only their relative difference says something. A standard
        # deviation, being the difference of nearly equal numbers, is measured against the probability itself.
        scale = right["p_patched"] if name == "p_patched_sd" else right[name]
        assert_close(found[name], right[name], scale, dtype, name)


def assert_same_gradients(table: pa.Table, expected: Rows, dtype: torch.dtype = torch.float64) -> None:
    """The table of gradients holds exactly the expected rows, in any order, and their numbers up to the tolerance.

    The largest norm among a fact's states is what relative differences are measured against: a sum, and a gap even
    more, is the difference of numbers that may be much larger.
    """
    actual, wanted = matched(table, expected, GRADIENT_KEY)
    found, right = columns(actual, GRADIENT_NUMBERS), columns(wanted, GRADIENT_NUMBERS)
    facts = np.array([row["fact_id"] for row in wanted])
    scale = np.array([right["norm"][facts == fact].max() for fact in facts])
    for name in GRADIENT_NUMBERS:
        assert_close(found[name], right[name], scale, dtype, name)


def matched(table: pa.Table, expected: Rows, key: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The table's rows and the expected ones in the same order: every key is there once."""
    actual = {tuple(row[name] for name in key): row for row in table.to_pylist()}
    wanted = {tuple(row[name] for name in key): row for row in expected}
    assert len(actual) == table.num_rows, "a row appears twice"
    assert len(wanted) == len(expected), "a row is expected twice"
    assert actual.keys() == wanted.keys()
    return [actual[each] for each in wanted], list(wanted.values())


def columns(rows: Rows, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The numbers of rows by column, NaN where there is none."""
    return {name: np.array([row[name] for row in rows], dtype=float) for name in names}


def assert_close(found: np.ndarray, right: np.ndarray, scale: np.ndarray, dtype: torch.dtype, name: str) -> None:
    """The numbers differ by no more than the tolerance, and by no more than that share of the scale; NaN is NaN."""
    absolute, relative = TOLERANCE[dtype]
    np.testing.assert_allclose(found, right, rtol=0, atol=absolute, err_msg=name)
    there = ~np.isnan(right)
    smallest = 1e-300  # below, numbers lose digits; their logarithms are compared
    np.testing.assert_array_less(abs(found - right)[there], (relative * scale + smallest)[there], err_msg=name)


def assert_table_close(found: Any, expected: Any, within: float = 1e-9) -> None:
    """Two tables of pyarrow or polars are the same row for row, of two runs whose sums may be ordered differently.

    Numbers differ by no more than ``within`` of their size, or of 1 where that is larger.
    """
    one, other = (each.to_arrow() if hasattr(each, "to_arrow") else pa.table(each) for each in (found, expected))
    assert one.schema == other.schema
    assert one.num_rows == other.num_rows
    for name in one.column_names:
        ours, theirs = one[name], other[name]
        if not pa.types.is_floating(ours.type):
            assert ours.to_pylist() == theirs.to_pylist(), name
            continue
        assert ours.is_null().equals(theirs.is_null()), name
        here, there = (column.to_numpy().astype(float) for column in (ours, theirs))
        apart = np.abs(here - there) / np.maximum(np.abs(there), 1.0)
        assert np.array_equal(np.isnan(here), np.isnan(there)), name
        assert np.nanmax(apart, initial=0.0) <= within, (name, apart)


def restored_share(rows: Rows) -> float:
    """The share of restorations that leave a probability visibly other than both the corrupted and the clean one."""
    moved = [
        min(abs(row["p_patched"] / row["p_corrupted"] - 1), abs(row["p_patched"] / row["p_clean"] - 1)) for row in rows
    ]
    return float(np.mean(np.array(moved) > 1e-3))
