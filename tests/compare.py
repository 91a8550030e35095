"""What "the same numbers" means: the tolerances per dtype, and the comparison of a table with the oracle's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

KEY = ("fact_id", "kind", "window", "layer", "token")
COUNTS = ("method", "subject_start", "subject_end", "prompt_tokens")
NUMBERS = ("p_clean", "p_corrupted", "p_patched", "p_patched_sd")

# The largest difference in probability, and the largest relative one.
TOLERANCE = {torch.float64: (1e-9, 1e-7), torch.float32: (1e-5, 1e-3)}


def assert_same(table: pa.Table, expected: Sequence[dict[str, Any]], dtype: torch.dtype = torch.float64) -> None:
    """The table holds exactly the expected rows, in any order, and their numbers up to the dtype's tolerance."""
    absolute, relative = TOLERANCE[dtype]
    actual = {tuple(row[name] for name in KEY): row for row in table.to_pylist()}
    wanted = {tuple(row[name] for name in KEY): row for row in expected}
    assert len(actual) == table.num_rows, "a restoration appears twice"
    assert actual.keys() == wanted.keys()
    for name in COUNTS:
        assert {key: row[name] for key, row in actual.items()} == {key: row[name] for key, row in wanted.items()}
    found, right = (
        {name: np.array([rows[key][name] for key in wanted], dtype=float) for name in NUMBERS}
        for rows in (actual, wanted)
    )
    for name in NUMBERS:
        np.testing.assert_allclose(found[name], right[name], rtol=0, atol=absolute, err_msg=name)
        # Targets of several tokens are so improbable that only their relative difference says something. A standard
        # deviation, being the difference of nearly equal numbers, is measured against the probability itself.
        scale = right["p_patched"] if name == "p_patched_sd" else right[name]
        np.testing.assert_array_less(np.nan_to_num(abs(found[name] - right[name])), relative * scale, err_msg=name)


def restored_share(rows: Sequence[dict[str, Any]]) -> float:
    """The share of restorations that leave a probability visibly other than both the corrupted and the clean one."""
    moved = [
        min(abs(row["p_patched"] / row["p_corrupted"] - 1), abs(row["p_patched"] / row["p_clean"] - 1)) for row in rows
    ]
    return float(np.mean(np.array(moved) > 1e-3))
