"""The study on record of SmolLM2: its text has the numbers of its tables, its tables follow from the rows on record,
and R finds the same."""

import importlib.util
import json
import re

import numpy as np
import polars as pl
import pytest
from helpers.page_commands import ROOT

from causalcone.analysis.papers.records import Record
from causalcone.analysis.papers.tables import paper_tables
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.sweep_results import Study

RECORDS = {"study": "smollm2", "problems": "smollm2-problems"}
KEY = ["problem", "method", "window", "score"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_smollm2", ROOT / "docs" / "draw_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["smollm2.md", "README.md"])
def test_numbers_in_the_text_are_those_of_the_tables(script, name):
    (page,) = (page for page in script.TEXTS if page.name == name)
    text = page.read_text(encoding="utf-8")
    assert text.count("<!--") > 5
    assert script.filled(text) == text
    wrong = re.sub(r"\d(?=(?: %)?<!--)", lambda digit: str(9 - int(digit[0])), text)
    assert wrong != text
    assert script.filled(wrong) == text


@pytest.mark.parametrize("name", RECORDS)
def test_tables_follow_from_the_rows(script, name):
    record = Record.open(RECORDS[name])
    tables, _ = paper_tables(Study(script.RAW / name), script.NO_RECORD)
    assert {"table3_rewrite", "table6_overall", "uncertainty", "average_effects"} <= {table.name for table in tables}
    for table in tables:
        committed = record.table(table.name)
        own = pl.read_csv(table.frame.write_csv().encode(), infer_schema_length=None)
        assert own.schema == committed.schema
        for name, column in own.to_dict().items():
            found, wanted = column.to_numpy(), committed[name].to_numpy()
            if column.dtype.is_float():
                np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-9, err_msg=f"{table.name}.{name}")
            else:
                assert column.to_list() == committed[name].to_list(), (table.name, name)


def test_r_finds_the_same(script):
    """R's lm and anova of the edits on record, computed once (tests/analysis/r/smollm2.R)."""
    edits = pl.read_csv(script.RAW / "edits.csv", infer_schema_length=None)
    ours = regressions(edits, ["rewrite", "paraphrase", "neighborhood", "overall"]).drop_nulls("p")
    theirs = json.loads((ROOT / "tests" / "analysis" / "r" / "smollm2.json").read_text(encoding="utf-8"))
    assert len(theirs) == len(ours) >= 40
    for *key, layer, trace, both, f, added, left, p in theirs:
        row = ours.filter(**dict(zip(KEY, key, strict=True))).row(0, named=True)
        found = [row[name] for name in ("r2_layer", "r2_trace", "r2_both", "f", "f_added", "f_left", "p")]
        assert found == pytest.approx([layer, trace, both, f, added, left, p], rel=1e-10, abs=1e-10)
