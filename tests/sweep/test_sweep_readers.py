"""Results of sweeps are read by polars, DuckDB and pandas, also while the sweep runs."""

import io
from itertools import pairwise

import duckdb
import pandas as pd
import polars as pl
import pytest
from helpers.sweeps import TABLES, configured
from rich.console import Console

from causalcone.runners.sweep.driver import Driver
from causalcone.runners.sweep.executor import LocalExecutor
from causalcone.runners.sweep.worker import Worker


@pytest.fixture
def console():
    return Console(file=io.StringIO())


def counted(out):
    """The rows of each table that is there, which every reader must see alike."""
    rows = {}
    for name in TABLES:
        if not (out / name).exists():
            continue
        files = f"{out}/{name}/**/*.parquet"
        rows[name] = pl.scan_parquet(files).select(pl.len()).collect().item()
        assert duckdb.sql(f"select count(*) from read_parquet('{files}')").fetchall() == [(rows[name],)]
        assert len(pd.read_parquet(out / name)) == rows[name]
    return rows


@pytest.mark.slow
def test_tables_can_be_read_at_any_moment(file, tmp_path, console):
    out, seen = tmp_path / "out", []

    class Read(LocalExecutor):
        def run(self, units, stop):
            for outcome in super().run(units, stop):
                seen.append(counted(out))
                yield outcome

    Driver(configured(file), str(out), console, make_executor=lambda sweep, place: Read(Worker(sweep, place))).run()
    assert list(seen[-1]) == [name for name in TABLES if name != "texts"]  # of which there are none
    for before, after in pairwise(seen):
        assert all(before.get(name, 0) <= rows for name, rows in after.items())
    scored = duckdb.sql(
        f"select count(distinct edit_id) from read_parquet('{out}/edits/**/*.parquet') as edits "
        f"join read_parquet('{out}/probes/**/*.parquet') as probes using (edit_id)"
    )
    assert scored.fetchall() == [(seen[-1]["edits"],)]


def test_rows_are_alike_in_all_readers(file, tmp_path, console):
    out = tmp_path / "out"
    Driver(configured(file, "edit=none", "gradients=none"), str(out), console).run()
    files = f"{out}/traces/**/*.parquet"
    order = ["method", "fact_id", "kind", "window", "layer", "token"]
    expected = pl.read_parquet(files).sort(order)
    by_duckdb = duckdb.sql(f"select * from read_parquet('{files}')").pl().sort(order)
    assert by_duckdb.equals(expected)
    by_pandas = pl.from_pandas(pd.read_parquet(out / "traces")).select(expected.columns).cast(expected.schema)
    assert by_pandas.sort(order).equals(expected)
    facts = duckdb.sql(f"select count(*) from read_parquet('{out}/facts.parquet') where p_true > 0").fetchall()
    assert facts == [(6,)]
