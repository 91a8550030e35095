"""``causalcone analyze`` on the folders of sweeps, whole and in part."""

import json
import re
import shlex
import shutil
from pathlib import Path

import polars as pl
import pytest
from helpers.made_up_study import EFFECTS, SCORES, edited, traced, write_study
from helpers.sweeps import swept

from causalcone.analysis import tracing_effects
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.papers.records import Record, beside
from causalcone.analysis.papers.table_files import cell, latex, markdown, p_value
from causalcone.analysis.papers.tables import paper_tables
from causalcone.analysis.scores import edits_with_effects, scores
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.sweep_results import Study
from causalcone.analysis.tables.traces import TableError
from causalcone.engine.errors import ExperimentError
from causalcone.runners.sweep.config import load_sweep

DRAWS = ("--draws", "100")


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study, tmp_path / "copy")


def run_json(folder, **changes):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, **changes}))


@pytest.mark.slow
def test_tables_are_those_of_the_functions(study, tmp_path, run):
    code, printed, error = run("analyze", study, "--out", tmp_path, "--no-figures", *DRAWS)
    assert (code, error) == (0, "")
    for number, score in ((3, "rewrite"), (4, "paraphrase"), (5, "neighborhood"), (6, "overall")):
        found = pl.read_csv(tmp_path / "tables" / f"table{number}_{score}.csv")
        effects = tracing_effects(pl.read_parquet(study / "traces/restore/*.parquet").filter(kind="mlp", window=3))
        expected = regressions(edits_with_effects(Study(study).scores, effects), [score])
        both = found.join(expected, on=["problem", "method", "window"], suffix="_expected")
        assert len(found) == len(both) == 6
        for name in ("r2_layer", "r2_trace", "r2_both", "p"):
            apart = (both[name].cast(pl.Float64) - both[f"{name}_expected"]).abs().drop_nulls()
            assert both[name].is_null().equals(both[f"{name}_expected"].is_null())
            assert apart.is_empty() or apart.max() < 1e-12
    page = (tmp_path / "tables.md").read_text()
    assert (
        "effects of mlp:3, largest over prompt tokens, over p_high; layer and effect with interaction" in page.lower()
    )
    assert "The choice of the edit layer explains" in printed
    assert len(list((tmp_path / "tables").glob("*.tex"))) == len(list((tmp_path / "tables").glob("*.csv"))) == 12


def test_options_are_named_in_the_tables(study, tmp_path, run):
    options = ("--state", "hidden:1", "--at", "subject_last", "--denominator", "p_clean", "--additive", "--mixed")
    code, _, _ = run("analyze", study, "--out", tmp_path, "--no-figures", "--aggregate", "first", *options, *DRAWS)
    assert code == 0
    page = (tmp_path / "tables" / "table3_rewrite.md").read_text()
    assert "hidden:1, at the last subject token, over p_clean; layer and effect additive; scores of the first" in page
    assert {"p_mixed", "fact_share"} <= set(pl.read_csv(tmp_path / "tables" / "uncertainty.csv").columns)


def test_the_answer_score_is_that_of_all_effects_and_scores(study, copy, tmp_path, run):
    assert run("analyze", study, "--out", tmp_path, "--no-figures", "--answer-score", "mean", *DRAWS)[0] == 0
    found = pl.read_csv(tmp_path / "tables" / "table3_rewrite.csv")
    effects = tracing_effects(study / "traces/restore", answer_score="mean").filter(kind="mlp", window=3)
    rated = scores(study / "edits", study / "probes", answer_score="mean")
    expected = regressions(edits_with_effects(rated, effects), ["rewrite"])
    both = found.join(expected, on=["problem", "method", "window"], suffix="_expected")
    assert both["r2_layer"].to_list() == pytest.approx(both["r2_layer_expected"].to_list())
    assert both["r2_both"].to_list() == pytest.approx(both["r2_both_expected"].to_list())
    assert "p per token of the answer" in (tmp_path / "tables.md").read_text()
    run_json(copy, analysis={"answer_score": "mean"})
    assert Study(copy).scores.equals(Study(study, answer_score="mean").scores)
    assert not Study(copy).scores.equals(Study(study).scores)


@pytest.mark.slow
def test_figures_are_drawn_as_png_and_pdf(study, tmp_path, run):
    code, printed, _ = run("analyze", study, "--out", tmp_path, "--scatter-all", *DRAWS)
    assert code == 0
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in (
        *(
            "average_indirect_effect",
            "severed",
            "zeroing",
            "effects_by_window",
            "peak_layers",
            "scores_error_injection",
        ),
        *("r2_mlp_3", "scatter_rewrite", "scatter_overall", "scatter_last_subject", "scatter_unscaled"),
        *(
            "scatter_zeroing_rewrite",
            "gradients_000",
            "scatter_fact_forcing_memit_2",
            "scatter_error_injection_finetune_1",
        ),
    ):
        assert {f"{name}.png", f"{name}.pdf"} <= figures
    assert f"{len(figures) // 2} figures" in printed
    assert all((tmp_path / "figures" / name).stat().st_size > 3000 for name in figures)


