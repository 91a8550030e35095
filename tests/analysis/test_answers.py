"""Probes by group, conditions, and texts: from tables to means, terminal and page."""

import json

import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, edited, traced, write_study
from helpers.odd_texts import ODD
from rich.console import Console

from causalcone.analysis import METRIC_SCHEMA, PROBE_SCHEMA, TEXT_SCHEMA, TableError, probe_metrics, read_texts
from causalcone.analysis.page import report as page_report
from causalcone.analysis.page.report import report, report_data
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.sweep_results import Study
from causalcone.analysis.tables.edits import unmet
from causalcone.runners.show.edit_tables import answer_tables, text_table

GROUP = "portability/One_Hop"
SCORES = {"a": (0.1, 0.6), "b": (0.2, 0.4)}


def tables():
    """Two facts at two layers, with two probes each, of which the second never counts for fact b."""
    edits, probes = edited(SCORES)
    rows = [
        {
            "edit_id": name, "prompt_kind": GROUP, "prompt_index": index, "p_pre": 0.1, "p_post": p,
            "prompt_name": None if index else "first", "condition": fact == "a" if index else None,
        }
        for name, fact in edits.select("edit_id", "fact_id").rows()
        for index, p in enumerate((0.2, 0.6))
    ]  # fmt: skip
    own = pl.DataFrame(rows, schema_overrides={name: PROBE_SCHEMA[name] for name in rows[0]})
    metrics = [(name, f"{GROUP}_accuracy", 0.0, 1.0) for name in edits["edit_id"]]
    metrics += [(name, "rewrite_exact_match", 0.0, float(n % 2)) for n, name in enumerate(edits["edit_id"])]
    texts = [(name, "generation", 0, f"{ODD}?", "[b]x[/b]\x1b[31m", ODD) for name in edits["edit_id"]]
    return (
        edits,
        pl.concat([probes, own], how="diagonal"),
        pl.DataFrame(metrics, schema=METRIC_SCHEMA, orient="row"),
        pl.DataFrame(texts, schema=TEXT_SCHEMA, orient="row"),
    )


@pytest.fixture
def folder(tmp_path):
    edits, probes, metrics, texts = tables()
    more = {"metrics/error_injection/rome-1": metrics, "texts/error_injection/rome-1": texts}
    return write_study(tmp_path, traced(EFFECTS), [(edits, probes)], tables=more)


def test_means_by_group():
    edits, probes, metrics, _ = tables()
    found = probe_metrics(edits, probes, metrics).filter(layer=1)
    means = {(row["group"], row["metric"]): (row["pre"], row["post"]) for row in found.iter_rows(named=True)}
    assert list(means) == [
        *(("rewrite", name) for name in ("p", "exact_match")),
        ("paraphrase", "p"), ("neighborhood", "p"), (GROUP, "p"), (GROUP, "accuracy"),
    ]  # fmt: skip
    assert means[GROUP, "p"] == pytest.approx((0.1, (0.4 + 0.2) / 2))  # of fact b, one counts
    assert means["rewrite", "p"] == pytest.approx((0.0, 0.5))
    assert means["rewrite", "exact_match"] == (0.0, 1.0)
    assert means[GROUP, "accuracy"] == (0.0, 1.0)


def test_a_probe_that_never_counts_is_named():
    edits, probes, _, _ = tables()
    assert unmet(edits, probes) == (
        "1 probe not counted, since the unedited model does not say what is presupposed: "
        f"1 of {GROUP} of fact 'b' (their rows have condition = false)"
    )
    assert unmet(edits, probes.with_columns(condition=pl.lit(None, pl.Boolean))) is None


def test_texts_are_read_once(folder):
    assert read_texts(folder / "texts").columns == [*TEXT_SCHEMA]
    _, _, _, texts = tables()
    with pytest.raises(TableError, match="rows more than once"):
        read_texts(pl.concat([texts, texts]))


def test_the_terminal_shows_texts_as_they_are(folder):
    console = Console(width=200, record=True)
    for table in (*answer_tables(folder), *text_table(folder)):
        console.print(table)
    shown = console.export_text()
    assert "[b]x[/b]\ufffd[31m" in shown
    assert "ROME: exact match (free) by layer" in shown
    assert GROUP.replace("_", " ") in shown


def test_the_page_has_the_texts_of_the_best_layer(folder):
    data = report_data(Study(folder), AnalysisOptions(draws=100))
    assert {(row["layer"], row["after"]) for rows in data.about["texts"].values() for row in rows} == {(1, ODD)}
    assert {row["metric"] for row in data.about["groups"] if row["group"] == GROUP} == {"p", "accuracy"}
    page = report(data)
    assert ODD not in page
    assert json.dumps(ODD, ensure_ascii=False)[1:-1].replace("<", "\\u003c") in page


def test_the_page_holds_so_many_characters_of_texts(folder, monkeypatch):
    monkeypatch.setattr(page_report, "MOST_CHARACTERS", 300)
    assert list(report_data(Study(folder), AnalysisOptions(draws=100)).about["texts"]) == ["0"]
