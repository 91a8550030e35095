"""The report's page: what is in it, and that texts stay texts. ``test_report_browser.py`` opens it."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import polars as pl
import pytest
from helpers.odd_texts import ODD, with_odd_texts
from helpers.sweeps import swept, write_sweep

from causalcone.analysis import average_indirect_effect
from causalcone.analysis.page.report import SCORES, report, report_data
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.sweep_results import Study
from causalcone.runners.sweep.status import status_of

CHOICE = AnalysisOptions(draws=100)


def data_of(page):
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


@pytest.fixture(scope="module")
def packed(study):
    return report_data(Study(study), CHOICE)


@pytest.mark.slow
def test_the_grids_are_the_traces(study, packed):
    traces = pl.read_parquet(study / "traces/restore/*.parquet")
    grids = packed.about["grids"]
    for place, fact in enumerate(packed.about["facts"]):
        own, entry = traces.filter(fact_id=fact["id"]), grids["facts"][place]
        shape = (len(grids["states"]), grids["layers"], len(entry["tokens"]))
        values = packed.numbers[entry["at"] :][: np.prod(shape)].reshape(shape)
        for row in own.iter_rows(named=True):
            state = grids["states"].index([row["kind"], row["window"]])
            assert values[state, row["layer"], row["token"]] == np.float32(row["p_patched"])
            assert entry["tokens"][row["token"]] == row["token_text"]
        assert entry["span"] == [own["subject_start"][0], own["subject_end"][0]]
        assert (entry["clean"], entry["corrupted"]) == (own["p_clean"][0], own["p_corrupted"][0])


def test_the_edits_are_the_scores(study, packed):
    edits, scores = packed.about["edits"], Study(study).scores
    shape = (len(packed.about["facts"]), len(edits["groups"]), len(edits["layers"]), len(SCORES))
    values = packed.numbers[edits["at"] :][: np.prod(shape)].reshape(shape)
    places = [fact["id"] for fact in packed.about["facts"]]
    for row in scores.iter_rows(named=True):
        group = next(
            number
            for number, each in enumerate(edits["groups"])
            if all(each[name] == row[name] for name in ("problem", "method", "window"))
        )
        found = values[places.index(row["fact_id"]), group, edits["layers"].index(row["layer"])]
        expected = np.array([np.nan if row[name] is None else row[name] for name in SCORES], dtype=np.float32)
        assert np.array_equal(found, expected, equal_nan=True)


def test_suspect_edits_are_named(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    file = min((tmp_path / "study" / "edits").rglob("*.parquet"))
    rows = pl.read_parquet(file)
    reasons = pl.Series("suspect", ["it is odd", *[None] * (rows.height - 1)], dtype=pl.String)
    rows.with_columns(reasons).write_parquet(file)
    odd = rows.row(0, named=True)
    about = report_data(Study(tmp_path / "study"), CHOICE).about
    ((key, reason),) = [item for item in about["edits"]["suspect"].items() if item[1] == "it is odd"]
    fact, group, layer = map(int, key.split("/"))
    assert (about["facts"][fact]["id"], layer, reason) == (odd["fact_id"], odd["layer"], "it is odd")
    group = about["edits"]["groups"][group]
    assert [group[name] for name in ("problem", "method", "window")] == [odd["problem"], odd["method"], odd["window"]]


def test_severed_and_zeroed_states(study, packed):
    traces = pl.read_parquet(study / "traces/sever_mlp/*.parquet").sort("layer")
    severed, zeroed = packed.about["severed"], packed.about["zeroed"]
    assert (severed["parts"], zeroed["parts"]) == (["sever_mlp"], ["mlp:3"])
    effects = Study(study).zeroing(("mlp", 3)).sort("layer")
    for place, fact in enumerate(packed.about["facts"]):
        for own, table, value in ((severed, traces, "p_patched"), (zeroed, effects, "effect")):
            start = own["at"] + place * own["layers"]
            expected = table.filter(fact_id=fact["id"])[value].cast(pl.Float32).to_list()
            assert packed.numbers[start : start + own["layers"]].tolist() == expected


def test_average_effects_are_those_of_the_traces(study, packed):
    expected = average_indirect_effect(study / "traces/restore")
    lines = packed.about["averages"]
    assert [line["state"] for line in lines[:1]] == ["hidden:1"]  # the first that the sweep asks for
    for line in lines:
        kind, window = line["state"].split(":")
        rows = expected.filter(kind=kind, window=int(window)).filter(pl.col("role") == line["role"])
        assert [line[name] for name in ("layer", "effect", "facts")] == [
            rows[name].to_list() for name in ("layer", "effect", "facts")
        ]


def test_the_likeliest_answers_are_there_where_the_sweep_kept_them(study, packed, tmp_path):
    table = pl.read_parquet(study / "facts.parquet")
    kept = dict(table.select("fact_id", "likeliest").iter_rows())
    assert [fact["likeliest"] for fact in packed.about["facts"]] == [kept[fact["id"]] for fact in packed.about["facts"]]
    older = shutil.copytree(study, tmp_path / "older")
    table.drop("likeliest").write_parquet(older / "facts.parquet")
    facts = report_data(Study(older), CHOICE).about["facts"]
    assert [fact["id"] for fact in facts] == [fact["id"] for fact in packed.about["facts"]]
    assert "likeliest" not in facts[0]


def test_an_unfinished_sweep_says_how_far_it_is(study, tmp_path, run):
    """One unit of edits is gone."""
    half = shutil.copytree(study, tmp_path / "half")
    (half / "run.json").write_text((half / "run.json").read_text().replace('"complete"', '"stopped"'))
    edits = sorted((half / "edits/fact_forcing/rome-1").glob("*.parquet"))
    edits[-1].unlink()
    assert run("report", half, "--draws", "100")[0] == 0
    progress = {name: rest for name, *rest in data_of((half / "report.html").read_text())["progress"]}
    whole = status_of(str(study))
    assert list(progress) == [each.work.title for each in whole.stages]
    units = {each.work.title: (each.units, each.done) for each in whole.stages}
    count, done = units["fact forcing"]
    gone = done - sum(len(pl.read_parquet(file)) for file in (half / "edits/fact_forcing").rglob("*.parquet"))
    assert progress["fact forcing"] == [f"{count - 1} of {count}", f"{done - gone} of {done} edits"]
    count, done = units["causal tracing"]
    assert progress["causal tracing"] == [f"{count} of {count}", f"{done} of {done} facts"]
    assert run("report", study, "--out", tmp_path / "whole.html", "--draws", "100")[0] == 0
    assert data_of((tmp_path / "whole.html").read_text())["progress"] == []


def test_the_page_needs_nothing_else(packed):
    page = report(packed)
    assert not re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(?!#)""", page)
    assert "__" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL).partition("<style>")[0]
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == json.loads(json.dumps(packed.about))
    (text,) = re.findall(r'<script id="numbers" type="text/plain">(.*?)</script>', page, re.DOTALL)
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4")
    assert np.array_equal(numbers, packed.numbers, equal_nan=True)


def test_texts_cannot_leave_their_element(study, tmp_path):
    page = report(report_data(Study(with_odd_texts(study, tmp_path / "odd")), CHOICE))
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert "<" not in data
    assert json.loads(data)["facts"][0]["subject"] == ODD


def test_a_sweep_of_traces_only(folder, tmp_path, run):
    out = tmp_path / "out"
    swept(write_sweep(folder), out, "edit=none", "gradients=none", "zero=none", "sever=none")
    code, printed, error = run("report", out, "--draws", "100")
    assert (code, error) == (0, "")
    assert "There is no answer yet" in printed
    assert "missing: the sweep has no edits" in printed
    assert (out / "report.html").stat().st_size > 1_000_000


def test_the_command_says_where_the_page_is(study, tmp_path, run):
    page = tmp_path / "new" / "page.html"
    code, printed, _ = run("report", study, "--out", page, "--draws", "100")
    assert (code, page.exists(), str(page) in printed) == (0, True, True)
    assert "The choice of the edit layer explains" in printed
    code, _, error = run("report", tmp_path / "nowhere")
    assert (code, "give the folder that 'causalcone sweep' wrote to" in error) == (2, True)