def test_the_default_folder_is_inside_and_the_sweep_goes_on(copy, folder, run):
    assert run("analyze", copy, "--no-figures", *DRAWS)[0] == 0
    assert (copy / "analysis" / "tables.md").exists()
    assert swept(folder / "sweep.toml", copy).computed == 0


# --- what is missing ---


@pytest.mark.slow
def test_a_sweep_without_edits(copy, tmp_path, run):
    for table in ("edits", "probes", "metrics"):
        shutil.rmtree(copy / table)
    code, printed, _ = run("analyze", copy, "--out", tmp_path / "out", *DRAWS)
    assert code == 0
    assert "missing: no table2, table3, table4, table5, table6, table7, uncertainty, correlations, unscaled," in printed
    assert "holds no edits yet" in printed
    assert "There is no answer yet" in printed
    assert (tmp_path / "out" / "figures" / "effects_by_window.png").exists()


def test_a_sweep_that_is_running(copy, tmp_path, run):
    shutil.rmtree(copy / "edits" / "fact_forcing")
    shutil.rmtree(copy / "traces" / "zero")
    (copy / "edits" / "error_injection" / "rome-1" / "part-00001.parquet").unlink()
    run_json(copy, status="running")
    code, printed, _ = run("analyze", copy, "--out", tmp_path / "out", "--no-figures", *DRAWS)
    assert code == 0
    for line in (
        "missing: the sweep is running: tables are of what is finished",
        "missing: there are no edits of fact forcing yet",
        "missing: there are no zeroed states yet",
        "missing: no zeroing: there are no zeroed states",
    ):
        assert line in printed
    found = pl.read_csv(tmp_path / "out" / "tables" / "table3_rewrite.csv")
    assert found.filter(method="rome")["edits"].to_list() == [8]


def test_one_layer_and_a_constant_score(copy):
    for file in (copy / "edits").rglob("*.parquet"):
        pl.read_parquet(file).filter(layer=2).write_parquet(file)
    for file in (copy / "probes" / "error_injection" / "rome-1").glob("*.parquet"):
        pl.read_parquet(file).with_columns(p_post=pl.col("p_pre")).write_parquet(file)
    tables, missing = paper_tables(Study(copy), AnalysisOptions(draws=100))
    (table,) = (table for table in tables if table.name == "table3_rewrite")
    notes = {(row["problem"], row["method"]): row["note"] for row in table.frame.iter_rows(named=True)}
    assert notes["error_injection", "rome"] == "the score is the same for all edits"
    assert all("all edits are at layer 2" in notes[key] for key in notes if key != ("error_injection", "rome"))
    assert missing == []


def test_traces_without_the_state_that_is_asked_for(study, run):
    code, printed, _ = run("analyze", study, "--state", "attn:7", "--no-figures", *DRAWS)
    assert code == 0
    assert "attn:7 was not restored; there are hidden:1, mlp:3" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--at", "last"), "--at is 'last'; choose from max, subject_last"),
        (("--aggregate", "median"), "--aggregate is 'median'; choose from first, mean"),
        (("--denominator", "p"), "--denominator is 'p'; choose from p_high, p_clean"),
        (("--state", "mlp:0"), "mlp"),
    ],
)
def test_bad_options_are_named(study, options, said, run):
    code, _, error = run("analyze", study, *options)
    assert (code, said in error) == (2, True)


def test_a_folder_that_is_no_sweep(tmp_path, run):
    code, _, error = run("analyze", tmp_path)
    assert (code, "give the folder that 'causalcone sweep' wrote to" in error) == (2, True)
    (tmp_path / "run.json").write_text(json.dumps({"command": "trace"}))
    assert "holds results of 'trace'" in run("analyze", tmp_path)[2]
    (tmp_path / "run.json").write_text("half a")
    assert "cannot be read" in run("analyze", tmp_path)[2]


