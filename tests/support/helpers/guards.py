"""What the guards share: where things of before are kept, running the command line, measuring tables, and comparing.

What stands in ``tests/guards/artifacts/`` and ``snapshots/`` was written by ``make_artifacts.py`` there, by an earlier
state of the code, with these same functions. They import nothing but public names, so that they hold however modules
are arranged.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pyarrow.parquet as pq

HERE = Path(__file__).parents[2] / "guards"
ARTIFACTS, SNAPSHOTS = HERE / "artifacts", HERE / "snapshots"
DATA_SETS = ("traces", "gradients", "edits", "probes", "metrics")
CHANGING = ("versions", "seconds", "begun", "device")
"""What run.json has of the machine and the moment."""


# --- running the command line ---


def run(*arguments: Any) -> tuple[int, str, str]:
    """``python -m causalcone`` in this process: exit code, what it printed, and its errors."""
    out, err = io.StringIO(), io.StringIO()
    before, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    argv = ["causalcone", *map(str, arguments)]
    with patch.object(sys, "argv", argv), patch.dict(os.environ, {"COLUMNS": "200"}), warnings.catch_warnings():
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_module("causalcone", run_name="__main__")
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
            warnings.showwarning = show
    return code, out.getvalue(), err.getvalue()


def carried_out(*arguments: Any) -> None:
    """Run a command that must go well."""
    code, printed, error = run(*arguments)
    assert code == 0, printed + error


# --- measuring ---


def digest(frame: pl.DataFrame) -> dict[str, Any]:
    """Of a table: rows, of columns of numbers their sum, their sum of squares and how many are null, of all others a
    hash."""
    told: dict[str, Any] = {"rows": frame.height}
    for name in frame.columns:
        column = frame[name]
        if column.dtype.is_float():
            finite = column.drop_nulls().drop_nans()
            told[name] = [float(finite.sum()), float((finite**2).sum()), frame.height - len(finite)]
        else:
            told[name] = hashlib.sha256(json.dumps(column.to_list(), default=str).encode()).hexdigest()[:16]
    return told


def parts(folder: Path) -> pl.DataFrame:
    """A data set, part by part in the order of their names; columns that all parts have."""
    frames = [pl.read_parquet(file) for file in sorted(folder.rglob("*.parquet"))]
    shared = [name for name in frames[0].columns if all(name in frame.columns for frame in frames)]
    return pl.concat([frame.select(shared) for frame in frames])


def data_sets(folder: Path) -> dict[str, pl.DataFrame]:
    """Those of a folder of results."""
    return {name: parts(folder / name) for name in DATA_SETS if list((folder / name).rglob("*.parquet"))}


def digests(folder: Path) -> dict[str, Any]:
    return {name: digest(frame) for name, frame in data_sets(folder).items()}


def arrow_schemas(folder: Path) -> dict[str, list[list[str]]]:
    """Names and types of the columns of every table below a folder; parts of a data set must have the same."""
    found: dict[str, list[list[str]]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        schema = [[field.name, str(field.type)] for field in pq.read_schema(file)]
        name = file.relative_to(folder).parts[0].removesuffix(".parquet")
        assert found.setdefault(name, schema) == schema, file
    return found


def kept_run(folder: Path) -> dict[str, Any]:
    """What is kept of a run, without what is the machine's and the moment's."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: "..." if key in CHANGING else kept(each) for key, each in value.items()}

    return dict(kept(json.loads((folder / "run.json").read_text(encoding="utf-8"))))


# --- comparing ---


def differences(found: Any, expected: Any, within: float = 1e-6, place: str = "") -> list[str]:
    """What is lost or changed of a value of JSON; keys and items may have been added. Numbers may differ by so much of
    their size, or of 0.001 where that is larger."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        lost = [f"{place}/{key}: gone" for key in expected if key not in found]
        both = (key for key in expected if key in found)
        return lost + [
            told for key in both for told in differences(found[key], expected[key], within, f"{place}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list | tuple) and len(expected) <= len(found):
        if len(expected) < len(found):  # those that were there, in their order
            rest = iter(found)
            pairs = (
                (next((item for item in rest if not differences(item, old, within)), None), old) for old in expected
            )
        else:
            pairs = zip(found, expected, strict=True)
        return [told for n, pair in enumerate(pairs) for told in differences(*pair, within, f"{place}/{n}")]
    if isinstance(expected, float) and isinstance(found, int | float) and math.isfinite(expected):
        same = abs(found - expected) <= within * max(1e-3, abs(expected))
    else:
        same = found == expected
    return [] if same else [f"{place}: {expected!r} before, {found!r} now"]


def snapshot(name: str) -> Any:
    return json.loads((SNAPSHOTS / name).read_text(encoding="utf-8"))


def assert_same_tables(found: Path, expected: Path) -> None:
    """All data sets of two folders, row for row; numbers to 1e-6. Parts of before may lack columns that were added."""
    one, two = data_sets(found), data_sets(expected)
    assert one.keys() == two.keys()
    for name, table in one.items():
        other = two[name]
        assert set(table.columns) <= set(other.columns) or set(other.columns) <= set(table.columns), name
        assert table.height == other.height, name
        shared = [column for column in table.columns if column in other.columns]
        told = differences(table.select(shared).to_dict(as_series=False), other.select(shared).to_dict(as_series=False))
        assert not told, (name, told[:5])
