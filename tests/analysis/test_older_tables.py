"""Tables that were written before a column was added are read, alone and beside newer parts; those of a later version
are refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.trace_tables import made_up_traces
from rich.console import Console

from causalcone.analysis import TableError, read_traces
from causalcone.analysis.sweep_results import Study
from causalcone.analysis.tables.traces import polars_schema, scan_folder, table_parts
from causalcone.engine import schemas
from causalcone.engine.schemas import SCHEMA_VERSION, VERSION_KEY
from causalcone.runners.results.folder import ResultError, ResultFolder, write_part
from causalcone.runners.sweep.driver import Driver
from causalcone.runners.sweep.stages import as_sweep

TOKENS = ["The", " city", " of", " Rome"]


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two parts, of which only the second has the columns ``sure`` and ``note``."""
    monkeypatch.setattr(schemas, "ADDED", {*schemas.ADDED, "sure"})
    for number, more in enumerate(({}, {"sure": pl.lit(True), "note": pl.lit("text")})):
        frame = made_up_traces(TOKENS, (1, 3), 2, fact_id=str(number)).with_columns(**more)
        frame.write_parquet(tmp_path / f"part-{number:05}.parquet")
    return tmp_path


def test_a_column_that_is_younger_than_a_table_is_null(older):
    schema = polars_schema(pa.schema([("fact_id", pa.string()), ("layer", pa.int32()), ("sure", pa.bool_())]))
    before, now = table_parts(older, schema, "traces table")
    assert before.schema["sure"] == now.schema["sure"] == pl.Boolean
    assert before["sure"].null_count() == before.height
    assert now["sure"].all()
    with pytest.raises(TableError, match="it lacks told"):
        list(table_parts(older, {**schema, "told": pl.Boolean}, "traces table"))


def test_parts_that_differ_are_one_table(older):
    rows = scan_folder(older).select("fact_id", "sure", "note").collect()
    assert rows["fact_id"].unique(maintain_order=True).to_list() == ["0", "1"]
    assert rows.filter(fact_id="0").null_count().row(0)[1:] == (rows.height // 2,) * 2
    assert rows.filter(fact_id="1").unique().row(0)[1:] == (True, "text")
    assert read_traces(older).height == rows.height


def test_tables_and_runs_carry_the_version_of_their_columns(tmp_path):
    schema = pa.schema([("fact_id", pa.string())])
    with ResultFolder(tmp_path / "run", {"command": "trace"}) as folder, folder.table("traces", schema) as table:
        table.write(pa.RecordBatch.from_pydict({"fact_id": ["0"]}))
    (part,) = (tmp_path / "run" / "traces").iterdir()
    assert int(pq.read_metadata(part).metadata[VERSION_KEY]) == SCHEMA_VERSION
    assert json.loads((tmp_path / "run" / "run.json").read_text())["schema"] == SCHEMA_VERSION


def test_a_later_version_is_refused(tmp_path, monkeypatch):
    table = made_up_traces(TOKENS, (1, 3), 2).to_arrow()
    file = tmp_path / "traces.parquet"
    write_part(table, {}, file)
    assert read_traces(file).height == table.num_rows
    with monkeypatch.context() as later:
        later.setattr("causalcone.runners.results.folder.SCHEMA_VERSION", SCHEMA_VERSION + 1)
        write_part(table, {}, file)
    for read in (read_traces, scan_folder):
        with pytest.raises(
            TableError, match=f"traces.parquet has version {SCHEMA_VERSION + 1} .* up to {SCHEMA_VERSION}"
        ):
            read(file)
    run = {"command": "sweep", "schema": SCHEMA_VERSION + 1, "configuration": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(TableError, match="version"):
        Study(tmp_path)


def test_a_sweep_of_a_later_version_does_not_go_on(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "sweep", "schema": SCHEMA_VERSION + 1}))
    with pytest.raises(ResultError, match="version"):
        Driver(as_sweep({"model": "gpt2", "facts": "facts.jsonl"}), str(tmp_path), Console()).run()