def test_the_examples_of_the_page_run(study, tmp_path, monkeypatch, capsys, run):
    page = (Path(__file__).resolve().parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(study, tmp_path / "study")
    (commands,) = re.findall(r"```\n(causalcone.*?)```", page, re.DOTALL)
    for line in commands.splitlines():
        arguments = shlex.split(line, comments=True)[1:]
        fewer = ("--no-figures",) if arguments[0] == "analyze" else ()
        assert run(*arguments, *fewer, *DRAWS)[0] == 0
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    assert "chance" in capsys.readouterr().out


# --- published values ---


def test_published_values_are_set_beside(tmp_path):
    folder = write_study(tmp_path, traced(EFFECTS), [edited(SCORES)], analysis={"published": "hase2023-gptj"})
    tables, _ = paper_tables(Study(folder), AnalysisOptions(draws=100))
    by_name = {table.name: table.frame for table in tables}
    (row,) = by_name["table3_rewrite"].filter(problem="error_injection", method="rome").rows(named=True)
    printed = [row[f"record_{name}"] for name in ("r2_layer", "r2_trace", "r2_both", "diff", "p")]
    assert printed == [0.947, 0.016, 0.948, 0.001, "<1e-4"]
    errors = by_name["table7_errors"].filter(problem="error_injection", method="rome", score="rewrite", metric="mae")
    assert errors.select("record_layer", "record_trace").row(0) == (0.02, 0.206)


def test_what_is_published_is_what_the_paper_prints():
    """Spot checks, and that R^2 and what tracing adds fit together as far as three digits do."""
    gptj, zsre = Record.open("hase2023-gptj"), Record.open("hase2023-zsre")
    for name in ("table3_rewrite", "table4_paraphrase", "table5_neighborhood", "table6_overall"):
        table = gptj.table(name)
        assert table.height == 20
        assert (table["r2_both"] - table["r2_layer"] - table["diff"]).abs().max() < 0.0021
    overall = gptj.table("table6_overall").filter(problem="fact_forcing", method="finetune", window=5)
    assert overall.row(0)[3:] == (0.459, 0.057, 0.475, 0.017, "<1e-4")
    assert gptj.table("table2_concentrated")["r2_layer"].to_list() == [0.927]
    assert zsre.table("table8_errors").filter(score="overall")["trace"].to_list() == [0.059, 0.223, 0.188]
    assert zsre.table("table3_rewrite") is None
    with pytest.raises(TableError, match="no tables on record of 'rome2022'"):
        Record.open("rome2022")
    with pytest.raises(ExperimentError, match="no tables on record of 'rome2022'"):
        load_sweep("demo", ["published=rome2022"])


def test_rows_without_a_published_value_stay():
    own = pl.DataFrame({"problem": ["error_injection"], "method": ["rome"], "window": [9], "r2_layer": [0.5]})
    assert beside(own, "table3_rewrite", Record.open("hase2023-gptj"))["record_r2_layer"].to_list() == [None]


def test_what_analyze_wrote_is_a_study_on_record(tmp_path, run):
    """Of four facts one is edited anew: beside each value stands that of all four, with its own number of facts."""
    scores = {**SCORES, "d": (0.3, 0.8)}
    whole, small = (
        write_study(tmp_path / name, traced({**EFFECTS, "d": (0.2, 0.1)}), [edited(part)])
        for name, part in (("whole", scores), ("small", SCORES))
    )
    assert run("analyze", whole, "--no-figures", *DRAWS)[0] == 0
    assert run("analyze", small, "--no-figures", "--beside", whole / "analysis/tables", *DRAWS)[0] == 0
    ours, theirs = (
        pl.read_csv(folder / "analysis/tables/table3_rewrite.csv").row(0, named=True) for folder in (small, whole)
    )
    assert (ours["facts"], ours["record_facts"]) == (3, 4)
    for name in ("r2_layer", "r2_trace", "r2_both", "diff", "p", "edits", "facts"):
        assert ours[f"record_{name}"] == theirs[name] != ours[name]
    averages = pl.read_csv(small / "analysis/tables/average_effects.csv")
    assert averages["record_effect"].to_list() == averages["effect"].to_list()
    code, _, error = run("analyze", small, "--beside", tmp_path / "nowhere", *DRAWS)
    assert (code, "there are no tables on record of" in error) == (2, True)


# --- as they are shown ---


def test_cells():
    row = {"method": "finetune", "window": 5, "problem": "fact_erasure", "diff": -1e-17, "p": 0.00034, "note": None}
    assert [cell(name, row) for name in row if name != "window"] == ["FT-5", "fact erasure", "0.000", "3.4e-04", "-"]
    assert (p_value(0.00003), p_value(0.0312), p_value(1.0)) == ("<1e-4", "0.031", "1.000")


def test_markdown_and_latex_escape(study):
    (table, *_), _ = paper_tables(Study(study), AnalysisOptions(draws=100))
    odd = table.frame.head(1).with_columns(problem=pl.lit("a|b_50%"), note=pl.lit("x & y <z>"))
    shown = type(table)("odd", "R^2 & more", odd, ["note_1"])
    assert "a\\|b 50%" in markdown(shown)
    assert "a|b 50\\%" in latex(shown)
    assert "x \\& y \\textless z\\textgreater" in latex(shown)
    assert "R\\textasciicircum 2 \\& more. Note\\_1." in latex(shown)
